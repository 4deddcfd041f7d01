"""The plan: each segment once, streams of equal length, a pure function of seed and epoch."""

from __future__ import annotations

import json
import pickle
from dataclasses import asdict
from itertools import chain, pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dti_ray.data.interactions import Segment
from dti_ray.data.plan import EpochPlan, Position, count_busy, count_steps, derive_seed, plan_epoch


def segments(targets: list[int]) -> list[Segment]:
    return [Segment("part", i, 1, count + 2, (count, 1, 1)) for i, count in enumerate(targets)]


def plan(targets: list[int], **changes: object) -> EpochPlan:
    arguments = {
        "epoch": 0, "epochs": 1, "seed": 0, "streams": 4, "targets_per_step": 50, "rows_per_step": 2,
        "sliding_tail": 0.0,
    }  # fmt: skip
    return plan_epoch(segments(targets), **{**arguments, **changes})  # pyright: ignore[reportArgumentType]


def segments_of(made: EpochPlan) -> list[list[int]]:
    """Return the numbers of each stream's segments, in order; `segments` numbers them as row groups."""
    return [[segment.row_group for task in stream for segment in task.segments] for stream in made.streams]


counts = st.lists(st.integers(0, 90), min_size=1, max_size=60)


@settings(max_examples=100, deadline=None)
@given(
    targets=counts, streams=st.integers(1, 8), per_step=st.integers(1, 200), rows=st.integers(1, 5),
    seed=st.integers(0, 99), epoch=st.integers(0, 3), tail=st.sampled_from([0.0, 0.15, 0.9]),
    mix=st.integers(1, 9),
)  # fmt: skip
def test_each_segment_once_and_every_stream_has_the_rows_of_all_steps(
    targets: list[int], streams: int, per_step: int, rows: int, seed: int, epoch: int, tail: float, mix: int
) -> None:
    made = plan(
        targets, streams=streams, targets_per_step=per_step, rows_per_step=rows, seed=seed, epoch=epoch, epochs=4,
        sliding_tail=tail, mix_segments=mix,
    )  # fmt: skip
    dealt = segments_of(made)
    assert sorted(chain.from_iterable(dealt)) == [i for i, count in enumerate(targets) if count]
    assert (made.epoch, made.rows_per_step, len(made.streams)) == (epoch, rows, streams)
    assert made.steps == max(1, round(sum(targets) / per_step))
    for number, stream in enumerate(made.streams):
        ends = [0, *(task.first_row + task.rows for task in stream)]
        assert [task.first_row for task in stream] == ends[:-1]
        assert ends[-1] == (made.steps * rows if stream else 0)
        assert all(task.rows >= 1 and task.segments and task.stream == number for task in stream)


@settings(max_examples=60, deadline=None)
@given(targets=counts, streams=st.integers(1, 8), seed=st.integers(0, 99))
def test_streams_differ_by_no_more_than_one_segment(targets: list[int], streams: int, seed: int) -> None:
    loads = [sum(targets[i] for i in mine) for mine in segments_of(plan(targets, streams=streams, seed=seed))]
    assert max(loads) - min(loads) <= max(targets)


@settings(max_examples=60, deadline=None)
@given(targets=st.lists(st.integers(1, 90), min_size=1, max_size=60), seed=st.integers(0, 99))
def test_rows_of_a_task_are_its_share_of_the_streams_targets(targets: list[int], seed: int) -> None:
    made = plan(targets, seed=seed)
    for stream in made.streams:
        total = sum(segment.targets[0] for task in stream for segment in task.segments)
        done = 0
        for task in stream:
            done += sum(segment.targets[0] for segment in task.segments)
            assert abs(task.first_row + task.rows - made.steps * made.rows_per_step * done / total) <= 0.5


def test_same_arguments_give_the_same_plan() -> None:
    targets = list(range(1, 40))
    assert plan(targets, seed=3, epoch=2, epochs=3) == plan(targets, seed=3, epoch=2, epochs=3)


def test_another_epoch_or_seed_deals_another_order() -> None:
    targets = [10] * 40
    orders = [segments_of(plan(targets, seed=s, epoch=e, epochs=3)) for s, e in [(0, 0), (0, 1), (0, 2), (1, 0)]]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])


def test_small_segments_join_until_they_fill_a_row() -> None:
    made = plan([1] * 100, streams=2, targets_per_step=20, rows_per_step=1)
    for stream in made.streams:
        assert [task.rows for task in stream] == [1] * 5
        assert sum(len(task.segments) for task in stream) == 50
        assert all(5 <= len(task.segments) <= 15 for task in stream)


def test_small_segments_at_the_end_of_a_stream_join_the_last_task() -> None:
    (stream,) = plan([1] * 9 + [91], streams=1, targets_per_step=50, rows_per_step=1, seed=4).streams
    assert sorted(segment.row_group for task in stream for segment in task.segments) == list(range(10))
    assert len(stream[-1].segments) > 1
    assert sum(task.rows for task in stream) == 2


def test_large_segment_becomes_several_rows() -> None:
    made = plan([1000], streams=1, targets_per_step=100, rows_per_step=3)
    assert [(task.first_row, task.rows) for task in made.streams[0]] == [(0, 30)]


def test_worked_example_of_the_module() -> None:
    made = plan([30, 10, 20, 20], streams=2, targets_per_step=20, rows_per_step=1)
    assert made.steps == 4
    rows = sorted((task.segments[0].row_group, task.rows) for stream in made.streams for task in stream)
    assert len(rows) == 4
    assert sum(count for _, count in rows) == 8


def test_stream_without_segments_has_no_task() -> None:
    made = plan([100], streams=4)
    assert sorted(map(len, made.streams)) == [0, 0, 0, 1]


def test_without_a_tail_nothing_slides() -> None:
    assert not any(task.sliding for e in range(3) for s in plan([9] * 50, epoch=e, epochs=3).streams for task in s)


@settings(max_examples=25, deadline=None)
@given(tail=st.floats(0.0, 0.99), epochs=st.integers(1, 4), seed=st.integers(0, 9))
def test_sliding_tail_is_the_last_share_of_the_run(tail: float, epochs: int, seed: int) -> None:
    targets = [7] * 200
    streams: list[list[tuple[bool, int]]] = [[] for _ in range(4)]
    for epoch in range(epochs):
        made = plan(targets, epoch=epoch, epochs=epochs, seed=seed, sliding_tail=tail)
        for stream, tasks in zip(streams, made.streams, strict=True):
            stream.extend((task.sliding, task.rows) for task in tasks)
    for stream in streams:
        assert all(before <= after for (before, _), (after, _) in pairwise(stream)), "once it slides, it goes on"
        rows = sum(count for _, count in stream)
        slides = sum(count for sliding, count in stream if sliding)
        assert abs(slides - tail * rows) <= max(count for _, count in stream)


def test_seeds_of_tasks_all_differ() -> None:
    seeds = [
        task.seed
        for seed in range(3)
        for epoch in range(3)
        for stream in plan([60] * 40, seed=seed, epoch=epoch, epochs=3).streams
        for task in stream
    ]
    assert len(seeds) == len(set(seeds)) >= 300


def test_derived_seeds_are_the_same_everywhere_and_independent() -> None:
    assert derive_seed(0, "rows", 1, 2) == derive_seed(0, "rows", 1, 2) == 7414194876879602644
    purposes: list[tuple[str | int, ...]] = [
        (), ("rows",), ("segments",), ("rows", 0), ("rows", 0, 0), ("rows", 0, 1), ("rows", 1, 0), ("dropout", 1, 0),
    ]  # fmt: skip
    seeds = [derive_seed(seed, *purpose) for seed in (0, 1, 2**31 - 1) for purpose in purposes]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_derived_streams_of_numbers_are_uncorrelated() -> None:
    draws = np.array([np.random.default_rng(derive_seed(0, "rows", i)).random(2000) for i in range(12)])
    off_diagonal = np.corrcoef(draws)[~np.eye(12, dtype=bool)]
    assert np.abs(off_diagonal).max() < 0.12


def test_task_pickles_and_stays_small() -> None:
    made = plan([1000] * 2000, streams=8, targets_per_step=4096, mix_segments=8)
    task = made.streams[0][0]
    assert pickle.loads(pickle.dumps(task)) == task
    assert len(pickle.dumps(task)) < 1000
    assert pickle.loads(pickle.dumps(made)) == made


def test_position_of_1000_streams_is_far_below_10_kb() -> None:
    made = plan([1000] * 4000, streams=1000, targets_per_step=100_000)
    assert len(made.streams) == 1000
    for position in (Position(), Position(0, made.steps), Position(epoch=10**6, step=10**9)):
        text = json.dumps(asdict(position))
        assert Position(**json.loads(text)) == pickle.loads(pickle.dumps(position)) == position
        assert max(len(text), len(pickle.dumps(position))) < 200


@settings(max_examples=60, deadline=None)
@given(targets=counts, streams=st.integers(1, 8), per_step=st.integers(1, 200), epoch=st.integers(0, 3))
def test_steps_and_busy_streams_are_known_without_a_plan(
    targets: list[int], streams: int, per_step: int, epoch: int
) -> None:
    made = plan(targets, streams=streams, targets_per_step=per_step, epoch=epoch, epochs=4)
    assert count_steps(segments(targets), per_step) == made.steps
    busy = count_busy(segments(targets), streams)
    assert [bool(tasks) for tasks in made.streams] == [True] * busy + [False] * (streams - busy)


def test_one_user_of_100_000_interactions_leaves_every_stream_its_rows() -> None:
    made = plan([100_000, *[30] * 50], streams=4, targets_per_step=1000, rows_per_step=2)
    assert [sum(task.rows for task in tasks) for tasks in made.streams] == [2 * made.steps] * 4
    loads = [sum(segment.targets[0] for task in tasks for segment in task.segments) for tasks in made.streams]
    *others, _ = sorted(loads)
    assert max(others) - min(others) <= 30, "the others share what is left"


def test_a_task_mixes_the_segments_asked_for_and_ends_where_the_tail_begins() -> None:
    made = plan([10] * 20, streams=1, targets_per_step=10, rows_per_step=1, epochs=1, mix_segments=6)
    assert [len(task.segments) for task in made.streams[0]] == [6, 6, 6, 2]
    made = plan([10] * 20, streams=1, targets_per_step=10, rows_per_step=1, epochs=1, mix_segments=6, sliding_tail=0.25)
    assert [(len(task.segments), task.sliding) for task in made.streams[0]] == [
        (6, False),
        (6, False),
        (3, False),
        (5, True),
    ]
