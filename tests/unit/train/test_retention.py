from __future__ import annotations

from dti_ray.config import CheckpointConfig
from dti_ray.storage import FileEntry
from dti_ray.train.checkpoint import Checkpoint, TrainState
from dti_ray.train.retention import is_cut_off, to_keep
from dti_ray.train.state import Progress


def states(*aucs: float | None, gb: float = 1.0) -> list[Checkpoint]:
    file = FileEntry("weights-00000.safetensors", int(gb * 10**9), "")
    return [
        Checkpoint(f"step-{step}", (file,), TrainState(Progress(step=step, valid_auc=auc), (), ""))
        for step, auc in enumerate(aucs, start=1)
    ]


def steps(kept: list[Checkpoint]) -> list[int]:
    return [one.progress.step for one in kept]


def test_newest_and_best_stay() -> None:
    found = states(None, 0.70, 0.74, 0.71, None)
    assert steps(to_keep(found, CheckpointConfig(keep_best=1, keep_last=1))) == [5, 3]
    assert steps(to_keep(found, CheckpointConfig(keep_best=2, keep_last=2))) == [5, 3, 4]
    assert to_keep([], CheckpointConfig()) == []


def test_budget_drops_the_least_precious_and_never_the_newest() -> None:
    found = states(None, 0.70, 0.74, 0.71, None)
    keep = {"keep_best": 2, "keep_last": 3}
    assert steps(to_keep(found, CheckpointConfig(**keep, max_gb=2))) == [5, 3]
    assert steps(to_keep(found, CheckpointConfig(**keep, max_gb=1.5))) == [5]
    assert steps(to_keep(found, CheckpointConfig(**keep, max_gb=0.1))) == [5]


def test_writes_that_were_cut_off_are_known_by_their_names() -> None:
    assert is_cut_off("runs/run/metrics/.train.jsonl.0123456789abcdef0123456789abcdef")
    assert not is_cut_off("runs/run/metrics/train.jsonl")
    assert not is_cut_off("runs/run/.validate_storage_marker")
