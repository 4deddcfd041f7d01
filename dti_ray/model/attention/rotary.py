"""Transformers' rotary embedding and its inverse.

Stage: attention. In: queries or keys, and the angles of their positions. Out: the same, turned.
Invariant: the inverse is exact, since a rotation's inverse is its transpose.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

Turn = tuple[Tensor, Tensor]  # (cos, sin) [B, T, D]


def rotate(x: Float[Tensor, "B H T D"], rotary: Turn) -> Float[Tensor, "B H T D"]:
    """Apply Transformers' rotary embedding."""
    cos, sin = (part.unsqueeze(1) for part in rotary)
    return x * cos + _rotate_half(x) * sin


def unrotate(x: Float[Tensor, "B H T D"], rotary: Turn) -> Float[Tensor, "B H T D"]:
    """Apply its inverse."""
    cos, sin = (part.unsqueeze(1) for part in rotary)
    return x * cos - _rotate_half(x) * sin


def turn_of(tokens: slice, turn: Turn) -> Turn:
    """Return the angles of some tokens."""
    cos, sin = turn
    return cos[:, tokens], sin[:, tokens]


def _rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)
