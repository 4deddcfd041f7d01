from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dti_ray.config import RunConfig
from dti_ray.data.interactions import open_dataset
from dti_ray.data.pipeline import TrainingRows
from dti_ray.infer.evaluate import evaluate_run
from dti_ray.model.backbone import build_model
from dti_ray.storage import Storage
from dti_ray.telemetry import Line, read_lines
from dti_ray.train import checkpoint
from dti_ray.train.engine import TorchEngine
from dti_ray.train.loop import Trainer, learning_rate
from dti_ray.train.state import Progress
from dti_ray.train.world import World
from tests.builders import make_config, make_table, write_dataset

CPU = torch.device("cpu")
LENGTHS = [30, 12, 25, 40, 18, 33, 21, 27]


class StoppedError(Exception):
    """Stands for a power cut."""


def tiny_run(root: Path, *overrides: str) -> RunConfig:
    return make_config(
        f"storage.root={root}", "data.name=tiny", "train.engine=torch", "cluster.workers=1", "packing.k=4",
        "packing.n=3", "packing.streams=2", "optim.targets_per_step=16", "optim.epochs=2", "train.log_targets=16",
        "eval.every_targets=64", "model.layers=2", *overrides,
    )  # fmt: skip


def train(config: RunConfig, stop_after_step: int | None = None) -> tuple[Progress, TorchEngine]:
    """Run one rank in this process, as `launch` would; raise StoppedError after a step."""
    storage = Storage(config.storage.root)
    dataset = open_dataset(storage, config.data.name)
    rows = TrainingRows(dataset, make_table(), config, through_ray=False)

    def report(_kind: str, line: Line, _progress: Progress) -> None:
        if stop_after_step is not None and (line["step"] or 0) >= stop_after_step:
            raise StoppedError

    engine = TorchEngine(build_model(config, make_table()), config, CPU)
    return Trainer(config, storage, rows, engine, World(CPU), report).run(), engine


def assert_same_weights(one: TorchEngine, other: TorchEngine) -> None:
    weights = other.model.trained()
    for name, weight in one.model.trained().items():
        assert torch.equal(weight, weights[name]), name


def test_run_trains_every_target_once_an_epoch_and_reports_each_step(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path, LENGTHS)
    config = tiny_run(tmp_path)
    progress, _ = train(config)
    assert progress.targets == 2 * dataset.targets[0]
    assert progress.step == 2 * round(dataset.targets[0] / 16)
    lines = read_lines(dataset.storage, "runs/run", "train")
    assert [line["step"] for line in lines] == sorted({line["step"] for line in lines})
    assert lines[-1]["targets"] == progress.targets
    assert all(line["loss"] > 0 and 0 <= line["padding"] < 1 for line in lines)
    assert read_lines(dataset.storage, "runs/run", "valid")[-1]["auc"] == progress.valid_auc


@pytest.mark.parametrize(("stop_after", "k_min"), [(5, "null"), (9, "null"), (16, "null"), (16, "1")])
def test_law_9_a_stopped_run_goes_on_with_the_same_losses_and_ends_in_the_same_weights(
    tmp_path: Path, stop_after: int, k_min: str
) -> None:
    for name in ("whole", "stopped"):
        write_dataset(tmp_path / name, LENGTHS)
    overrides = ("model.dropout=0.1", f"packing.k_min={k_min}")
    _, whole = train(tiny_run(tmp_path / "whole", *overrides))
    stopped_config = tiny_run(tmp_path / "stopped", *overrides)
    with pytest.raises(StoppedError):
        train(stopped_config, stop_after_step=stop_after)
    _, resumed = train(stopped_config)
    assert_same_weights(whole, resumed)
    expected, found = (
        [(line["step"], line["loss"]) for line in read_lines(Storage(str(tmp_path / name)), "runs/run", "train")]
        for name in ("whole", "stopped")
    )
    assert found == expected


def test_run_with_adapters_goes_on_and_is_scored_from_adapters_alone(tmp_path: Path) -> None:
    for name in ("whole", "stopped"):
        write_dataset(tmp_path / name, LENGTHS)
    overrides = ("lora.rank=16", "lora.dropout=0.1", "optim.lr=0.01", "optim.epochs=1")
    _, whole = train(tiny_run(tmp_path / "whole", *overrides))
    config = tiny_run(tmp_path / "stopped", *overrides)
    with pytest.raises(StoppedError):
        train(config, stop_after_step=9)
    _, resumed = train(config)
    assert_same_weights(whole, resumed)
    storage = Storage(config.storage.root)
    kept, weights = checkpoint.read_best(storage, "runs/run")
    assert all("lora_" in name or not name.startswith("decoder") for name in weights)
    adapter_bytes = 4 * sum(weight.numel() for weight in weights.values())
    assert kept.size_bytes < 1.2 * 3 * adapter_bytes, "adapters and two moments of each"
    evaluation = evaluate_run(config, storage, make_table(), "valid", lambda _done, _all: None)
    assert evaluation.metrics.auc.value == pytest.approx(kept.progress.valid_auc, abs=1e-9)


def test_run_in_bf16_is_scored_as_it_was_validated(tmp_path: Path) -> None:
    write_dataset(tmp_path, LENGTHS)
    config = tiny_run(tmp_path, "train.precision=bf16", "lora.rank=4", "optim.epochs=1", "eval.every_targets=9999")
    train(config)
    storage = Storage(config.storage.root)
    evaluation = evaluate_run(config, storage, make_table(), "valid", lambda _done, _all: None)
    (line,) = read_lines(storage, "runs/run", "valid")
    assert evaluation.metrics.log_loss.value == pytest.approx(line["log_loss"], abs=1e-9)


def test_same_seed_gives_the_same_run_and_another_seed_another_one(tmp_path: Path) -> None:
    losses = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_dataset(tmp_path / name, LENGTHS)
        train(tiny_run(tmp_path / name, f"train.seed={seed}", "optim.epochs=1", "eval.every_targets=9999"))
        losses.append([line["loss"] for line in read_lines(Storage(str(tmp_path / name)), "runs/run", "train")])
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


def test_every_k_takes_the_same_number_of_steps(tmp_path: Path) -> None:
    steps = set()
    for k, mixture in (("1", "null"), ("3", "null"), ("20", "2"), ("all", "null")):
        write_dataset(tmp_path / k, LENGTHS)
        changes = (f"packing.k={k}", f"packing.k_min={mixture}", "model.layers=1", "eval.every_targets=9999")
        progress, _ = train(tiny_run(tmp_path / k, *changes))
        steps.add((progress.step, progress.targets))
    assert len(steps) == 1


def test_only_the_best_and_the_last_states_are_kept(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path, LENGTHS)
    progress, _ = train(tiny_run(tmp_path, "checkpoint.keep_last=1"))
    kept = checkpoint.list_checkpoints(dataset.storage, "runs/run")
    assert len(kept) <= 2
    assert kept[-1].progress == progress
    aucs = [line["auc"] for line in read_lines(dataset.storage, "runs/run", "valid")]
    assert checkpoint.by_quality(kept)[0].progress.valid_auc == max(aucs)


def test_learning_rate_rises_then_falls_to_its_final_share() -> None:
    optim = make_config("optim.warmup=0.1", "optim.final_lr=0.05", "optim.lr=1.0").optim
    assert learning_rate(0.05, optim) == pytest.approx(0.5)
    assert learning_rate(0.1, optim) == pytest.approx(1.0)
    assert learning_rate(0.55, optim) == pytest.approx(0.525)
    assert learning_rate(1.0, optim) == pytest.approx(0.05)


def test_utilisation_is_flops_over_the_stated_peak(tmp_path: Path) -> None:
    write_dataset(tmp_path, LENGTHS)
    train(tiny_run(tmp_path, "train.run=known", "train.peak_tflops=0.5", "optim.epochs=1"))
    train(tiny_run(tmp_path, "train.run=unknown", "optim.epochs=1"))
    storage = Storage(str(tmp_path))
    assert all(0 < line["mfu"] < 1 for line in read_lines(storage, "runs/known", "train"))
    assert not any("mfu" in line for line in read_lines(storage, "runs/unknown", "train"))
