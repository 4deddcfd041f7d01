"""What goes wrong inside a worker: the training function of a run under test.

A fault is one JSON document in `DTI_CHAOS`: {"kind", "step", "rank", "folder"}; it happens once, which a file in the
folder remembers. Each worker writes its process id there.
"""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

import ray.train
import torch

from dti_ray.data.plan import count_steps
from dti_ray.train.entry import enter
from dti_ray.train.loop import Step, Tally, Trainer


def number_of(trainer: Trainer, step: Step) -> int:
    in_an_epoch = count_steps(trainer.rows.dataset.segments, trainer.config.optim.targets_per_step)
    return step.position.epoch * in_an_epoch + step.position.step + 1


def worker(job: dict[str, Any]) -> None:
    fault = json.loads(os.environ["DTI_CHAOS"])
    folder = Path(fault["folder"])
    rank = ray.train.get_context().get_world_rank()
    (folder / f"pid-{rank}").write_text(str(os.getpid()))
    plain = Trainer.train_step

    def train_step(self: Trainer, step: Step, lr: float, tally: Tally) -> Any:
        time.sleep(fault.get("pause_s", 0.0))
        mark, number = folder / "happened", number_of(self, step)
        if "kind" in fault and rank == fault["rank"] and number == fault["step"] and not mark.exists():
            mark.touch()
            return happen(fault["kind"], self, step, lr, tally)
        return plain(self, step, lr, tally)

    def happen(kind: str, trainer: Trainer, step: Step, lr: float, tally: Tally) -> Any:
        if kind == "raise":
            raise ValueError("this rank has had enough")
        if kind == "hang":
            time.sleep(3600)
        forward = trainer.engine.forward_training
        trainer.engine.forward_training = lambda batch: (
            forward(batch)[0] + torch.where(batch.is_target, math.nan, 0.0),
            0,
        )
        try:
            return plain(trainer, step, lr, tally)
        finally:
            trainer.engine.forward_training = forward

    Trainer.train_step = train_step
    try:
        enter(job)
    finally:
        Trainer.train_step = plain
