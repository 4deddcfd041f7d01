"""Rows through Ray Data are the local ones, in order, on every rank and after every restart; nothing is left behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import ray

from dti_ray.data import pipeline
from dti_ray.data.interactions import TRAIN, Dataset
from dti_ray.data.packing import PackedRow
from dti_ray.data.pipeline import ARRAYS, Ahead, StepRows, TrainingRows
from dti_ray.data.plan import Position
from dti_ray.errors import StorageError
from tests.builders import damage, make_config, make_table, write_dataset

pytestmark = [
    pytest.mark.integration,
    pytest.mark.usefixtures("ray_cluster"),
    # 2026-11, ray 2.60: of two pipelines at a time, Ray opens the second one's log file twice and closes it once.
    pytest.mark.filterwarnings("ignore:unclosed file .*ray-data:ResourceWarning"),
]

LENGTHS = [31, 7, 60, 12, 5, 44, 90, 18, 25, 9, 38, 51]
SMALL = ["packing.n=4", "packing.row_tokens=120", "packing.mix_segments=1", "optim.epochs=2"]
START = Position()


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return write_dataset(tmp_path, LENGTHS, segment_interactions=30)


def both(dataset: Dataset, *overrides: str) -> tuple[TrainingRows, TrainingRows]:
    """Return the same rows packed by Ray and packed here."""
    config = make_config(*SMALL, *overrides)
    through_ray = TrainingRows(dataset, make_table(prefix=2, gaps=True), config, through_ray=True)
    return through_ray, replace(through_ray, through_ray=False)


def plain(rows: TrainingRows, start: Position, rank: int = 0, world: int = 1) -> list[tuple[Position, list[object]]]:
    return [(position, values(step)) for position, step in rows.steps(start, rank, world)]


def values(step: StepRows) -> list[object]:
    def of_row(row: PackedRow) -> tuple[object, ...]:
        return (*(tuple(getattr(row, name).tolist()) for name in ARRAYS), row.prefix_tokens)

    return [of_row(row) for row in step]


@pytest.mark.parametrize(
    "layout",
    [
        ["packing.k=5", "optim.sliding_tail=0.3"],
        ["packing.k=10", "packing.row_tokens=100", "prompt.context=strictly_earlier"],
        ["packing.k=all", "packing.streams=2"],
    ],
    ids=lambda layout: " ".join(layout),
)
@pytest.mark.parametrize("window_tasks", [3, 1000])
def test_rows_through_ray_equal_the_local_ones_in_order(
    dataset: Dataset, layout: list[str], window_tasks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "WINDOW_TASKS", window_tasks)
    through_ray, local = both(dataset, "optim.targets_per_step=32", *layout)
    whole = list(through_ray.steps(START, 0, 1))
    assert [(position, values(step)) for position, step in whole] == plain(local, START)
    assert sum(row.targets for _, step in whole for row in step) == 2 * dataset.targets[TRAIN]


def test_law_9_restart_after_every_step_through_ray_gives_the_rest_of_both_epochs(dataset: Dataset) -> None:
    through_ray, local = both(dataset, "packing.k=5", "optim.targets_per_step=64")
    whole, steps = plain(local, START), local.plan(0).steps
    assert steps > 3
    for done in range(2 * steps + 1):
        for start in {Position(*divmod(done, steps)), Position(max(0, done - 1) // steps, (done - 1) % steps + 1)}:
            if done:
                assert plain(through_ray, start) == whole[done:]
    assert plain(through_ray, START) == whole


def test_law_9_global_batches_through_ray_are_the_same_for_every_world_in_mid_epoch(dataset: Dataset) -> None:
    through_ray, local = both(dataset, "packing.k=5", "optim.targets_per_step=32")
    start = Position(0, 4)
    whole = plain(local, start)
    for world in (2, 4):
        ranks = [plain(through_ray, start, rank, world) for rank in range(world)]
        assert [[row for _, part in step for row in part] for step in zip(*ranks, strict=True)] == [
            step for _, step in whole
        ]


def test_reader_ahead_is_there_when_it_is_asked_and_closing_it_leaves_no_thread_and_no_task(dataset: Dataset) -> None:
    through_ray, local = both(dataset, "packing.k=5", "optim.targets_per_step=8")
    expected = plain(local, START)
    before = set(threading.enumerate())
    with closing(Ahead(through_ray.steps(START, 0, 1), 4, "rows")) as steps:
        wait_for(lambda: steps.waiting.qsize() == 4)
        assert len(expected) > 20
        position, first = next(steps)
        assert (position, values(first)) == expected[0]
    assert not steps.thread.is_alive()
    wait_for(lambda: not ours(before))
    wait_for(lambda: ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"])


def test_damaged_segment_reaches_the_reader_as_itself_with_the_trace_of_its_task(dataset: Dataset) -> None:
    through_ray, _ = both(dataset, "packing.k=5", "optim.targets_per_step=32")
    before = set(threading.enumerate())
    damage(dataset)
    with (
        closing(Ahead(through_ray.steps(START, 0, 1), 4, "rows")) as steps,
        pytest.raises(StorageError, match=r"part-00000\.parquet") as caught,
    ):
        list(steps)
    assert "in read_segment" in "".join(caught.value.__notes__)
    wait_for(lambda: not ours(before))


def ours(before: set[threading.Thread]) -> set[threading.Thread]:
    """Return the threads since then, but for those of Ray's own that park for good when a reader stops early."""
    return {thread for thread in set(threading.enumerate()) - before if thread.name != "Prefetcher"}


def wait_for(is_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.05)
