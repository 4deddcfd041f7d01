"""What a run says of its waiting for data: everything from the moment that the loop asks, the first rows included."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dti_ray.data.pipeline import StepRows, TrainingRows
from dti_ray.data.plan import Position
from dti_ray.model.backbone import build_model
from dti_ray.telemetry import read_lines
from dti_ray.train.engine import TorchEngine
from dti_ray.train.loop import Trainer
from dti_ray.train.world import World
from tests.builders import make_config, make_table, write_dataset

CPU = torch.device("cpu")
SLOW_STEPS = {0: 0.6, 3: 0.5}  # step: seconds until its rows are there


def slowly(steps: Iterator[tuple[Position, StepRows]]) -> Iterator[tuple[Position, StepRows]]:
    for number, step in enumerate(steps):
        time.sleep(SLOW_STEPS.get(number, 0.0))
        yield step


def test_data_wait_is_the_time_from_asking_to_getting_with_the_first_rows_included(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path, [30, 12, 25, 40])
    config = make_config(
        f"storage.root={tmp_path}", "data.name=tiny", "train.engine=torch", "cluster.workers=1", "packing.k=4",
        "packing.n=3", "packing.streams=2", "optim.targets_per_step=16", "optim.epochs=1", "train.log_targets=1",
    )  # fmt: skip
    rows = TrainingRows(dataset, make_table(), config, through_ray=False)
    engine = TorchEngine(build_model(config, make_table()), config, CPU)
    trainer = Trainer(config, dataset.storage, rows, engine, World(CPU), lambda _kind, _line, _progress: None)
    assert trainer.run(lambda start: slowly(rows.steps(start, 0, 1))).targets == dataset.targets[0]
    lines = read_lines(dataset.storage, "runs/run", "train")
    targets = [
        line["targets"] - before for line, before in zip(lines, [0, *(x["targets"] for x in lines)], strict=False)
    ]
    waited = [line["data_wait"] * count / line["targets_per_s"] for line, count in zip(lines, targets, strict=True)]
    assert len(waited) >= 5
    for number, seconds in enumerate(waited):
        assert seconds == pytest.approx(SLOW_STEPS.get(number, 0.0), abs=0.25)
