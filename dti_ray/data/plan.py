"""The order of an epoch: a pure function of the data set, the seed and the epoch.

Stage: plan. In: the segments of a data set, the seed, the epoch. Out: an `EpochPlan`: for each virtual
stream the tasks that it packs, in order, and how many rows each task becomes.
Invariant: the number of streams is fixed, so the rows of every optimizer step are the same for any
number of workers; every stream has the same number of rows; each segment appears once.

    4 segments of 30, 10, 20 and 20 targets, 2 streams, 10 targets a step and stream:
    stream 0: [30, 10] -> 3 + 1 rows    stream 1: [20, 20] -> 2 + 2 rows    4 steps
"""

from __future__ import annotations

import heapq
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from dti_ray.data.interactions import Segment


@dataclass(frozen=True)
class PackTask:
    """Consecutive segments of one stream that are packed together; it says all that its packer must know.

    Attributes:
        epoch: number of the pass.
        stream: virtual stream, 0 ... V - 1.
        first_row: number of the stream's rows of this epoch before the task.
        rows: rows that the task becomes, >= 1.
        segments: of the data set.
        seed: of the shuffle within the task.
        sliding: pack as stand-alone prompts (the sliding tail) instead of k targets.
    """

    epoch: int
    stream: int
    first_row: int
    rows: int
    segments: tuple[Segment, ...]
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


def count_steps(segments: Sequence[Segment], targets_per_step: int) -> int:
    """Return the optimizer steps of an epoch, the same in every one."""
    return max(1, round(sum(segment.targets[0] for segment in segments) / targets_per_step))


def count_busy(segments: Sequence[Segment], streams: int) -> int:
    """Return how many streams have tasks, in every epoch: the first ones, all unless segments are few."""
    return min(streams, sum(segment.targets[0] > 0 for segment in segments))


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
    steps = count_steps(segments, targets_per_step)
    order = np.random.default_rng(derive_seed(seed, "segments", epoch)).permutation(len(segments))
    rows = steps * rows_per_step
    tail_row = ((1.0 - sliding_tail) * epochs - epoch) * rows  # in rows from the start of this epoch
    plans = (
        _plan_stream(epoch, stream, mine, rows, tail_row, mix_segments, derive_seed(seed, "rows", epoch, stream))
        for stream, mine in enumerate(_deal([segments[i] for i in order.tolist()], streams))
    )
    return EpochPlan(epoch, steps, rows_per_step, tuple(plans))


def _deal(segments: Sequence[Segment], streams: int) -> list[list[Segment]]:
    """Give each segment, in order, to the stream with the fewest targets so far, the first one of several."""
    loads = [(0, stream) for stream in range(streams)]
    dealt: list[list[Segment]] = [[] for _ in range(streams)]
    for segment in segments:
        if segment.targets[0]:
            load, stream = loads[0]
            dealt[stream].append(segment)
            heapq.heapreplace(loads, (load + segment.targets[0], stream))
    return dealt


def _plan_stream(
    epoch: int, stream: int, segments: list[Segment], rows: int, tail_row: float, mix_segments: int, seed: int
) -> tuple[PackTask, ...]:
    """Give each task of `mix_segments` segments its share of the stream's rows; a task ends where the tail begins.

    Segments too small for a row join the next task, or the last one.
    """
    total = sum(segment.targets[0] for segment in segments)
    tasks: list[PackTask] = []
    waiting: list[Segment] = []
    first_row = done = 0
    for segment in segments:
        waiting.append(segment)
        done += segment.targets[0]
        end = round(rows * done / total)
        is_full = len(waiting) >= mix_segments or end == rows or first_row < tail_row <= end
        if is_full and end > first_row:
            is_tail = first_row >= tail_row
            seed_of_task = derive_seed(seed, len(tasks))
            tasks.append(PackTask(epoch, stream, first_row, end - first_row, tuple(waiting), seed_of_task, is_tail))
            waiting, first_row = [], end
    if waiting:
        tasks[-1] = replace(tasks[-1], segments=(*tasks[-1].segments, *waiting))
    return tuple(tasks)
