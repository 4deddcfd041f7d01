"""Rows of a run: law 9 for data (restart at every step, any world), and rows as Arrow."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import closing
from itertools import islice, pairwise, takewhile
from pathlib import Path

import numpy as np
import pytest

from dti_ray.data.interactions import TRAIN, Dataset, read_all, read_segment
from dti_ray.data.packing import PackedRow, check_capacity, pack, pack_spec
from dti_ray.data.pipeline import (
    ARRAYS,
    EMPTY_ROW,
    ROW_SCHEMA,
    Ahead,
    Packed,
    Place,
    StepRows,
    TrainingRows,
    _in_steps,
    _shares,
    concatenate,
    from_table,
    to_table,
)
from dti_ray.data.plan import Position
from dti_ray.errors import Fault, StorageError
from tests.builders import damage, make_config, make_sequences, make_table, train_spec, write_dataset

LENGTHS = [31, 7, 60, 12, 5, 44, 90, 18, 25, 9, 38, 51, 6, 14, 27, 33]
SMALL = ["packing.n=4", "packing.row_tokens=120", "optim.targets_per_step=32", "optim.epochs=2"]
EVERY_LAYOUT = pytest.mark.parametrize(
    "layout",
    [
        ["packing.k=5"],
        ["packing.k=1"],
        ["packing.k=all", "prompt.context=strictly_earlier"],
        ["packing.k=5", "optim.sliding_tail=0.3"],
        ["packing.k=9", "packing.k_min=2"],
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


def steps_of(rows: TrainingRows, epoch: int, rank: int = 0, world: int = 1, start: int = 0) -> list[StepRows]:
    """Return the steps of one epoch, from one of them on."""
    found = takewhile(lambda step: step[0].epoch == epoch, rows.steps(Position(epoch, start), rank, world))
    return [step for _, step in found]


def plain_steps(rows: TrainingRows, epoch: int, rank: int = 0, world: int = 1, start: int = 0) -> list[list[object]]:
    return [[plain(row) for row in step] for step in steps_of(rows, epoch, rank, world, start)]


def plain_run(
    rows: TrainingRows, start: Position, rank: int = 0, world: int = 1
) -> list[tuple[Position, list[object]]]:
    """Return the rest of the run, with the position of each step."""
    return [(position, [plain(row) for row in step]) for position, step in rows.steps(start, rank, world)]


def joined(ranks: list[list[tuple[Position, list[object]]]]) -> list[tuple[Position, list[object]]]:
    """Lay the parts of all ranks side by side; each has the same steps."""
    assert len({tuple(position for position, _ in rank) for rank in ranks}) == 1
    return [(step[0][0], [row for _, part in step for row in part]) for step in zip(*ranks, strict=True)]


def first_tokens(steps: list[StepRows]) -> Counter[tuple[int, ...]]:
    """Count targets by what identifies them: all tokens of their prompt up to them."""
    found: Counter[tuple[int, ...]] = Counter()
    for row in (row for step in steps for row in step):
        for after in row.after.tolist():
            mine = np.flatnonzero(row.prompt == row.prompt[after])
            found[tuple(row.tokens[mine[0] : after + 1].tolist())] += 1
    return found


def first_of_prompts(steps: list[StepRows]) -> Counter[tuple[tuple[int, ...], int]]:
    """Count prompts by the tokens of their context and their number of targets."""
    found: Counter[tuple[tuple[int, ...], int]] = Counter()
    for row in (row for step in steps for row in step):
        for prompt in range(1, int(row.prompt.max(initial=0)) + 1):
            after = row.after[row.prompt[row.after] == prompt]
            found[tuple(row.tokens[np.flatnonzero(row.prompt == prompt)[0] : after[0]].tolist()), len(after)] += 1
    return found


@EVERY_LAYOUT
def test_law_9_restart_after_every_step_gives_exactly_the_rest_of_both_epochs(
    dataset: Dataset, layout: list[str]
) -> None:
    rows = training_rows(dataset, *layout)
    whole = plain_run(rows, Position())
    steps = rows.plan(0).steps
    assert [position for position, _ in whole] == [Position(epoch, step) for epoch in range(2) for step in range(steps)]
    for done, (position, _) in enumerate(whole, start=1):
        assert plain_run(rows, Position(position.epoch, position.step + 1)) == whole[done:]
    assert plain_run(rows, Position(0, steps)) == plain_run(rows, Position(1, 0)) == whole[steps:]


@EVERY_LAYOUT
def test_law_9_global_batches_are_the_same_for_every_world(dataset: Dataset, layout: list[str]) -> None:
    rows = training_rows(dataset, *layout)
    whole = plain_run(rows, Position())
    for world in (2, 4):
        assert joined([plain_run(rows, Position(), rank, world) for rank in range(world)]) == whole


@pytest.mark.parametrize("worlds", [(2, 1, 2), (1, 4, 2), (4, 2, 1)], ids=str)
def test_law_9_run_that_moves_to_other_worker_counts_sees_each_target_exactly_once(
    dataset: Dataset, worlds: tuple[int, ...]
) -> None:
    rows = training_rows(dataset, "packing.k=10", "packing.row_tokens=75")
    whole, steps = plain_run(rows, Position()), rows.plan(0).steps
    in_one_piece = list(pack(read_all(dataset), rows.table, pack_spec(rows.config.packing, "ordered", TRAIN)))
    once = first_tokens([in_one_piece])
    for moves in ((3, 7), (1, steps), (steps - 1, steps + 4), (steps + 1, steps + 5)):
        seen: list[StepRows] = []
        parts: list[tuple[Position, list[object]]] = []
        for world, begin, end in zip(worlds, (0, *moves), (*moves, 2 * steps), strict=True):
            start = Position(*divmod(begin, steps))
            ranks = [list(islice(rows.steps(start, rank, world), end - begin)) for rank in range(world)]
            seen += [step for rank in ranks for _, step in rank]
            parts += joined([[(at, [plain(row) for row in step]) for at, step in rank] for rank in ranks])
        assert parts == whole
        assert first_tokens(seen) == once + once, "in two epochs"


@EVERY_LAYOUT
def test_each_target_is_trained_exactly_once_an_epoch(dataset: Dataset, layout: list[str]) -> None:
    rows = training_rows(dataset, *layout)
    config = rows.config
    users = read_all(dataset)
    spec = pack_spec(config.packing, config.prompt.context, TRAIN)
    in_one_piece = list(pack(users, rows.table, spec))
    wanted = sum(row.targets for row in in_one_piece)
    for epoch in range(2):
        steps = steps_of(rows, epoch)
        assert sum(row.targets for step in steps for row in step) == wanted
        if not config.optim.sliding_tail and config.packing.k_min is None:
            assert first_tokens(steps) == first_tokens([in_one_piece])
    if not config.packing.min_context:
        assert wanted == rows.targets_per_epoch
        assert rows.total_targets == 2 * wanted


@EVERY_LAYOUT
def test_epoch_has_the_steps_of_its_plan_and_no_row_is_too_long(dataset: Dataset, layout: list[str]) -> None:
    rows = training_rows(dataset, *layout)
    steps = steps_of(rows, 0)
    assert len(steps) == rows.plan(0).steps
    assert all(len(step) >= rows.rows_per_step * rows.config.packing.streams for step in steps)
    assert max(row.size_tokens for step in steps for row in step) <= rows.config.packing.row_tokens


def test_targets_are_spread_evenly_over_steps(dataset: Dataset) -> None:
    rows = training_rows(dataset, "packing.k=1")
    targets = [sum(row.targets for row in step) for step in steps_of(rows, 0)]
    assert np.std(targets) < 0.3 * np.mean(targets)


def test_another_epoch_and_another_seed_give_other_batches(dataset: Dataset) -> None:
    rows, other = training_rows(dataset, "packing.k=5"), training_rows(dataset, "packing.k=5", "train.seed=1")
    assert plain_steps(rows, 0) != plain_steps(rows, 1)
    assert plain_steps(rows, 0) != plain_steps(other, 0)


def test_sliding_tail_ends_the_run_with_one_target_a_prompt(dataset: Dataset) -> None:
    rows = training_rows(dataset, "packing.k=5", "optim.sliding_tail=0.3")
    steps = [step for epoch in range(2) for step in steps_of(rows, epoch)]
    targets = [sum(row.targets for row in step) for step in steps]
    prompts = [sum(int(row.prompt.max(initial=0)) for row in step) for step in steps]
    half, tail = len(steps) // 2, len(steps) // 5
    assert sum(targets[:half]) > 3 * sum(prompts[:half])
    assert sum(targets[-tail:]) < 1.5 * sum(prompts[-tail:])


def test_mixture_is_drawn_anew_in_every_epoch_and_sees_every_length(dataset: Dataset) -> None:
    rows = training_rows(dataset, "packing.k=9", "packing.k_min=2", "optim.epochs=4")
    prompts = [first_of_prompts(steps_of(rows, epoch)) for epoch in range(4)]
    assert all((prompts[i] & prompts[j]).total() < 0.8 * prompts[i].total() for i in range(4) for j in range(i))
    assert {length for _, length in sum(prompts, Counter())} >= set(range(2, 10))
    assert sum(length * count for (_, length), count in prompts[0].items()) == rows.targets_per_epoch


def test_mixture_of_one_length_trains_as_that_length(dataset: Dataset) -> None:
    one, none = (training_rows(dataset, "packing.k=5", f"packing.k_min={k_min}") for k_min in ("5", "null"))
    assert plain_run(one, Position()) == plain_run(none, Position())


def test_more_streams_than_segments_lose_nothing_and_idle_ranks_keep_step(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path, [40, 30], segment_interactions=40)
    rows = training_rows(dataset, "packing.k=3", "optim.targets_per_step=8")
    whole = plain_run(rows, Position())
    assert sum(len(row[-3]) for _, step in whole for row in step) == 2 * dataset.targets[TRAIN]
    for start, (position, _) in enumerate(whole):
        assert plain_run(rows, position) == whole[start:]
    ranks = [plain_run(rows, Position(), rank, 4) for rank in range(4)]
    assert joined(ranks) == whole
    assert [any(step for _, step in rank) for rank in ranks] == [True, True, False, False]


def test_targets_of_an_epoch_are_counted_segment_by_segment(dataset: Dataset) -> None:
    cold = training_rows(dataset, "packing.min_context=3")
    users = read_all(dataset)
    trained = [int((users.splits[a:b] == TRAIN).sum()) for a, b in pairwise(users.offsets.tolist())]
    assert cold.targets_per_epoch == sum(max(0, count - 3) for count in trained) < dataset.targets[TRAIN]


def test_damaged_segment_is_named(dataset: Dataset) -> None:
    damage(dataset)
    with pytest.raises(StorageError, match=r"part-00000\.parquet"):
        steps_of(training_rows(dataset), 0)


def some_rows() -> list[PackedRow]:
    packed = list(pack(make_sequences([9, 4, 12]), make_table(), train_spec(make_config(), k=2, n=2, row_tokens=40)))
    assert len(packed) > 3
    return [*packed, EMPTY_ROW]


def test_rows_come_back_from_arrow_as_they_were() -> None:
    packed: list[Packed] = [(Place(i // 3, i % 2, 7 * i), row) for i, row in enumerate(some_rows())]
    table = to_table(packed)
    assert table.schema == ROW_SCHEMA
    again = list(from_table(table))
    assert [(place, plain(row)) for place, row in again] == [(place, plain(row)) for place, row in packed]
    for *_, row in again:
        assert [getattr(row, name).dtype for name in ARRAYS] == [getattr(EMPTY_ROW, name).dtype for name in ARRAYS]


def test_rows_come_back_from_arrow_after_a_cut_and_a_join() -> None:
    packed: list[Packed] = [(Place(0, 0, i), row) for i, row in enumerate(some_rows())]
    table = to_table(packed)
    for cut in range(1, len(packed)):
        again = [*from_table(table.slice(0, cut)), *from_table(table.slice(cut))]
        assert [plain(row) for *_, row in again] == [plain(row) for *_, row in packed]


def test_steps_take_shares_of_every_stream_in_its_order() -> None:
    places = [(0, 0), (0, 1), (0, 1), (1, 0), (0, 2), (1, 1), (1, 2), (1, 3), (0, 3)]
    packed: list[Packed] = [(Place(0, stream, share), EMPTY_ROW) for stream, share in places]

    def sizes(start: int, size: int) -> list[int]:
        return [len(step) for step in _in_steps(_shares(packed, Position(0, start), size), [0, 1], size)]

    assert sizes(start=0, size=1) == [2, 3, 2, 2]
    assert sizes(start=0, size=2) == [5, 4]
    assert sizes(start=1, size=2) == [4]
    assert sizes(start=2, size=2) == []


def test_share_of_the_next_epoch_is_not_taken_for_the_same_one() -> None:
    packed: list[Packed] = [(Place(epoch, 0, 0), EMPTY_ROW) for epoch in (0, 0, 1)]
    assert [len(rows) for _, rows in _shares(packed, Position(), 1)] == [2, 1]
    assert [len(rows) for _, rows in _shares(packed, Position(0, 1), 1)] == [1]


def test_concatenated_segments_are_the_whole(dataset: Dataset) -> None:
    parts = [read_segment(dataset, segment) for segment in dataset.segments]
    joined, whole = concatenate(parts), read_all(dataset)
    for name in ("user_ids", "offsets", "items", "labels", "times", "splits"):
        assert getattr(joined, name).tolist() == getattr(whole, name).tolist()
    assert concatenate(parts[:1]) is parts[0]
    assert all(a < b for a, b in pairwise(joined.offsets))


def numbers(count: int, seen: list[int]) -> Generator[int]:
    for i in range(count):
        seen.append(i)
        yield i


def wait_for(is_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_reading_ahead_keeps_the_order_and_stays_at_its_end() -> None:
    ahead = Ahead(numbers(100, []), 3, "test")
    assert list(ahead) == list(range(100))
    assert list(ahead) == []
    ahead.close()


def test_reading_ahead_is_bounded_and_goes_on_with_the_reader() -> None:
    seen: list[int] = []
    with closing(Ahead(numbers(100, seen), 3, "test")) as ahead:
        for taken in range(5):
            wait_for(lambda: len(seen) == taken + 4)  # noqa: B023 - asked within the round
            time.sleep(0.02)
            assert len(seen) == taken + 4, "three wait, and one more is in hand"
            assert next(ahead) == taken


def test_error_ahead_comes_out_in_its_place_with_its_trace() -> None:
    def broken() -> Generator[int]:
        yield from numbers(3, [])
        raise StorageError(Fault("shard", "is gone"))

    with closing(Ahead(broken(), 9, "test")) as ahead:
        assert [next(ahead) for _ in range(3)] == [0, 1, 2]
        for _ in range(2):
            with pytest.raises(StorageError, match="shard: is gone") as caught:
                next(ahead)
            assert "broken" in [entry.name for entry in caught.traceback]


@pytest.mark.parametrize("taken", [0, 1, 100])
def test_closing_ends_the_thread_and_what_it_runs(taken: int) -> None:
    ended: list[bool] = []

    def run() -> Generator[int]:
        try:
            yield from numbers(100, [])
        finally:
            ended.append(True)

    ahead = Ahead(run(), 4, "test")
    assert [next(ahead) for _ in range(taken)] == list(range(taken))
    ahead.close()
    ahead.close()
    assert ended == [True]
    assert not ahead.thread.is_alive()
