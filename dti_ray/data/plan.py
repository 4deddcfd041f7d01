"""The order of an epoch: a pure function of the data set, the seed and the epoch.

Stage: plan. In: the segments of a data set, the seed, the epoch. Out: an `EpochPlan`: for each virtual
stream the tasks that it packs, in order, and how many rows each task becomes.
Invariant: the number of streams is fixed, so the rows of every optimizer step are the same for any
number of workers; every stream has the same number of rows; each segment appears once.

    4 segments of 30, 10, 20 and 20 targets, 2 streams, 10 targets a step and stream:
    stream 0: [30, 10] -> 3 + 1 rows    stream 1: [20, 20] -> 2 + 2 rows    4 steps
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from dti_ray.data.interactions import Segment


@dataclass(frozen=True)
class PackTask:
    """Consecutive segments of one stream that are packed together.

    Attributes:
        stream: virtual stream, 0 ... V - 1.
        first_row: number of the stream's rows before this task.
        rows: rows that the task becomes, >= 1.
        segments: indices into the data set's segments.
        seed: of the shuffle within the task.
        sliding: pack as stand-alone prompts (the sliding tail) instead of k targets.
    """

    stream: int
    first_row: int
    rows: int
    segments: tuple[int, ...]
    seed: int
    sliding: bool


@dataclass(frozen=True)
class EpochPlan:
    """All streams of one epoch.

    Attributes:
        epoch: number of the pass, from 0.
        steps: optimizer steps of the epoch.
        rows_per_step: rows that each stream contributes to a step.
        streams: per stream its tasks, in order.
    """

    epoch: int
    steps: int
    rows_per_step: int
    streams: tuple[tuple[PackTask, ...], ...]


@dataclass(frozen=True)
class Position:
    """Where a run stands: everything that resuming the data needs."""

    epoch: int = 0
    step: int = 0


def derive_seed(seed: int, *purpose: str | int) -> int:
    """Return a 63-bit seed for one purpose, independent of every other purpose's."""
    words = [zlib.crc32(str(part).encode()) for part in purpose]
    return int(np.random.SeedSequence([seed, *words]).generate_state(1, np.uint64)[0] >> 1)


def plan_epoch(
    segments: Sequence[Segment],
    *,
    epoch: int,
    epochs: int,
    seed: int,
    streams: int,
    targets_per_step: int,
    rows_per_step: int,
    sliding_tail: float,
    mix_segments: int = 1,
) -> EpochPlan:
    """Deal the segments of an epoch to the virtual streams.

    Args:
        segments: of the data set, in the manifest's order.
        epoch: number of the pass, 0 ... epochs - 1.
        epochs: passes of the whole run; with `sliding_tail` it says where the tail begins.
        seed: the run's seed.
        streams: number of virtual streams V.
        targets_per_step: targets of one optimizer step over all streams.
        rows_per_step: rows that one stream contributes to a step.
        sliding_tail: last share of the run's targets that is trained as stand-alone prompts.
        mix_segments: segments of a stream that are packed, and so shuffled, together.
    """
    targets = np.array([segment.targets[0] for segment in segments], dtype=np.int64)
    steps = max(1, round(int(targets.sum()) / targets_per_step))
    order = np.random.default_rng(derive_seed(seed, "segments", epoch)).permutation(len(segments))
    tail_from = (1.0 - sliding_tail) * epochs - epoch  # in epochs from the start of this one
    rows = steps * rows_per_step
    plans = tuple(
        _plan_stream(
            stream, mine, targets, rows, tail_from * rows, mix_segments, derive_seed(seed, "rows", epoch, stream)
        )
        for stream, mine in enumerate(_deal(order, targets, streams))
    )
    return EpochPlan(epoch, steps, rows_per_step, plans)


def _deal(order: np.ndarray, targets: np.ndarray, streams: int) -> list[list[int]]:
    """Give each segment, in order, to the stream with the fewest targets so far."""
    loads = np.zeros(streams, dtype=np.int64)
    dealt: list[list[int]] = [[] for _ in range(streams)]
    for segment in order[targets[order] > 0]:
        stream = int(loads.argmin())
        dealt[stream].append(int(segment))
        loads[stream] += targets[segment]
    return dealt


def _plan_stream(
    stream: int, segments: list[int], targets: np.ndarray, rows: int, tail_row: float, mix_segments: int, seed: int
) -> tuple[PackTask, ...]:
    """Give each task of `mix_segments` segments its share of the stream's rows; a task ends where the tail begins.

    Segments too small for a row join the next task, or the last one.
    """
    ends = np.cumsum(targets[segments]) if segments else np.zeros(0, dtype=np.int64)
    tasks: list[PackTask] = []
    waiting: list[int] = []
    first_row = 0
    for segment, end in zip(segments, ends, strict=True):
        waiting.append(segment)
        row_end = round(rows * int(end) / int(ends[-1]))
        is_full = len(waiting) >= mix_segments or row_end == rows or first_row < tail_row <= row_end
        if is_full and row_end > first_row:
            task_seed = derive_seed(seed, len(tasks))
            task = PackTask(stream, first_row, row_end - first_row, tuple(waiting), task_seed, first_row >= tail_row)
            tasks.append(task)
            waiting, first_row = [], row_end
    if waiting:
        tasks[-1] = replace(tasks[-1], segments=(*tasks[-1].segments, *waiting))
    return tuple(tasks)
