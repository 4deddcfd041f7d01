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
from typing import Literal

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

log = logging.getLogger(__name__)


@dataclass
class AttentionPlan:
    """What all layers of one forward pass share; made once per batch.

    Attributes:
        batch: the rows.
        rules: the window.
        debias: bias and rotation of [SUM] scores.
        reset: mode and strength of the reset.
        backend: which path computes.
        rotary: (cos, sin) [B, T, D] of the layer at hand; each layer sets its own before it attends.
        embeddings: h0 [B, T, width]; set by the backbone where a reset needs it.
        layers: the decoder's layers, for the norm in front of h0's keys.
    """

    batch: PackedBatch
    rules: Rules
    debias: DebiasConfig
    reset: ResetConfig
    backend: Backend
    rotary: tuple[Tensor, Tensor] | None = None
    embeddings: Tensor | None = None
    layers: nn.ModuleList | None = None
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
            at = self.bands
            parts = self.copy_masks(at.content_seen, at.content_distance, copies)
            self._masks[key] = pad(torch.cat(parts, dim=-1), (self.batch.prefix_size, 0)).to(dtype)
        return self._masks[key]

    def sum_mask(self, copies: int, heads: int) -> Float[Tensor, "N heads G keys"]:
        """Return the additive mask of [SUM] queries on [prefix | copies of the band | each itself], made once."""
        key = ("sum", copies, torch.float32)
        if key not in self._masks:
            at = self.bands
            parts = self.copy_masks(at.sum_seen, at.sum_distance, copies)
            if self.debias.strength > 0:
                bias = self.position_bias(at.sum_distance, heads)
                parts = [part + bias for part in parts]
            itself = torch.full([at.sum_seen.shape[1]] * 2, HIDDEN, device=at.home.device).fill_diagonal_(0.0)
            keys = pad(torch.cat(parts, dim=-1), (self.batch.prefix_size, 0))
            self._masks[key] = torch.cat([keys, itself.expand(*keys.shape[:-1], -1)], dim=-1)
        return self._masks[key]

    def copy_masks(self, seen: Bool[Tensor, "*N Q K"], d: Int[Tensor, "*N Q K"], copies: int) -> list[Tensor]:
        """Return fp32 additive masks [*N, 1, Q, K]: of the contextual copy and, of two, of h0's copy."""
        hidden = torch.zeros(seen.shape, device=seen.device).masked_fill(~seen, HIDDEN).unsqueeze(-3)
        if copies == 1:
            return [hidden]
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
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # always None: our rules are in the plan
    *,
    dti: AttentionPlan,
    scaling: float,
    dropout: float = 0.0,
    **_: object,
) -> tuple[Float[Tensor, "B T H D"], None]:
    """Answer one layer's queries; the signature is Transformers' attention interface."""
    groups = query.shape[1] // key.shape[1]
    copies = [(key, value)]
    if dti.is_dual and module.layer_idx > 0:  # in layer 0 both copies coincide
        copies.append(_embedding_copy(module, dti))
    copies = [(k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)) for k, v in copies]
    attend = _dense if dti.backend == "dense" else _banded
    return attend(query, copies, dti, scaling, dropout).transpose(1, 2), None


def _embedding_copy(module: nn.Module, plan: AttentionPlan) -> tuple[Tensor, Tensor]:
    """Return keys and values that the layer computes from h0, by its own norm and projections."""
    assert plan.layers is not None
    assert plan.embeddings is not None
    assert plan.rotary is not None
    states = plan.layers[module.layer_idx].input_layernorm(plan.embeddings)
    shape = (*states.shape[:-1], -1, module.head_dim)
    key, value = module.k_proj(states).view(shape), module.v_proj(states).view(shape)
    if hasattr(module, "k_norm"):
        key = module.k_norm(key)
    return _rotate(key.transpose(1, 2), plan.rotary), value.transpose(1, 2)


def _dense(
    query: Tensor,
    copies: Sequence[tuple[Tensor, Tensor]],
    plan: AttentionPlan,
    scaling: float,
    dropout: float,
) -> Float[Tensor, "B H T D"]:
    """The reference: all T x T scores in fp32, once per copy, one softmax over the copies."""
    assert plan.rotary is not None
    prefix, sums = plan.batch.prefix_size, plan.batch.prefix_size + plan.batch.prompt.shape[1]
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
    return (weights @ values.float()).to(query.dtype)


@dataclass(frozen=True)
class _Keys:
    """Keys and values [N, H, K, D] of blocks; `is_flat` keys are met by unrotated queries."""

    key: Tensor
    value: Tensor
    is_flat: bool

    def float(self) -> _Keys:
        return _Keys(self.key.float(), self.value.float(), self.is_flat)


def _banded(
    query: Tensor,
    copies: Sequence[tuple[Tensor, Tensor]],
    plan: AttentionPlan,
    scaling: float,
    dropout: float,
) -> Float[Tensor, "B H T D"]:
    """Content queries and [SUM] queries each read the prefix and their block's band of keys."""
    assert plan.rotary is not None
    batch, bands = plan.batch, plan.bands
    sizes = [batch.prefix_size, batch.prompt.shape[1], batch.after.shape[1]]
    turn = list(zip(*(part.split(sizes, dim=1) for part in plan.rotary), strict=True))
    prefix_query, content_query, sum_query = query.split(sizes, dim=2)
    (prefix_key, content_key, sum_key), (prefix_value, _, sum_value) = (x.split(sizes, dim=2) for x in copies[0])

    def band(x: Tensor) -> Tensor:
        return to_bands(x, bands.blocks, bands.back)

    def slot(x: Tensor) -> Tensor:
        return to_slots(x, bands)

    contents = [[x.split(sizes, dim=2)[1] for x in copy] for copy in copies]
    content_keys = [_Keys(band(key), band(value), is_flat=False) for key, value in contents]
    pinned, flat_content, flat_sum = [], None, unrotate(sum_query, turn[2])
    if sizes[0]:
        ahead = (unrotate(prefix_key, turn[0]), prefix_value)
        pinned = [_Keys(*(x.repeat_interleave(bands.blocks, 0) for x in ahead), is_flat=True)]
        flat_content = to_blocks(unrotate(content_query, turn[1]), bands.blocks)
    content_out = _read(
        to_blocks(content_query, bands.blocks), flat_content, [*pinned, *content_keys],
        plan.content_mask(len(copies), query.dtype), scaling, dropout,
    )  # fmt: skip

    itself = _Keys(slot(sum_key), slot(sum_value), is_flat=False)
    if plan.debias.rotary == "drop":
        content_keys = [_Keys(band(unrotate(key, turn[1])), band(value), is_flat=True) for key, value in contents]
        itself = _Keys(slot(unrotate(sum_key, turn[2])), itself.value, is_flat=True)
    sum_out = _read(
        slot(sum_query).float(), slot(flat_sum).float(),
        [keys.float() for keys in (*pinned, *content_keys, itself)],
        plan.sum_mask(len(copies), query.shape[1]), scaling, dropout,
    ).to(query.dtype)  # fmt: skip
    prefix_out = sdpa(prefix_query, prefix_key, prefix_value, is_causal=True, scale=scaling)
    return torch.cat([prefix_out, to_rows(content_out, len(query), sizes[1]), from_slots(sum_out, bands)], dim=2)


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
    value = torch.cat([part.value for part in keys], dim=2)
    if kinds == {False}:
        key = torch.cat([part.key for part in keys], dim=2)
    else:
        assert flat_query is not None
    if kinds == {True}:
        query, key = flat_query, torch.cat([part.key for part in keys], dim=2)
    elif len(kinds) == 2:
        query = torch.cat([query, flat_query], dim=-1)
        sides = [pad(part.key, (width, 0) if part.is_flat else (0, width)) for part in keys]
        key, value = torch.cat(sides, dim=2), pad(value, (0, width))  # fused kernels want one width
    return sdpa(query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling)[..., :width]
