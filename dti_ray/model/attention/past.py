"""What was read before and need not be read again: keys and values of every layer.

Stage: attention. In: what one pass read of a row's first tokens. Out: a `Past`, which stands for them in later passes.
Invariant: the oldest interactions may go and the others keep their distances. Their keys stay turned as they were read,
so a later pass counts its positions from `offset` on; before that grows so large that angles lose digits, all keys are
turned back by it and positions restart at 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dti_ray.model.attention.rotary import Turn, turn_of, unrotate

Copy = tuple[Tensor, Tensor]  # keys and values [B, KV heads, T, D]
RESTART = 1024  # positions
Read = list[tuple[Sequence[Copy], Turn]]  # of one pass, layer by layer: rotated copies, and the angles of whole rows


@dataclass(frozen=True)
class Past:
    """Keys and values of the first tokens of one row, layer by layer.

    Attributes:
        prefix: of the shared prefix, its keys unrotated; empty where there is none.
        content: of the first content tokens: contextual ones, and h0's in a layer that has two copies; empty where no
            content was read.
        offset: position at which the row begins.
    """

    prefix: tuple[Copy, ...] = ()
    content: tuple[tuple[Copy, ...], ...] = ()
    offset: int = 0

    @classmethod
    def of_prefix(cls, read: Read, tokens: int) -> Past:
        """Return what a pass leaves of the prefix, the first tokens of its row."""
        if not tokens:
            return cls()
        first = slice(tokens)
        return cls(prefix=tuple(_turn_back(part_of(first, copies[0]), turn_of(first, turn)) for copies, turn in read))

    @property
    def prefix_size(self) -> int:
        """Tokens of the prefix."""
        return self.prefix[0][0].shape[2] if self.prefix else 0

    @property
    def content_size(self) -> int:
        """Content tokens read."""
        return self.content[0][0][0].shape[2] if self.content else 0

    @property
    def size(self) -> int:
        """Tokens read."""
        return self.prefix_size + self.content_size

    @property
    def size_bytes(self) -> int:
        """Bytes of the content's keys and values; the prefix is shared."""
        return sum(x.nbytes for copies in self.content for copy in copies for x in copy)

    def ahead_of(self, copies: Sequence[Copy], layer: int) -> Sequence[Copy]:
        """Lay the content of one layer ahead of what a pass computes there."""
        if not self.content:
            return copies
        pairs = zip(self.content[layer], copies, strict=True)
        return [(torch.cat([old[0], new[0]], dim=2), torch.cat([old[1], new[1]], dim=2)) for old, new in pairs]

    def after(self, read: Read, tokens: int) -> Past:
        """Return the same with the first content tokens, known ones included, of the row that a pass read."""
        first = slice(self.prefix_size, self.prefix_size + 1)
        content, is_far = [], self.offset >= RESTART
        for copies, turn in read:
            parts = [part_of(slice(tokens), copy) for copy in copies]
            content.append(tuple(_turn_back(part, turn_of(first, turn)) if is_far else part for part in parts))
        return replace(self, content=tuple(content), offset=0 if is_far else self.offset)

    def without(self, tokens: int, positions: int) -> Past:
        """Return the same without the oldest content tokens, behind which the row begins so many positions later."""
        if tokens == self.content_size:
            return replace(self, content=(), offset=0)
        content = tuple(tuple(part_of(slice(tokens, None), copy) for copy in copies) for copies in self.content)
        return replace(self, content=content, offset=self.offset + positions)


def part_of(tokens: slice, copy: Copy) -> Copy:
    """Return keys and values of some tokens."""
    key, value = copy
    return key[:, :, tokens], value[:, :, tokens]


def _turn_back(copy: Copy, turn: Turn) -> Copy:
    """Turn keys back: all by one token's angles, or each by its own."""
    key, value = copy
    return unrotate(key, turn), value
