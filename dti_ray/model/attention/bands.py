"""The geometry of banded attention: which block of queries meets which band of keys.

Stage: attention. In: a `PackedBatch` and the rules. Out: `Bands`, index tensors and the rules' answers per
block; and the three moves between rows and blocks.
Invariant: a band holds every key that a query of its block may see. Content is cut into blocks of BLOCK
queries; a [SUM] belongs to the block of the token that it stands behind.

    block of queries   0    1    2    3        back = 1: block 2 meets the keys of blocks 1 and 2
    band of keys      -0   01   12   23        (- is padding, which nothing real sees)
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

BLOCK = 64


@dataclass(frozen=True)
class Bands:
    """Blocks of all rows, and what the rules say of them.

    Axes: B rows, M blocks of a row, N = B x M, Q = BLOCK queries, K = (back + 1) x BLOCK keys, G slots for
    the [SUM]s of a block.

    Attributes:
        blocks: M.
        back: key blocks in front of the query block.
        slots: for each slot the [SUM] in it (0 where empty).
        home: for each [SUM] its slot (0 where it is padding).
        keys: coordinates of the keys of each band, [N, 1, K].
        queries: coordinates of `content` queries [N, Q, 1] and of `sum` queries [N, G, 1].
    """

    blocks: int
    back: int
    slots: Int[Tensor, "B MG"]
    home: Int[Tensor, "B S"]
    keys: Coordinates
    queries: dict[str, Coordinates]

    def seen(self, kind: str, rules: Rules) -> Bool[Tensor, "N Q K"]:
        """Say which keys of its band each query may see."""
        return visible(self.queries[kind], self.keys, rules)

    def distance(self, kind: str) -> Int[Tensor, "N Q K"]:
        """Return d in interactions, where the query sees the key."""
        return distance(self.queries[kind], self.keys)


def lay_bands(batch: PackedBatch, rules: Rules) -> Bands:
    """Lay the bands of a batch; it asks the device for two sizes."""
    content, sums = content_coordinates(batch), sum_coordinates(batch)
    blocks = -(-batch.prompt.shape[1] // BLOCK)
    back = min(_blocks_back(content, rules), blocks - 1)
    slots, home = _slots(batch, blocks)
    return Bands(
        blocks,
        back,
        slots,
        home,
        keys=content.map(lambda x: to_bands(x[:, None, :, None], blocks, back)[:, 0, :, 0].unsqueeze(1)),
        queries={
            "content": content.map(lambda x: to_blocks(x[:, None, :, None], blocks)[:, 0]),
            "sum": sums.map(lambda x: x.gather(1, slots).view(len(x) * blocks, -1, 1)),
        },
    )


def to_blocks(x: Shaped[Tensor, "B H C D"], blocks: int) -> Shaped[Tensor, "N H Q D"]:
    """Cut rows into blocks of queries, padded at the end."""
    rows, heads, size, width = x.shape
    padded = pad(x, (0, 0, 0, blocks * BLOCK - size))
    return padded.view(rows, heads, blocks, BLOCK, width).transpose(1, 2).flatten(0, 1)


def to_bands(x: Shaped[Tensor, "B H C D"], blocks: int, back: int) -> Shaped[Tensor, "N H K D"]:
    """Give each block of queries its band of keys: `back` blocks and its own."""
    padded = pad(x, (0, 0, back * BLOCK, blocks * BLOCK - x.shape[2]))
    return _Overlap.apply(padded, blocks, back)


class _Overlap(torch.autograd.Function):
    """Copy each key block into the bands that hold it; the gradient adds them up in one buffer.

    Autograd's own slices would each fill and add a buffer of full size.
    """

    @staticmethod
    def forward(ctx: Any, padded: Tensor, blocks: int, back: int) -> Tensor:
        ctx.blocks, ctx.back, ctx.shape = blocks, back, padded.shape
        cut = padded.unflatten(2, (back + blocks, BLOCK)).transpose(1, 2)
        return torch.cat([cut[:, i : i + blocks] for i in range(back + 1)], dim=3).flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        rows, heads, _, width = ctx.shape
        parts = gradient.unflatten(0, (rows, ctx.blocks)).unflatten(3, (ctx.back + 1, BLOCK))
        total = gradient.new_zeros(rows, ctx.back + ctx.blocks, heads, BLOCK, width)
        for i in range(ctx.back + 1):
            total[:, i : i + ctx.blocks] += parts[:, :, :, i]
        return total.transpose(1, 2).reshape(ctx.shape), None, None


def to_rows(x: Shaped[Tensor, "N H Q D"], rows: int, size: int) -> Shaped[Tensor, "B H C D"]:
    """Lay blocks side by side again; the inverse of `to_blocks`."""
    return x.unflatten(0, (rows, -1)).transpose(1, 2).flatten(2, 3)[:, :, :size]


def to_slots(x: Shaped[Tensor, "B H S D"], bands: Bands) -> Shaped[Tensor, "N H G D"]:
    """Bring each [SUM] to its block."""
    gathered = _take(x, bands.slots).unflatten(2, (bands.blocks, -1))
    return gathered.transpose(1, 2).flatten(0, 1)


def from_slots(x: Shaped[Tensor, "N H G D"], bands: Bands) -> Shaped[Tensor, "B H S D"]:
    """Bring each [SUM] back to its place in the row; the inverse of `to_slots`."""
    rows = len(bands.home)
    return _take(to_rows(x, rows, bands.slots.shape[1]), bands.home)


def _take(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


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


def _slots(batch: PackedBatch, blocks: int) -> tuple[Int[Tensor, "B MG"], Int[Tensor, "B S"]]:
    """Give each [SUM] a slot in its block; every block has as many slots as the fullest one needs."""
    block = batch.after // BLOCK
    count = torch.zeros(len(block), blocks, dtype=torch.long, device=block.device)
    count.scatter_add_(1, block, batch.is_target.long())
    number = torch.arange(block.shape[1], device=block.device).expand_as(block)
    rank = number - (count.cumsum(1) - count).gather(1, block)
    size = max(1, int(count.max()))
    home = block * size + rank
    spare = blocks * size  # where padding goes
    slots = torch.zeros(len(block), spare + 1, dtype=torch.long, device=block.device)
    slots.scatter_(1, torch.where(batch.is_target, home, spare), number)
    return slots[:, :spare], torch.where(batch.is_target, home, 0)
