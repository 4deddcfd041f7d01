"""Attention backends: one reference that is easy to read, and the path that is fast.

Stage: attention. In: rotated queries, keys and values of one layer, and an `AttentionPlan`. Out: what each
token reads. Registered with Transformers under `NAME`, so a decoder runs unpatched.
Invariant: all backends compute the same function. Cost of `dense`: T x T scores. Cost of `banded`: T x W,
W the longest look-back of the batch rounded up to blocks: linear in the length of a row.

Three things differ from plain attention. The prefix is pinned: everyone behind it reads it unrotated,
as if at distance 0. [SUM] queries may carry a distance bias and drop rotation (debias). With a
`distance` or `constant` reset a query meets two copies of every earlier interaction, the contextual one
and one computed from the embeddings, weighted (1 - alpha) : alpha inside one softmax.

Axes: B rows, H heads, T tokens, D head width, N blocks of all rows, Q queries and K keys of a block.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers import AttentionInterface, AttentionMaskInterface

from dti_ray.config import DebiasConfig, ResetConfig
from dti_ray.model.bands import Bands, from_slots, lay_bands, to_bands, to_blocks, to_rows, to_slots
from dti_ray.model.batch import PackedBatch
from dti_ray.model.masks import Rules, bias_slopes, dense_distance, dense_mask

NAME = "dti"
HIDDEN = float("-inf")
Backend = Literal["dense", "banded"]
Copy = tuple[Tensor, Tensor]  # keys and values [B, H, T, D]

log = logging.getLogger(__name__)


class SelfAttention(Protocol):
    """What we use of a decoder layer's attention module."""

    layer_idx: int
    head_dim: int
    k_proj: nn.Module
    v_proj: nn.Module


@dataclass
class AttentionPlan:
    """What all layers of one forward pass share; made once per batch.

    Attributes:
        batch: the rows.
        rules: the window.
        debias: bias and rotation of [SUM] scores.
        reset: mode and strength of the reset.
        backend: which path computes.
        layers: the decoder's layers, for the norm in front of keys that are made here.
        embeddings: h0 [B, T, width].
        rotary: (cos, sin) [B, T, D] of the layer at hand; each layer sets its own before it attends.
        last_states: states in front of the last layer [B, T, width], once it is reached.
    """

    batch: PackedBatch
    rules: Rules
    debias: DebiasConfig
    reset: ResetConfig
    backend: Backend
    layers: nn.ModuleList
    embeddings: Tensor
    rotary: tuple[Tensor, Tensor] = field(init=False)
    last_states: Tensor | None = None
    _masks: dict[tuple[str, int, torch.dtype], Tensor] = field(default_factory=dict)

    @cached_property
    def bands(self) -> Bands:
        """The geometry of the banded path."""
        return lay_bands(self.batch, self.rules)

    @property
    def is_dual(self) -> bool:
        """Whether queries of layers behind the first meet two copies of earlier interactions."""
        return self.reset.mode in ("distance", "constant") and self.reset.alpha > 0

    def content_mask(self, copies: int, dtype: torch.dtype) -> Float[Tensor, "N 1 Q keys"]:
        """Return the additive mask of content queries on [prefix | copies of the band], made once."""
        key = ("content", copies, dtype)
        if key not in self._masks:
            parts = self._band_masks("content", copies)
            self._masks[key] = pad(torch.cat(parts, dim=-1), (self.batch.prefix_size, 0)).to(dtype)
        return self._masks[key]

    def sum_mask(self, copies: int, heads: int) -> Float[Tensor, "N heads G keys"]:
        """Return the additive mask of [SUM] queries on [prefix | copies of the band | each itself], made once."""
        key = ("sum", copies, torch.float32)
        if key not in self._masks:
            parts = self._band_masks("sum", copies)
            if self.debias.strength > 0:
                bias = self.position_bias(self.bands.distance("sum"), heads)
                parts = [part + bias for part in parts]
            slots = parts[0].shape[-2]
            itself = torch.full([slots, slots], HIDDEN, device=parts[0].device).fill_diagonal_(0.0)
            keys = pad(torch.cat(parts, dim=-1), (self.batch.prefix_size, 0))
            self._masks[key] = torch.cat([keys, itself.expand(*keys.shape[:-1], -1)], dim=-1)
        return self._masks[key]

    def _band_masks(self, kind: str, copies: int) -> list[Tensor]:
        return self.copy_masks(
            self.bands.seen(kind, self.rules), self.bands.distance(kind) if copies == 2 else None, copies
        )

    def copy_masks(self, seen: Bool[Tensor, "*N Q K"], d: Int[Tensor, "*N Q K"] | None, copies: int) -> list[Tensor]:
        """Return fp32 additive masks [*N, 1, Q, K]: of the contextual copy and, of two, of h0's copy."""
        hidden = torch.zeros(seen.shape, device=seen.device).masked_fill(~seen, HIDDEN).unsqueeze(-3)
        if copies == 1:
            return [hidden]
        assert d is not None
        alpha = reset_weight(d, self.reset, self.rules.n).unsqueeze(-3)
        return [hidden + torch.log1p(-alpha), hidden + torch.log(alpha)]

    def position_bias(self, d: Int[Tensor, "*N Q K"], heads: int) -> Float[Tensor, "*N H Q K"]:
        """Return debias' -lambda * slope_h * g(d), in fp32: in bf16 far keys would vanish altogether."""
        steps = d.clamp(min=0).float().unsqueeze(-3)
        g = steps if self.debias.distance == "linear" else torch.log1p(steps)
        return -self.debias.strength * bias_slopes(heads, d.device)[:, None, None] * g


def register() -> None:
    """Make Transformers call this module; decoders are built with `attn_implementation=NAME`."""
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, lambda *_args, **_kwargs: None)


def choose_backend(wanted: str) -> Backend:
    """Say which backend computes, in one place.

    Args:
        wanted: `model.attention`: auto, dense or banded.
    """
    chosen: Backend = "dense" if wanted == "dense" else "banded"
    log.info("attention: %s (%s)", chosen, "as configured" if wanted == chosen else "linear in the row's length")
    return chosen


def reset_weight(d: Tensor, reset: ResetConfig, n: int) -> Float[Tensor, ...]:
    """Return alpha(d): 0 for the own interaction; then constant, or growing up to distance n."""
    if reset.mode == "constant":
        return torch.where(d >= 1, reset.alpha, 0.0)
    return reset.alpha * d.clamp(min=0, max=n).float() / n


def unrotate(x: Float[Tensor, "B H T D"], rotary: tuple[Tensor, Tensor]) -> Float[Tensor, "B H T D"]:
    """Apply the inverse of Transformers' rotary embedding: exact, since a rotation's inverse is its transpose."""
    cos, sin = (part.unsqueeze(1) for part in rotary)
    return x * cos - _rotate_half(x) * sin


def _rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = (part.unsqueeze(1) for part in rotary)
    return x * cos + _rotate_half(x) * sin


def _rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def _attention(
    module: SelfAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _mask: Tensor | None,  # always None: our rules are in the plan
    *,
    dti: AttentionPlan,
    scaling: float,
    dropout: float = 0.0,
    **_: object,
) -> tuple[Float[Tensor, "B T H D"], None]:
    """Answer one layer's queries; the signature is Transformers' attention interface.

    The last layer is handed [SUM] states alone, since nothing else is read from it; the keys of all other
    tokens are then made here.
    """
    groups = query.shape[1] // key.shape[1]
    last_states = dti.last_states if module.layer_idx == len(dti.layers) - 1 else None
    if last_states is not None:
        sums = key.shape[2]
        others = _project(module, dti, last_states[:, :-sums])
        key, value = (torch.cat([ahead, own], dim=2) for ahead, own in zip(others, (key, value), strict=True))
    copies = [(key, value)]
    if dti.is_dual and module.layer_idx > 0:  # in layer 0 both copies coincide
        copies.append(_project(module, dti, dti.embeddings))
    copies = [(k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)) for k, v in copies]
    attend = _dense if dti.backend == "dense" else _banded
    return attend(query, copies, dti, scaling, dropout).transpose(1, 2), None


def _project(module: SelfAttention, plan: AttentionPlan, states: Float[Tensor, "B I W"]) -> tuple[Tensor, Tensor]:
    """Return keys and values of the first I tokens, by the layer's own norm and projections."""
    norm = plan.layers[module.layer_idx].input_layernorm
    assert isinstance(norm, nn.Module)
    normed = norm(states)
    shape = (*normed.shape[:-1], -1, module.head_dim)
    key, value = module.k_proj(normed).view(shape), module.v_proj(normed).view(shape)
    if (k_norm := getattr(module, "k_norm", None)) is not None:
        key = k_norm(key)
    cos, sin = (part[:, : states.shape[1]] for part in plan.rotary)
    return _rotate(key.transpose(1, 2), (cos, sin)), value.transpose(1, 2)


def _dense(
    query: Tensor, copies: Sequence[Copy], plan: AttentionPlan, scaling: float, dropout: float
) -> Float[Tensor, "B H T D"]:
    """The reference: all T x T scores in fp32, once per copy, one softmax over the copies."""
    prefix, sums = plan.batch.prefix_size, plan.batch.prefix_size + plan.batch.prompt.shape[1]
    asked = query.shape[2]
    query = pad(query, (0, 0, plan.batch.tokens.shape[1] - asked, 0))  # the last layer asks for [SUM]s alone
    d = dense_distance(plan.batch)
    masks = plan.copy_masks(dense_mask(plan.batch, plan.rules), d, len(copies))
    flat_query = unrotate(query, plan.rotary).float()
    scores = []
    for (key, _), mask in zip(copies, masks, strict=True):
        flat = flat_query @ unrotate(key, plan.rotary).float().mT
        score = query.float() @ key.float().mT
        score[:, :, prefix:, :prefix] = flat[:, :, prefix:, :prefix]
        if plan.debias.rotary == "drop":
            score[:, :, sums:] = flat[:, :, sums:]
        score = score * scaling
        if plan.debias.strength > 0:
            score[:, :, sums:] += plan.position_bias(d, query.shape[1])[:, :, sums:]
        scores.append(score + mask)
    weights = torch.nn.functional.dropout(torch.cat(scores, dim=-1).softmax(-1), dropout)
    values = torch.cat([value for _, value in copies], dim=2)
    return (weights @ values.float()).to(query.dtype)[:, :, -asked:]


def _banded(
    query: Tensor, copies: Sequence[Copy], plan: AttentionPlan, scaling: float, dropout: float
) -> Float[Tensor, "B H T D"]:
    """Content queries and [SUM] queries each read the prefix and their block's band of keys."""
    keys = _BandedKeys(copies, plan)
    sums = plan.batch.after.shape[1]
    sum_out = _sum_queries(query[:, :, -sums:], keys, scaling, dropout)
    if query.shape[2] == sums:
        return sum_out
    prefix, content = query[:, :, :-sums].split(keys.sizes[:2], dim=2)
    prefix_out = sdpa(prefix, *keys.ahead, is_causal=True, scale=scaling)
    return torch.cat([prefix_out, _content_queries(content, keys, scaling, dropout), sum_out], dim=2)


class _BandedKeys:
    """The keys and values of one layer, cut as both kinds of queries need them."""

    def __init__(self, copies: Sequence[Copy], plan: AttentionPlan) -> None:
        batch, bands = plan.batch, plan.bands
        self.plan, self.bands = plan, bands
        self.sizes = [batch.prefix_size, batch.prompt.shape[1], batch.after.shape[1]]
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
    mask = keys.plan.content_mask(len(keys.content), query.dtype)
    out = _read(to_blocks(query, blocks), flat, [*keys.pinned, *keys.content], mask, scaling, dropout)
    return to_rows(out, len(query), query.shape[2])


def _sum_queries(query: Tensor, keys: _BandedKeys, scaling: float, dropout: float) -> Tensor:
    """[SUM] queries are few: scores and softmax in fp32, whatever the model's precision."""
    rotated, flat = (to_slots(x, keys.bands).float() for x in (query, unrotate(query, keys.turns[2])))
    answers = [part.float() for part in (*keys.pinned, *keys.for_sums())]
    mask = keys.plan.sum_mask(len(keys.content), query.shape[1])
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
