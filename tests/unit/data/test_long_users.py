"""Histories of 100,000 interactions beside short ones: seconds, bounded memory, each target once."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dti_ray.data.interactions import TRAIN, read_all
from dti_ray.data.packing import PackSpec, pack
from dti_ray.data.pipeline import TrainingRows, from_table, to_table
from dti_ray.data.plan import Position
from tests.builders import make_config, make_sequences, make_table, write_dataset

LENGTHS = [100_000, 1, 2, 30]


@contextmanager
def modest(seconds: float, megabytes: int) -> Iterator[None]:
    """Hold the block to so much processor time and so much memory at a time."""
    started = time.process_time()
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < megabytes * 2**20
        assert time.process_time() - started < seconds
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("is_one_second", [False, True])
@pytest.mark.parametrize(("k", "strictly_earlier"), [(None, False), (None, True), (20, True), (5, False)])
def test_long_history_is_packed_row_by_row(k: int | None, strictly_earlier: bool, is_one_second: bool) -> None:
    sequences, table = make_sequences(LENGTHS), make_table(gaps=True)
    if is_one_second:
        sequences = replace(sequences, times=np.zeros_like(sequences.times))
    spec = PackSpec(k=k, n=20, strictly_earlier=strictly_earlier, min_context=0, row_tokens=4096, split=TRAIN)
    targets, largest = np.zeros(len(LENGTHS), dtype=np.int64), 0
    with modest(seconds=20, megabytes=50):
        for row in pack(sequences, table, spec, rng=np.random.default_rng(0)):
            targets += np.bincount(row.users, minlength=len(LENGTHS))
            largest = max(largest, row.size_tokens)
    assert targets.tolist() == LENGTHS
    assert largest <= 4096


@pytest.mark.parametrize("k", ["all", "20"])
def test_long_history_is_one_segment_and_one_task_of_training(tmp_path: Path, k: str) -> None:
    dataset = write_dataset(tmp_path, [7, 100_000, *[25, 3, 60] * 20], segment_interactions=1024)
    assert max(segment.interactions for segment in dataset.segments) >= 100_000
    config = make_config(f"packing.k={k}", "optim.targets_per_step=4096", "packing.streams=4", "optim.epochs=1")
    rows = TrainingRows(dataset, make_table(gaps=True), config, through_ray=False)
    positions, targets, largest = [], 0, 0
    with modest(seconds=20, megabytes=100):
        for position, step in rows.steps(Position(), 0, 1):
            positions.append(position)
            targets += sum(row.targets for row in step)
            largest = max(largest, *(row.size_tokens for row in step))
    assert positions == [Position(0, step) for step in range(rows.plan(0).steps)]
    assert targets == dataset.targets[TRAIN] == int((read_all(dataset).splits == TRAIN).sum())
    assert largest <= config.packing.row_tokens


def test_long_history_comes_back_from_arrow(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path, [100_000], segment_interactions=1024)
    config = make_config("packing.k=all", "optim.targets_per_step=100000", "optim.epochs=1")
    rows = TrainingRows(dataset, make_table(), config, through_ray=False)
    (task,) = rows.plan(0).streams[0]
    with modest(seconds=20, megabytes=100):
        packed = rows.packer(task, rows.table)
        again = list(from_table(to_table(packed)))
    assert [place for place, _ in again] == [place for place, _ in packed]
    assert all((a.tokens == b.tokens).all() for (_, a), (_, b) in zip(again, packed, strict=True))
