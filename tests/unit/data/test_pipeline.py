"""Rows of a run: law 9 for data (restart at every step, any world), and rows as Arrow."""

from __future__ import annotations

from collections import Counter
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest

from dti_ray.data.interactions import TRAIN, Dataset, read_all, read_segment
from dti_ray.data.packing import PackedRow, check_capacity, pack, pack_spec
from dti_ray.data.pipeline import (
    ARRAYS,
    EMPTY_ROW,
    ROW_SCHEMA,
    Packed,
    StepRows,
    TrainingRows,
    _in_steps,
    concatenate,
    from_table,
    to_table,
)
from tests.builders import make_config, make_sequences, make_table, train_spec, write_dataset

LENGTHS = [31, 7, 60, 12, 5, 44, 90, 18, 25, 9, 38, 51, 6, 14, 27, 33]
SMALL = ["packing.n=4", "packing.row_tokens=120", "optim.targets_per_step=32", "optim.epochs=2"]
EVERY_LAYOUT = pytest.mark.parametrize(
    "layout",
    [
        ["packing.k=5"],
        ["packing.k=1"],
        ["packing.k=all", "prompt.context=strictly_earlier"],
        ["packing.k=5", "optim.sliding_tail=0.3"],
        ["packing.k=10", "packing.row_tokens=75"],  # one prompt a row: more rows than the plan counts on
        ["packing.k=3", "packing.min_context=2", "optim.targets_per_step=16"],
        ["packing.k=20", "packing.row_tokens=400", "optim.targets_per_step=16"],  # fewer rows than the plan counts on
    ],
    ids=lambda layout: " ".join(layout),
)


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return write_dataset(tmp_path, LENGTHS, segment_interactions=40)


def training_rows(dataset: Dataset, *overrides: str) -> TrainingRows:
    config = make_config(*SMALL, *overrides)
    table = make_table(prefix=2, longest=3)
    check_capacity(pack_spec(config.packing, config.prompt.context, TRAIN), table)
    return TrainingRows(dataset, table, config, through_ray=False)


def plain(row: PackedRow) -> tuple[object, ...]:
    return (*(tuple(getattr(row, name).tolist()) for name in ARRAYS), row.prefix_tokens)


def plain_steps(rows: TrainingRows, epoch: int, rank: int = 0, world: int = 1, start: int = 0) -> list[list[object]]:
    return [[plain(row) for row in step] for step in rows.steps(epoch, rank, world, start)]


def first_tokens(steps: list[StepRows]) -> Counter[tuple[int, ...]]:
    """Count targets by what identifies them: all tokens of their prompt up to them."""
    found: Counter[tuple[int, ...]] = Counter()
    for row in (row for step in steps for row in step):
        for after in row.after.tolist():
            mine = np.flatnonzero(row.prompt == row.prompt[after])
            found[tuple(row.tokens[mine[0] : after + 1].tolist())] += 1
    return found


@EVERY_LAYOUT
def test_law_9_restart_at_every_step_gives_exactly_the_remaining_steps(dataset: Dataset, layout: list[str]) -> None:
    rows = training_rows(dataset, *layout)
    whole = plain_steps(rows, epoch=1)
    assert len(whole) > 5
    for start in range(len(whole) + 1):
        assert plain_steps(rows, 1, start=start) == whole[start:]


@EVERY_LAYOUT
def test_law_9_global_batches_are_the_same_for_every_world(dataset: Dataset, layout: list[str]) -> None:
    rows = training_rows(dataset, *layout)
    whole = plain_steps(rows, epoch=1)
    for world in (2, 4):
        ranks = [plain_steps(rows, 1, rank, world) for rank in range(world)]
        assert [list(chain.from_iterable(step)) for step in zip(*ranks, strict=True)] == whole


@pytest.mark.parametrize(("before", "after"), [(1, 4), (4, 2), (2, 1)])
def test_law_9_restart_on_another_number_of_workers_goes_on_with_the_same_batches(
    dataset: Dataset, before: int, after: int
) -> None:
    rows = training_rows(dataset, "packing.k=10", "packing.row_tokens=75")
    whole = plain_steps(rows, epoch=0)
    for start in (1, len(whole) // 2, len(whole) - 1):
        first = [plain_steps(rows, 0, rank, before)[:start] for rank in range(before)]
        rest = [plain_steps(rows, 0, rank, after, start) for rank in range(after)]
        joined = [list(chain.from_iterable(step)) for ranks in (first, rest) for step in zip(*ranks, strict=True)]
        assert joined == whole


@EVERY_LAYOUT
def test_each_target_is_trained_exactly_once_an_epoch(dataset: Dataset, layout: list[str]) -> None:
    rows = training_rows(dataset, *layout)
    config = rows.config
    users = read_all(dataset)
    spec = pack_spec(config.packing, config.prompt.context, TRAIN)
    in_one_piece = list(pack(users, rows.table, spec))
    wanted = sum(row.targets for row in in_one_piece)
    for epoch in range(2):
        steps = list(rows.steps(epoch, 0, 1))
        assert sum(row.targets for step in steps for row in step) == wanted
        if not config.optim.sliding_tail:
            assert first_tokens(steps) == first_tokens([in_one_piece])
    if not config.packing.min_context:
        assert wanted == rows.targets_per_epoch
        assert rows.total_targets == 2 * wanted


@EVERY_LAYOUT
def test_epoch_has_the_steps_of_its_plan_and_no_row_is_too_long(dataset: Dataset, layout: list[str]) -> None:
    rows = training_rows(dataset, *layout)
    steps = list(rows.steps(0, 0, 1))
    assert len(steps) == rows.plan(0).steps
    assert all(len(step) >= rows.rows_per_step * rows.config.packing.streams for step in steps)
    assert max(row.size_tokens for step in steps for row in step) <= rows.config.packing.row_tokens


def test_targets_are_spread_evenly_over_steps(dataset: Dataset) -> None:
    rows = training_rows(dataset, "packing.k=1")
    targets = [sum(row.targets for row in step) for step in rows.steps(0, 0, 1)]
    assert np.std(targets) < 0.3 * np.mean(targets)


def test_another_epoch_and_another_seed_give_other_batches(dataset: Dataset) -> None:
    rows, other = training_rows(dataset, "packing.k=5"), training_rows(dataset, "packing.k=5", "train.seed=1")
    assert plain_steps(rows, 0) != plain_steps(rows, 1)
    assert plain_steps(rows, 0) != plain_steps(other, 0)


def test_sliding_tail_ends_the_run_with_one_target_a_prompt(dataset: Dataset) -> None:
    rows = training_rows(dataset, "packing.k=5", "optim.sliding_tail=0.3")
    steps = [step for epoch in range(2) for step in rows.steps(epoch, 0, 1)]
    targets = [sum(row.targets for row in step) for step in steps]
    prompts = [sum(int(row.prompt.max(initial=0)) for row in step) for step in steps]
    half, tail = len(steps) // 2, len(steps) // 5
    assert sum(targets[:half]) > 3 * sum(prompts[:half])
    assert sum(targets[-tail:]) < 1.5 * sum(prompts[-tail:])


def test_more_streams_than_segments_lose_nothing(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path, [40, 30], segment_interactions=40)
    rows = training_rows(dataset, "packing.k=3", "optim.targets_per_step=8")
    whole = plain_steps(rows, 0)
    assert sum(len(row[-3]) for step in whole for row in step) == dataset.targets[TRAIN]
    for start in range(len(whole) + 1):
        assert plain_steps(rows, 0, start=start) == whole[start:]


def some_rows() -> list[PackedRow]:
    packed = list(pack(make_sequences([9, 4, 12]), make_table(), train_spec(make_config(), k=2, n=2, row_tokens=40)))
    assert len(packed) > 3
    return [*packed, EMPTY_ROW]


def test_rows_come_back_from_arrow_as_they_were() -> None:
    packed: list[Packed] = [(i % 2, 7 * i, row) for i, row in enumerate(some_rows())]
    table = to_table(packed)
    assert table.schema == ROW_SCHEMA
    again = list(from_table(table))
    assert [(*keys, plain(row)) for *keys, row in again] == [(*keys, plain(row)) for *keys, row in packed]
    for *_, row in again:
        assert [getattr(row, name).dtype for name in ARRAYS] == [getattr(EMPTY_ROW, name).dtype for name in ARRAYS]


def test_rows_come_back_from_arrow_after_a_cut_and_a_join() -> None:
    packed: list[Packed] = [(0, i, row) for i, row in enumerate(some_rows())]
    table = to_table(packed)
    for cut in range(1, len(packed)):
        again = [*from_table(table.slice(0, cut)), *from_table(table.slice(cut))]
        assert [plain(row) for *_, row in again] == [plain(row) for *_, row in packed]


def test_steps_take_shares_of_every_stream_in_its_order() -> None:
    rows = [EMPTY_ROW] * 12
    keys = [(0, 0), (0, 1), (0, 1), (1, 0), (0, 2), (1, 1), (1, 2), (1, 3), (0, 3)]
    packed = [(*key, row) for key, row in zip(keys, rows, strict=False)]
    assert [len(step) for step in _in_steps(packed, [0, 1], skip=0, size=1)] == [2, 3, 2, 2]
    assert [len(step) for step in _in_steps(packed, [0, 1], skip=0, size=2)] == [5, 4]
    assert [len(step) for step in _in_steps(packed, [0, 1], skip=2, size=2)] == [4]
    assert [len(step) for step in _in_steps(packed, [0, 1], skip=4, size=2)] == []


def test_stream_that_ends_early_does_not_hold_up_the_others() -> None:
    packed = [(0, 0, EMPTY_ROW), (1, 0, EMPTY_ROW), (1, 1, EMPTY_ROW), (1, 2, EMPTY_ROW)]
    assert [len(step) for step in _in_steps(packed, [0, 1], skip=0, size=1)] == [2, 1, 1]


def test_concatenated_segments_are_the_whole(dataset: Dataset) -> None:
    parts = [read_segment(dataset, segment) for segment in dataset.segments]
    joined, whole = concatenate(parts), read_all(dataset)
    for name in ("user_ids", "offsets", "items", "labels", "times", "splits"):
        assert getattr(joined, name).tolist() == getattr(whole, name).tolist()
    assert concatenate(parts[:1]) is parts[0]
    assert all(a < b for a, b in pairwise(joined.offsets))
