"""The fast path on CPUs: blocks of queries meet bands of keys; cost T x W, linear in the length of a row.

Stage: attention. In: one layer's queries, keys and values. Out: what each token reads.
Invariant: content queries and [SUM] queries each read the prefix and their block's band (bands.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.functional import scaled_dot_product_attention as sdpa

from dti_ray.model.attention.bands import from_slots, lay_bands, to_bands, to_blocks, to_rows, to_slots
from dti_ray.model.attention.plan import HIDDEN, AttentionPlan, Copy, for_all_heads, unrotate


class Banded:
    """Bands and masks of one batch; the masks are made once and serve all layers."""

    def __init__(self, plan: AttentionPlan) -> None:
        self.plan = plan
        self.bands = lay_bands(plan.batch, plan.rules)
        self.masks: dict[tuple[str, int, torch.dtype], Tensor] = {}

    def __call__(
        self, query: Tensor, copies: Sequence[Copy], scaling: float, dropout: float
    ) -> Float[Tensor, "B H T D"]:
        """See `Attend`."""
        keys = _BandedKeys(for_all_heads(copies, query.shape[1]), self)
        sums = self.plan.sizes[2]
        sum_out = _sum_queries(query[:, :, -sums:], keys, scaling, dropout)
        if query.shape[2] == sums:
            return sum_out
        prefix, content = query[:, :, :-sums].split(keys.sizes[:2], dim=2)
        prefix_out = sdpa(prefix, *keys.ahead, is_causal=True, scale=scaling)
        return torch.cat([prefix_out, _content_queries(content, keys, scaling, dropout), sum_out], dim=2)

    def content_mask(self, copies: int, dtype: torch.dtype) -> Float[Tensor, "N 1 Q keys"]:
        """Return the additive mask of content queries on [prefix | copies of the band], made once."""
        key = ("content", copies, dtype)
        if key not in self.masks:
            parts = self._band_masks("content", copies)
            self.masks[key] = pad(torch.cat(parts, dim=-1), (self.plan.sizes[0], 0)).to(dtype)
        return self.masks[key]

    def sum_mask(self, copies: int, heads: int) -> Float[Tensor, "N heads G keys"]:
        """Return the additive mask of [SUM] queries on [prefix | copies of the band | each itself], made once."""
        key = ("sum", copies, torch.float32)
        if key not in self.masks:
            parts = self._band_masks("sum", copies)
            if self.plan.debias.strength > 0:
                bias = self.plan.position_bias(self.bands.distance("sum"), heads)
                parts = [part + bias for part in parts]
            slots = parts[0].shape[-2]
            itself = torch.full([slots, slots], HIDDEN, device=parts[0].device).fill_diagonal_(0.0)
            keys = pad(torch.cat(parts, dim=-1), (self.plan.sizes[0], 0))
            self.masks[key] = torch.cat([keys, itself.expand(*keys.shape[:-1], -1)], dim=-1)
        return self.masks[key]

    def _band_masks(self, kind: str, copies: int) -> list[Tensor]:
        return self.plan.copy_masks(
            self.bands.seen(kind, self.plan.rules), self.bands.distance(kind) if copies == 2 else None, copies
        )


class _BandedKeys:
    """The keys and values of one layer, cut as both kinds of queries need them."""

    def __init__(self, copies: Sequence[Copy], banded: Banded) -> None:
        plan, bands = banded.plan, banded.bands
        self.banded, self.plan, self.bands, self.sizes = banded, plan, bands, plan.sizes
        self.turns = list(zip(*(part.split(self.sizes, dim=1) for part in plan.rotary), strict=True))
        split = [tuple(zip(*(x.split(self.sizes, dim=2) for x in copy), strict=True)) for copy in copies]
        self.ahead, _, self.own = split[0]
        self.contents = [part[1] for part in split]
        self.content = [_Keys(self.band(key), self.band(value), is_flat=False) for key, value in self.contents]
        self.pinned: list[_Keys] = []
        if self.sizes[0]:
            pinned = (unrotate(self.ahead[0], self.turns[0]), self.ahead[1])
            self.pinned = [_Keys(*(x.repeat_interleave(bands.blocks, 0) for x in pinned), is_flat=True)]

    def band(self, x: Tensor) -> Tensor:
        return to_bands(x, self.bands.blocks, self.bands.back)

    def for_sums(self) -> list[_Keys]:
        """Return content and own keys of [SUM] queries, unrotated where debias drops rotation."""
        (key, value), is_flat = self.own, self.plan.debias.rotary == "drop"
        if not is_flat:
            return [*self.content, _Keys(to_slots(key, self.bands), to_slots(value, self.bands), is_flat)]
        flat = [self.band(unrotate(content, self.turns[1])) for content, _ in self.contents]
        own = to_slots(unrotate(key, self.turns[2]), self.bands)
        content = [_Keys(key, rotated.value, is_flat) for key, rotated in zip(flat, self.content, strict=True)]
        return [*content, _Keys(own, to_slots(value, self.bands), is_flat)]


def _content_queries(query: Tensor, keys: _BandedKeys, scaling: float, dropout: float) -> Tensor:
    blocks = keys.bands.blocks
    flat = to_blocks(unrotate(query, keys.turns[1]), blocks) if keys.pinned else None
    mask = keys.banded.content_mask(len(keys.content), query.dtype)
    out = _read(to_blocks(query, blocks), flat, [*keys.pinned, *keys.content], mask, scaling, dropout)
    return to_rows(out, len(query), query.shape[2])


def _sum_queries(query: Tensor, keys: _BandedKeys, scaling: float, dropout: float) -> Tensor:
    """[SUM] queries are few: scores and softmax in fp32, whatever the model's precision."""
    rotated, flat = (to_slots(x, keys.bands).float() for x in (query, unrotate(query, keys.turns[2])))
    answers = [part.float() for part in (*keys.pinned, *keys.for_sums())]
    mask = keys.banded.sum_mask(len(keys.content), query.shape[1])
    out = _read(rotated, flat, answers, mask, scaling, dropout)
    return from_slots(out.to(query.dtype), keys.bands)


@dataclass(frozen=True)
class _Keys:
    """Keys and values [N, H, K, D] of blocks; `is_flat` keys are met by unrotated queries."""

    key: Tensor
    value: Tensor
    is_flat: bool

    def float(self) -> _Keys:
        return _Keys(self.key.float(), self.value.float(), self.is_flat)


def _read(
    query: Tensor,
    flat_query: Tensor | None,
    keys: Sequence[_Keys],
    mask: Tensor,
    scaling: float,
    dropout: float,
) -> Float[Tensor, "N H Q D"]:
    """One softmax over rotated and unrotated keys.

    Where both kinds occur, queries become [rotated | flat] and each key is padded with zeros on the side
    that it does not answer, so that one fused kernel serves both.
    """
    width = query.shape[-1]
    kinds = {part.is_flat for part in keys}
    sides, value = [part.key for part in keys], torch.cat([part.value for part in keys], dim=2)
    if True in kinds:
        assert flat_query is not None
        query = flat_query if len(kinds) == 1 else torch.cat([query, flat_query], dim=-1)
    if len(kinds) == 2:
        sides = [pad(part.key, (width, 0) if part.is_flat else (0, width)) for part in keys]
        value = pad(value, (0, width))  # fused kernels want one width
    return sdpa(query, torch.cat(sides, dim=2), value, attn_mask=mask, dropout_p=dropout, scale=scaling)[..., :width]
