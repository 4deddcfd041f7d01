"""One layer's attention, forward and backward, on a row of a given length: a backend against the dense mask.

Stage: bench. In: a row length and the model's heads. Out: seconds and ratios.
The row holds prompts of n context and k target interactions, as a click log gives them. `dense` is what one
writes first: PyTorch's fused attention under a T x T mask (not our readable reference, which is slower still).
Masks are made once per batch and serve all layers, so making them is not timed, for neither side.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as sdpa

from dti_ray.bench.timing import interleave
from dti_ray.config import RunConfig
from dti_ray.data.interactions import TRAIN, UserSequences
from dti_ray.data.packing import pack, pack_spec
from dti_ray.data.prompts import TokenTable
from dti_ray.model.attention import AttentionPlan, make_plan
from dti_ray.model.attention.dispatch import Backend
from dti_ray.model.batch import PackedBatch, collate
from dti_ray.model.masks import Rules, dense_mask

ITEMS = 1000


@dataclass(frozen=True)
class AttentionBench:
    """Medians of forward + backward.

    Attributes:
        row_tokens: T of the row.
        seconds: per case.
        speedup: per backend, the dense mask's time over its own.
    """

    row_tokens: int
    seconds: dict[str, float]
    speedup: dict[str, float]


def bench_attention(
    config: RunConfig, row_tokens: int, backends: list[Backend], repeats: int, device: torch.device
) -> AttentionBench:
    """Time the attention of one content layer in turns.

    Args:
        config: heads, rules, debias and precision; the rest is not used.
        row_tokens: length of the row, [SUM]s included.
        backends: to compare with a dense mask.
        repeats: repetitions.
        device: where to run.
    """
    batch = one_row(config, row_tokens).to(device)
    heads, width = config.model.heads, config.model.hidden_size // config.model.heads
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    shape = (1, heads, batch.tokens.shape[1], width)
    tensors = [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3)]
    angles = torch.zeros(1, shape[2], width, device=device, dtype=dtype)
    rotary = (angles.cos(), angles.sin())

    def through(backend: Backend) -> Callable[[], None]:
        plan = _plan(config, batch, backend)
        plan.rotary = rotary
        return lambda: _backward(plan.attend(tensors[0], [(tensors[1], tensors[2])], width**-0.5, 0.0), tensors)

    mask = dense_mask(batch, Rules.of(config.packing)).unsqueeze(1)
    dense = [lambda: _backward(sdpa(*tensors, attn_mask=mask), tensors)]
    cases = {"dense": dense, **{backend: [through(backend)] for backend in backends}}
    seconds = {name: timing.seconds for name, timing in interleave(cases, repeats, device).items()}
    return AttentionBench(shape[2], seconds, {name: seconds["dense"] / seconds[name] for name in backends})


def one_row(config: RunConfig, row_tokens: int) -> PackedBatch:
    """Return a row of about so many tokens: users of a random log with items of two tokens."""
    rng = np.random.default_rng(config.train.seed)
    users = -(-row_tokens // 100) + 1
    lengths = np.full(users, 100)
    size = int(lengths.sum())
    sequences = UserSequences(
        user_ids=np.arange(users).astype(str),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        items=rng.integers(0, ITEMS, size).astype(np.int32),
        labels=rng.integers(0, 2, size).astype(np.int8),
        times=np.tile(np.arange(100), users),
        splits=np.full(size, TRAIN, dtype=np.int8),
    )
    table = TokenTable(
        tokens=rng.integers(0, ITEMS, 2 * ITEMS).astype(np.int32),
        offsets=np.arange(0, 2 * ITEMS + 1, 2),
        prefix=np.zeros(0, dtype=np.int32),
        vocabulary=ITEMS,
        marker_ids=(None, 0, 1),
    )
    spec = pack_spec(config.packing, config.prompt.context, TRAIN, row_tokens=row_tokens)
    return collate([next(pack(sequences, table, spec))], table)


def _plan(config: RunConfig, batch: PackedBatch, backend: Backend) -> AttentionPlan:
    layers, nothing = nn.ModuleList(), torch.empty(0)
    return make_plan(batch, Rules.of(config.packing), config.debias, config.reset, backend, layers, nothing)


def _backward(out: Tensor, tensors: list[Tensor]) -> None:
    out.sum().backward()
    for tensor in tensors:
        tensor.grad = None
