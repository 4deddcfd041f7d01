"""Rows become tensors with named shapes.

Stage: batch. In: `PackedRow`s and the shared prefix. Out: a `PackedBatch`.
Invariant: every row is laid out as [prefix | content | SUM], so that whoever computes attention takes
slices; padding has prompt 0, which no real token has.

Axes: B rows, P prefix tokens, C content tokens, S [SUM] tokens, T = P + C + S.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dti_ray.data.packing import PackedRow, end_to_end
from dti_ray.data.prompts import SUM, TokenTable


@dataclass(frozen=True)
class PackedBatch:
    """Some rows as tensors.

    Attributes:
        tokens: ids; from `TokenTable.vocabulary` on they are markers.
        positions: rotary positions; [SUM] has the one behind its text, the prefix ends in front of each prompt, at -1.
        prompt: prompt of each content token, from 1; 0 is padding.
        interaction: interaction of each content token.
        cut: first interaction that a content token may not see, its own apart.
        after: for each [SUM], the index of the content token that it stands behind.
        is_target: which [SUM] slots are real.
        labels: feedback of each [SUM] slot, 0 where there is no target.
    """

    tokens: Int[Tensor, "B T"]
    positions: Int[Tensor, "B T"]
    prompt: Int[Tensor, "B C"]
    interaction: Int[Tensor, "B C"]
    cut: Int[Tensor, "B C"]
    after: Int[Tensor, "B S"]
    is_target: Bool[Tensor, "B S"]
    labels: Float[Tensor, "B S"]

    @property
    def prefix_size(self) -> int:
        """P, tokens of the shared prefix."""
        return self.tokens.shape[1] - self.prompt.shape[1] - self.after.shape[1]

    @property
    def size_tokens(self) -> int:
        """Tokens of the batch, padding left out; made on the CPU, where asking costs nothing."""
        rows, prefix = len(self.tokens), self.prefix_size
        return rows * prefix + int((self.prompt > 0).sum()) + int(self.is_target.sum())

    def to(self, device: torch.device | str) -> PackedBatch:
        """Move all tensors."""
        moved = {field.name: getattr(self, field.name).to(device, non_blocking=True) for field in fields(self)}
        return PackedBatch(**moved)


def collate_pass(rows: Sequence[PackedRow], table: TokenTable, attention: str) -> PackedBatch:
    """Lay the rows of one pass end to end, so that nothing is padded; T x T attention keeps them apart.

    Args:
        rows: of the pass, at least one.
        table: gives the prefix and the marker ids.
        attention: `model.attention`.
    """
    return collate(rows if attention == "dense" else [end_to_end(rows)], table)


def collate(rows: Sequence[PackedRow], table: TokenTable) -> PackedBatch:
    """Pad some rows to the longest of them.

    Args:
        rows: at least one; rows without targets are allowed.
        table: gives the prefix and the marker ids.
    """
    content = max(1, *(len(row.tokens) for row in rows))
    sums = max(1, *(row.targets for row in rows))

    def padded(name: str, size: int) -> np.ndarray:
        out = np.zeros((len(rows), size), dtype=np.int64)
        for i, row in enumerate(rows):
            values = getattr(row, name)
            out[i, : len(values)] = values
        return out

    after = padded("after", sums)
    positions = padded("positions", content)
    prefix = np.tile(table.prefix.astype(np.int64), (len(rows), 1))
    prefix_positions = np.tile(np.arange(-prefix.shape[1], 0), (len(rows), 1))
    sum_tokens = np.full_like(after, table.vocabulary + SUM)
    sum_positions = np.take_along_axis(positions, after, axis=1) + 1
    is_target = np.arange(sums) < np.array([[row.targets] for row in rows])
    return PackedBatch(
        tokens=torch.from_numpy(np.concatenate([prefix, padded("tokens", content), sum_tokens], axis=1)),
        positions=torch.from_numpy(np.concatenate([prefix_positions, positions, sum_positions], axis=1)),
        prompt=torch.from_numpy(padded("prompt", content)),
        interaction=torch.from_numpy(padded("interaction", content)),
        cut=torch.from_numpy(padded("cut", content)),
        after=torch.from_numpy(after),
        is_target=torch.from_numpy(is_target),
        labels=torch.from_numpy(padded("labels", sums)).float(),
    )
