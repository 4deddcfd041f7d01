"""What all layers of one forward pass share, and what debias and reset add to scores.

Stage: attention. In: a `PackedBatch`, the rules, debias and reset. Out: an `AttentionPlan`, handed to every
layer through Transformers' keyword arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dti_ray.config import DebiasConfig, ResetConfig
from dti_ray.model.attention.past import Copy, Past, Read
from dti_ray.model.attention.rotary import Turn
from dti_ray.model.batch import PackedBatch
from dti_ray.model.masks import Rules, bias_slopes

HIDDEN = -1e30  # finite: a query that sees nothing of one part of its keys still has a log-sum-exp there


class Attend(Protocol):
    """A backend, made once for a batch."""

    def __call__(
        self, query: Tensor, copies: Sequence[Copy], scaling: float, dropout: float
    ) -> Float[Tensor, "B H T D"]:
        """Answer the queries of one layer, of all tokens or (last layer) of the [SUM]s alone.

        Args:
            query: [B, H, T or S, D], rotated.
            copies: rotated keys and values [B, KV heads, T, D]: contextual ones, and h0's if the layer has two.
            scaling: of the scores.
            dropout: of the weights (share).
        """
        ...


@dataclass(frozen=True)
class Visit:
    """A pass over rows whose first tokens were read before, and whose last texts keep to themselves.

    Attributes:
        past: of the first tokens, which the pass leaves out; with content it is of a single row.
        shared: for each row, how many content tokens are context; the candidates' texts follow.
        is_kept: whether keys and values stay with the plan, for later visits.
    """

    past: Past
    shared: Sequence[int]
    is_kept: bool = False


@dataclass
class AttentionPlan:
    """What all layers of one forward pass share; made once per batch.

    Attributes:
        batch: the rows.
        rules: the window.
        debias: bias and rotation of [SUM] scores.
        reset: mode and strength of the reset.
        layers: the decoder's layers, for the norm in front of keys that are made here.
        embeddings: h0 [B, T, width].
        attend: the backend.
        visit: what was read before; None where the pass reads whole rows and keeps nothing.
        is_pinned: whether the prefix is read unrotated, as if at distance 0, instead of at its place.
        layer: on a visit, number of the layer at hand.
        rotary: (cos, sin) [B, T, D] of the layer at hand; each layer sets its own before it attends.
        last_states: states in front of the last layer [B, T, width], once it is reached.
        read: on a visit that is kept, the keys and values of all tokens behind the prefix, layer by layer.
    """

    batch: PackedBatch
    rules: Rules
    debias: DebiasConfig
    reset: ResetConfig
    layers: nn.ModuleList
    embeddings: Tensor
    visit: Visit | None = None
    is_pinned: bool = True
    attend: Attend = field(init=False)
    layer: int = field(init=False)
    rotary: Turn = field(init=False)
    last_states: Tensor | None = None
    read: Read = field(default_factory=list)

    @property
    def is_dual(self) -> bool:
        """Whether queries of layers behind the first meet two copies of earlier interactions."""
        return self.reset.mode in ("distance", "constant") and self.reset.alpha > 0

    @property
    def is_asked(self) -> bool:
        """Whether any [SUM] is read out; a visit may only keep what it read."""
        return self.visit is None or not self.visit.is_kept or bool(self.batch.is_target.any())

    @property
    def known(self) -> int:
        """Tokens of each row that the pass leaves out, because they were read before."""
        return 0 if self.visit is None else self.visit.past.size

    @property
    def sizes(self) -> list[int]:
        """P, C and S: how a row is laid out."""
        return [self.batch.prefix_size, self.batch.prompt.shape[1], self.batch.after.shape[1]]

    def copy_masks(self, seen: Bool[Tensor, "*N Q K"], d: Int[Tensor, "*N Q K"] | None, copies: int) -> list[Tensor]:
        """Return fp32 additive masks [*N, 1, Q, K]: of the contextual copy and, of two, of h0's copy."""
        hidden = torch.zeros(seen.shape, device=seen.device).masked_fill(~seen, HIDDEN).unsqueeze(-3)
        if copies == 1:
            return [hidden]
        assert d is not None
        alpha = reset_weight(d, self.reset, self.rules.n).unsqueeze(-3)
        return [hidden + torch.log1p(-alpha).clamp(min=HIDDEN), hidden + torch.log(alpha).clamp(min=HIDDEN)]

    def position_bias(self, d: Int[Tensor, "*N Q K"], heads: int) -> Float[Tensor, "*N H Q K"]:
        """Return debias' -lambda * slope_h * g(d), in fp32: in bf16 far keys would vanish altogether."""
        g = bias_growth(d, self.debias).unsqueeze(-3)
        return -self.debias.strength * bias_slopes(heads, d.device)[:, None, None] * g


def bias_growth(d: Tensor, debias: DebiasConfig) -> Float[Tensor, ...]:
    """Return g(d) in fp32: d itself, or log(1 + d)."""
    steps = d.clamp(min=0).float()
    return steps if debias.distance == "linear" else torch.log1p(steps)


def reset_weight(d: Tensor, reset: ResetConfig, n: int) -> Float[Tensor, ...]:
    """Return alpha(d): 0 for the own interaction; then constant, or growing up to distance n."""
    if reset.mode == "constant":
        return torch.where(d >= 1, reset.alpha, 0.0)
    return reset.alpha * d.clamp(min=0, max=n).float() / n


def for_all_heads(copies: Sequence[Copy], heads: int) -> list[Copy]:
    """Repeat the keys and values of grouped-query attention, so that every query head has its own."""
    groups = heads // copies[0][0].shape[1]
    if groups == 1:
        return list(copies)
    return [(key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)) for key, value in copies]
