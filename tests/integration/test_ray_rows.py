"""Rows through Ray Data are the local ones, in order, on every rank and after every restart."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dti_ray.data.interactions import TRAIN, Dataset
from dti_ray.data.packing import PackedRow
from dti_ray.data.pipeline import ARRAYS, StepRows, TrainingRows
from tests.builders import make_config, make_table, write_dataset

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("ray_cluster")]

LENGTHS = [31, 7, 60, 12, 5, 44, 90, 18, 25, 9, 38, 51]


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return write_dataset(tmp_path, LENGTHS, segment_interactions=30)


def plain(steps: list[StepRows]) -> list[list[object]]:
    def values(row: PackedRow) -> tuple[object, ...]:
        return (*(tuple(getattr(row, name).tolist()) for name in ARRAYS), row.prefix_tokens)

    return [[values(row) for row in step] for step in steps]


@pytest.mark.parametrize(
    "layout",
    [
        ["packing.k=5", "optim.sliding_tail=0.3"],
        ["packing.k=10", "packing.row_tokens=75", "prompt.context=strictly_earlier"],
    ],
    ids=lambda layout: " ".join(layout),
)
def test_rows_through_ray_equal_the_local_ones_in_order(dataset: Dataset, layout: list[str]) -> None:
    config = make_config("packing.n=4", "packing.row_tokens=120", "optim.targets_per_step=32", *layout)
    local = TrainingRows(dataset, make_table(prefix=2), config, through_ray=False)
    through_ray = replace(local, through_ray=True)
    whole = list(through_ray.steps(0, 0, 1))
    assert plain(whole) == plain(list(local.steps(0, 0, 1)))
    assert sum(row.targets for step in whole for row in step) == dataset.targets[TRAIN]
    for rank in range(2):
        for start in (0, 1, len(whole) - 1, len(whole)):
            expected = plain(list(local.steps(2, rank, 2, start)))
            assert plain(list(through_ray.steps(2, rank, 2, start))) == expected


def test_reader_may_stop_after_the_first_step(dataset: Dataset) -> None:
    config = make_config("packing.n=4", "packing.k=5", "packing.row_tokens=120", "optim.targets_per_step=8")
    rows = TrainingRows(dataset, make_table(prefix=2), config, through_ray=True)
    local = replace(rows, through_ray=False)
    first, expected = next(rows.steps(0, 0, 1)), next(local.steps(0, 0, 1))
    assert plain([first]) == plain([expected])
