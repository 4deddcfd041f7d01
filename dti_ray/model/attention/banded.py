"""The fast path on CPUs: blocks of queries meet bands of keys; cost T x W, linear in the length of a row.

Stage: attention. In: one layer's queries, keys and values. Out: what each token reads.
Invariant: keys come in parts (prefix, band, band of h0, the [SUM] itself), each met by rotated or by unrotated
queries; every part runs through PyTorch's fused kernel on its own, and the log-sum-exp that the kernel returns
joins them to one softmax (the arithmetic of ring attention; Liu et al. 2023, arXiv 2310.01889). So nothing is
concatenated, and a band is read where it lies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from dti_ray.model.attention.bands import from_slots, lay_bands, to_bands, to_blocks, to_rows, to_slots
from dti_ray.model.attention.plan import HIDDEN, AttentionPlan, Copy, for_all_heads
from dti_ray.model.attention.rotary import unrotate

fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
fused_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class Part:
    """Keys of blocks and the queries that meet them: [N, H, K, D], [N, H, Q, D]; the mask is added to scores."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None

    def float(self) -> Part:
        """Return the part in fp32."""
        return Part(self.query.float(), self.key.float(), self.value.float(), self.mask)


class Banded:
    """Bands and masks of one batch; the masks are made once and serve all layers."""

    def __init__(self, plan: AttentionPlan) -> None:
        self.plan = plan
        self.bands = lay_bands(plan.batch, plan.rules)
        self.masks: dict[tuple[str, int], list[Tensor]] = {}

    def __call__(
        self, query: Tensor, copies: Sequence[Copy], scaling: float, dropout: float
    ) -> Float[Tensor, "B H T D"]:
        """See `Attend`."""
        assert dropout == 0.0, "attention dropout is refused when the model is built"
        precision = copies[0][1].dtype  # under autocast rotation has made fp32 of queries and keys
        query, copies = query.to(precision), [(key.to(precision), value) for key, value in copies]
        keys = BandedKeys(for_all_heads(copies, query.shape[1]), self)
        sums = self.plan.sizes[2]
        sum_parts = [part.float() for part in keys.for_sums(query[:, :, -sums:])]  # few: exact whatever the precision
        sum_out = from_slots(read(sum_parts, scaling).to(query.dtype), self.bands)
        if query.shape[2] == sums:
            return sum_out
        prefix, content = query[:, :, :-sums].split(self.plan.sizes[:2], dim=2)
        content_out = to_rows(read(keys.for_content(content), scaling), len(query), content.shape[2])
        if not prefix.shape[2]:
            return torch.cat([content_out, sum_out], dim=2)
        prefix_out = sdpa(prefix, *keys.ahead, is_causal=True, scale=scaling)
        return torch.cat([prefix_out, content_out, sum_out], dim=2)

    def band_masks(self, kind: str, copies: int, heads: int, dtype: torch.dtype) -> list[Float[Tensor, "N _ Q K"]]:
        """Return the additive masks of one kind of queries, one per copy."""
        if (kind, copies) not in self.masks:
            d = self.bands.distance(kind) if copies == 2 or kind == "sum" else None
            masks = self.plan.copy_masks(self.bands.seen(kind, self.plan.rules), d, copies)
            if kind == "sum" and self.plan.debias.strength > 0:
                assert d is not None
                masks = [mask + self.plan.position_bias(d, heads) for mask in masks]
            self.masks[kind, copies] = [mask.to(dtype) for mask in masks]
        return self.masks[kind, copies]


class BandedKeys:
    """The keys and values of one layer, cut as both kinds of queries need them."""

    def __init__(self, copies: Sequence[Copy], banded: Banded) -> None:
        self.banded, self.plan, self.bands = banded, banded.plan, banded.bands
        angles = (part.to(copies[0][0].dtype).split(self.plan.sizes, dim=1) for part in self.plan.rotary)
        self.turns = list(zip(*angles, strict=True))
        split = [tuple(zip(*(x.split(self.plan.sizes, dim=2) for x in copy), strict=True)) for copy in copies]
        self.ahead, _, self.own = split[0]
        self.contents: list[Copy] = [part[1] for part in split]
        self.band_keys = [self.band(key) for key, _ in self.contents]
        self.band_values = [self.band(value) for _, value in self.contents]

    def band(self, x: Tensor) -> Tensor:
        """Lay one copy of keys or values in bands."""
        return to_bands(x, self.bands.blocks, self.bands.back)

    def for_content(self, query: Tensor) -> list[Part]:
        """Return what content queries meet: the prefix, if pinned unrotated on both sides, and the bands."""
        heads, copies = query.shape[1], len(self.contents)
        blocks = to_blocks(query, self.bands.blocks)
        masks = self.banded.band_masks("content", copies, heads, query.dtype)
        bands = zip(self.band_keys, self.band_values, masks, strict=True)
        return [
            *self.prefix(
                self.plan.is_pinned, blocks, lambda: to_blocks(unrotate(query, self.turns[1]), self.bands.blocks)
            ),
            *(Part(blocks, key, value, mask) for key, value, mask in bands),
        ]

    def for_sums(self, query: Tensor) -> list[Part]:
        """Return what [SUM] queries meet: the same and themselves, unrotated where debias drops rotation."""
        heads, copies = query.shape[1], len(self.contents)
        own_key, own_value = self.own
        keys = self.band_keys
        if drop := self.plan.debias.rotary == "drop":
            keys = [self.band(unrotate(key, self.turns[1])) for key, _ in self.contents]
            own_key, query = unrotate(own_key, self.turns[2]), unrotate(query, self.turns[2])
        slots = to_slots(query, self.bands)
        own = torch.full([slots.shape[2]] * 2, HIDDEN, device=query.device).fill_diagonal_(0.0)
        bands = zip(keys, self.band_values, self.banded.band_masks("sum", copies, heads, torch.float32), strict=True)
        return [
            *self.prefix(
                drop or self.plan.is_pinned,
                slots,
                lambda: slots if drop else to_slots(unrotate(query, self.turns[2]), self.bands),
            ),
            *(Part(slots, key, value, mask) for key, value, mask in bands),
            Part(slots, to_slots(own_key, self.bands), to_slots(own_value, self.bands), own[None, None]),
        ]

    def prefix(self, is_flat: bool, query: Tensor, flat_query: Callable[[], Tensor]) -> list[Part]:
        """Return the prefix as everyone behind it meets it; nothing where there is none."""
        if not self.plan.sizes[0]:
            return []
        key, value = self.ahead
        if is_flat:
            query, key = flat_query(), unrotate(key, self.turns[0])
        key, value = (x.unsqueeze(1).expand(-1, self.bands.blocks, -1, -1, -1).flatten(0, 1) for x in (key, value))
        return [Part(query, key, value, None)]


def read(parts: Sequence[Part], scaling: float) -> Float[Tensor, "N H Q D"]:
    """Return the values under one softmax over the keys of all parts."""
    tensors = [x for part in parts for x in (part.query, part.key, part.value)]
    return _Read.apply(scaling, [part.mask for part in parts], *tensors)


class _Read(torch.autograd.Function):
    """Each part forward by itself; backward the kernel gets the joint output and log-sum-exp, which makes it exact."""

    @staticmethod
    def forward(ctx: Any, scaling: float, masks: list[Tensor | None], *tensors: Tensor) -> Tensor:
        outs, sums = [], []
        for i, mask in enumerate(masks):
            out, lse = fused(*tensors[3 * i : 3 * i + 3], 0.0, False, attn_mask=mask, scale=scaling)
            outs.append(out)
            sums.append(lse)
        out, lse = outs[0], sums[0]
        if len(masks) > 1:
            lse = torch.stack(sums).logsumexp(0)
            shares = [(part - lse).exp().unsqueeze(-1).to(out.dtype) for part in sums]
            out = outs[0] * shares[0]
            for other, share in zip(outs[1:], shares[1:], strict=True):
                out.addcmul_(other, share)
        ctx.scaling, ctx.masks = scaling, masks
        ctx.save_for_backward(out, lse, *tensors)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        out, lse, *tensors = ctx.saved_tensors
        parts: list[Tensor | None] = []
        for i, mask in enumerate(ctx.masks):
            part = tensors[3 * i : 3 * i + 3]
            parts += fused_backward(gradients[0], *part, out, lse, 0.0, False, attn_mask=mask, scale=ctx.scaling)
        return None, None, *parts
