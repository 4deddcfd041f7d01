"""The bench trains what it says it trains; its times are not looked at."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dti_ray.bench.train import Row, bench_train
from dti_ray.data.interactions import read_all
from dti_ray.data.packing import pack
from dti_ray.model.batch import collate
from dti_ray.model.flops import Work, count_work
from dti_ray.model.masks import Rules
from tests.builders import make_config, make_table, train_spec, write_dataset

CONFIG = make_config(
    "model.layers=2", "packing.n=4", "packing.window=interactions", "packing.row_tokens=300",
    "train.engine=torch", "cluster.workers=1", "train.rows_per_pass=2",
)  # fmt: skip


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    dataset = write_dataset(tmp_path_factory.mktemp("bench"), [30, 25, 41, 18, 60, 33])
    table = make_table(prefix=0)
    return bench_train(
        CONFIG, dataset, table, [5, "all"],
        targets=10_000, targets_per_step=60, repeats=2, device=torch.device("cpu"),
    )  # fmt: skip


def test_every_paradigm_is_there_and_compared(rows: list[Row]) -> None:
    assert [(row.paradigm, row.k) for row in rows] == [
        ("sliding_padded", 1), ("sliding_packed", 1), ("dti", 5), ("dti", "all"),
    ]  # fmt: skip
    padded, packed, *dti = rows
    assert padded.speedup_padded == packed.speedup_packed == 1.0
    assert (padded.token_ratio, packed.token_ratio, packed.flop_ratio) == (1.0, 1.0, 1.0)
    for row in dti:
        assert row.efficiency == pytest.approx(row.speedup_packed / row.flop_ratio)
        assert row.speedup_padded == pytest.approx(row.targets_per_s / padded.targets_per_s)
        assert row.speedup_packed == pytest.approx(row.targets_per_s / packed.targets_per_s)


def test_bounds_are_those_of_the_whole_training_split(rows: list[Row], tmp_path: Path) -> None:
    users = read_all(write_dataset(tmp_path, [30, 25, 41, 18, 60, 33]))
    table = make_table(prefix=0)

    def work(k: int | None) -> Work:
        packed = pack(users, table, train_spec(CONFIG, k=k))
        return sum((count_work(collate([row], table), Rules.of(CONFIG.packing)) for row in packed), Work())

    sliding = work(1)
    for row, k in zip(rows[2:], (5, None), strict=True):
        assert row.tokens_per_target == pytest.approx(work(k).tokens / work(k).sums)
        assert row.token_ratio == pytest.approx(sliding.tokens / work(k).tokens)


def test_padding_is_counted(rows: list[Row]) -> None:
    padded, packed, *_ = rows
    assert padded.padding > packed.padding >= 0.0
