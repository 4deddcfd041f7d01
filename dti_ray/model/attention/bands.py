"""The geometry of banded attention: which block of queries meets which band of keys.

Stage: attention. In: a `PackedBatch` and the rules. Out: `Bands`, index tensors and coordinates per block; and
the moves between rows and blocks.
Invariant: a band holds every key that a query of its block may see. Rows lie one after another, content cut
into blocks of BLOCK queries; a [SUM] belongs to the block of the token that it stands behind.

    block of queries   0    1    2    3        back = 1: block 2 meets the keys of blocks 1 and 2
    band of keys      -0   01   12   23        (- is padding, which nothing real sees)

Bands overlap, so they are views of one buffer of keys: nothing is copied for them, and their gradients are
added up there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor
from torch.nn.functional import pad

from dti_ray.config import Window
from dti_ray.model.batch import PackedBatch
from dti_ray.model.masks import (
    Coordinates,
    Rules,
    content_coordinates,
    distance,
    sum_coordinates,
    visible,
)

BLOCK = 32


@dataclass(frozen=True)
class Bands:
    """Blocks of all rows, and where their tokens stand.

    Axes: B rows, M blocks of a row, N = B x M, Q = BLOCK queries, K = (back + 1) x BLOCK keys, G slots for
    the [SUM]s of a block.

    Attributes:
        blocks: M.
        back: key blocks in front of the query block.
        slots: for each slot the [SUM] in it, as an index into all [SUM]s of the batch (0 where empty).
        home: for each [SUM] its slot, as an index into all slots (0 where it is padding).
        is_full: which slots hold a [SUM].
        is_target: which [SUM]s are real.
        keys: coordinates of the keys of each band, [N, 1, K].
        queries: coordinates of `content` queries [N, Q, 1] and of `sum` queries [N, G, 1].
    """

    blocks: int
    back: int
    slots: Int[Tensor, "N G"]
    home: Int[Tensor, "B S"]
    is_full: Bool[Tensor, "N G"]
    is_target: Bool[Tensor, "B S"]
    keys: Coordinates
    queries: dict[str, Coordinates]

    def seen(self, kind: str, rules: Rules) -> Bool[Tensor, "N Q K"]:
        """Say which keys of its band each query may see."""
        return visible(self.queries[kind], self.keys, rules)

    def distance(self, kind: str) -> Int[Tensor, "N Q K"]:
        """Return d in interactions, where the query sees the key."""
        return distance(self.queries[kind], self.keys)


def lay_bands(batch: PackedBatch, rules: Rules) -> Bands:
    """Lay the bands of a batch."""
    content, sums = content_coordinates(batch), sum_coordinates(batch)
    blocks = -(-batch.prompt.shape[1] // BLOCK)
    back = min(_blocks_back(content, rules), blocks - 1)
    slots, home, is_full = _slots(batch, blocks)
    content, sums = (_apart(part).map(lambda x: x.to(torch.int32)) for part in (content, sums))
    return Bands(
        blocks, back, slots, home, is_full, batch.is_target,
        keys=content.map(lambda x: to_bands(x[:, None, :, None], blocks, back)[:, 0, :, 0].unsqueeze(1)),
        queries={
            "content": content.map(lambda x: to_blocks(x[:, None, :, None], blocks)[:, 0]),
            "sum": sums.map(lambda x: x.flatten()[slots].unsqueeze(-1)),
        },
    )  # fmt: skip


def to_blocks(x: Shaped[Tensor, "B H C D"], blocks: int) -> Shaped[Tensor, "N H Q D"]:
    """Cut rows into blocks of queries, padded at the end."""
    tokens = pad(x.transpose(1, 2), (0, 0, 0, 0, 0, blocks * BLOCK - x.shape[2]))
    return tokens.reshape(-1, BLOCK, *tokens.shape[2:]).transpose(1, 2)


def to_rows(x: Shaped[Tensor, "N H Q D"], rows: int, size: int) -> Shaped[Tensor, "B H C D"]:
    """Lay blocks side by side again; the inverse of `to_blocks`."""
    tokens = x.transpose(1, 2)
    return tokens.reshape(rows, -1, *tokens.shape[2:])[:, :size].transpose(1, 2)


def to_bands(x: Shaped[Tensor, "B H C D"], blocks: int, back: int) -> Shaped[Tensor, "N H K D"]:
    """Give each block of queries its band of keys, `back` blocks and its own: a view of one buffer."""
    return _Overlap.apply(x, blocks, back)


class _Overlap(torch.autograd.Function):
    """Overlapping windows of a buffer; the gradient adds them up in one buffer of the same kind."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, blocks: int, back: int) -> Tensor:
        rows, heads, size, width = x.shape
        ctx.blocks, ctx.back, ctx.size = blocks, back, size
        buffer = x.new_empty(back + rows * blocks, BLOCK, heads, width)
        buffer[:back] = 0
        tokens = buffer[back:].view(rows, blocks * BLOCK, heads, width)
        tokens[:, :size], tokens[:, size:] = x.transpose(1, 2), 0
        token = heads * width
        return buffer.as_strided((rows * blocks, heads, (back + 1) * BLOCK, width), (BLOCK * token, width, token, 1))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        bands = gradients[0].transpose(1, 2)
        count, _, heads, width = bands.shape
        total = bands.new_empty(ctx.back + count, BLOCK, heads, width)
        total[: ctx.back], total[ctx.back :] = 0, bands[:, ctx.back * BLOCK :]
        for i in range(ctx.back):
            total[i : i + count] += bands[:, i * BLOCK : (i + 1) * BLOCK]
        rows = total[ctx.back :].view(-1, ctx.blocks * BLOCK, heads, width)
        return rows[:, : ctx.size].transpose(1, 2), None, None


def to_slots(x: Shaped[Tensor, "B H S D"], bands: Bands) -> Shaped[Tensor, "N H G D"]:
    """Bring each [SUM] to its block."""
    return _Move.apply(x, bands.slots, bands.home, bands.is_target)


def from_slots(x: Shaped[Tensor, "N H G D"], bands: Bands) -> Shaped[Tensor, "B H S D"]:
    """Bring each [SUM] back to its place in the row; the inverse of `to_slots`."""
    return _Move.apply(x, bands.home, bands.slots, bands.is_full)


class _Move(torch.autograd.Function):
    """Move whole tokens to places that are known in both directions, so that neither pass has to scatter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor, target: Tensor, is_real: Tensor) -> Tensor:
        ctx.save_for_backward(target, is_real)
        return _pick(x, source)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        target, is_real = ctx.saved_tensors
        return _pick(gradients[0], target) * is_real[:, None, :, None], None, None, None


def _pick(x: Shaped[Tensor, "A H I D"], index: Int[Tensor, "B J"]) -> Shaped[Tensor, "B H J D"]:
    tokens = x.transpose(1, 2).flatten(0, 1)
    return tokens.index_select(0, index.flatten()).unflatten(0, index.shape).transpose(1, 2)


def _apart(coordinates: Coordinates) -> Coordinates:
    """Number the prompts of all rows in one sequence, since rows lie one after another; padding stays 0."""
    prompt = coordinates.prompt
    row = torch.arange(len(prompt), device=prompt.device).unsqueeze(1) * (prompt.max() + 1)
    return Coordinates(
        torch.where(prompt > 0, prompt + row, 0),
        coordinates.interaction, coordinates.cut, coordinates.position, coordinates.order,
    )  # fmt: skip


def _blocks_back(content: Coordinates, rules: Rules) -> int:
    """Return how many key blocks lie in front of a query block at most."""
    back = content.order - _first_key(content, rules)
    back = torch.where(content.prompt > 0, back - content.order % BLOCK, 0)
    return max(0, -(-int(back.max()) // BLOCK))


def _first_key(content: Coordinates, rules: Rules) -> Int[Tensor, "B C"]:
    """Return, for each content token, an index at or before the first key that it may see.

    Prompts follow each other, and within a prompt interactions and the running maximum of positions never
    fall, so the first key is found by bisection in one increasing code.
    """
    if rules.window is Window.OFF:
        inner, reach = torch.zeros_like(content.order), torch.zeros_like(content.order)
    elif rules.window is Window.INTERACTIONS:
        inner, reach = content.interaction, content.cut - rules.n
    else:
        base = content.prompt * (int(content.position.max()) + 1)
        inner = (base + content.position).cummax(dim=1).values - base
        reach = content.position - rules.window_tokens + 1
    stride = int(inner.max()) + 2
    last = int(content.prompt.max()) + 1
    prompt = torch.where(content.prompt > 0, content.prompt, last)  # padding stands behind everything
    code = prompt * stride + inner
    wanted = prompt * stride + reach.clamp(min=0)
    return torch.searchsorted(code.contiguous(), wanted.contiguous()).minimum(content.order)


def _slots(batch: PackedBatch, blocks: int) -> tuple[Int[Tensor, "N G"], Int[Tensor, "B S"], Bool[Tensor, "N G"]]:
    """Give each [SUM] a slot in its block; every block has as many slots as the fullest one needs."""
    rows, sums = batch.after.shape
    row = torch.arange(rows, device=batch.after.device).unsqueeze(1)
    block = batch.after // BLOCK + row * blocks
    count = torch.zeros(rows * blocks, dtype=torch.long, device=block.device)
    count.scatter_add_(0, block.flatten(), batch.is_target.long().flatten())
    number = torch.arange(sums, device=block.device)
    before = (count.view(rows, blocks).cumsum(1) - count.view(rows, blocks)).flatten()
    size = max(1, int(count.max()))
    home = torch.where(batch.is_target, block * size + number - before[block], 0)
    spare = len(count) * size  # where padding goes
    slots = torch.full([spare + 1], -1, dtype=torch.long, device=block.device)
    slots[torch.where(batch.is_target, home, spare)] = number + row * sums
    slots = slots[:spare].view(-1, size)
    return slots.clamp(min=0), home, slots >= 0
