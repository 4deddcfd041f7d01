"""One rank in this process: whatever happens to a run or its states, the rest of it is as if nothing had."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from dti_ray.config import RunConfig
from dti_ray.data.interactions import open_dataset
from dti_ray.data.pipeline import TrainingRows
from dti_ray.errors import InputError, RunError
from dti_ray.model.backbone import build_model
from dti_ray.model.batch import PackedBatch
from dti_ray.storage import Storage
from dti_ray.telemetry import Line, read_lines
from dti_ray.train import checkpoint
from dti_ray.train.engine import TorchEngine
from dti_ray.train.link import Link
from dti_ray.train.loop import Tally, Trainer
from dti_ray.train.saver import Saver
from dti_ray.train.state import Progress
from dti_ray.train.world import World
from tests.builders import make_config, make_table, write_dataset

CPU = torch.device("cpu")
LENGTHS = [30, 12, 25, 40, 18, 33, 21, 27]


class StoppedError(Exception):
    """Stands for a power cut."""


class Listener(Link):
    """Remembers what was said; wants a stop, or gives notice, when a step begins."""

    def __init__(self, stop_at: int | None = None, notice_at: int | None = None) -> None:
        self.said: list[str] = []
        self.asked = 0
        self.stop_at, self.notice_at = stop_at, notice_at

    def say(self, text: str) -> None:
        self.said.append(text)

    def is_stop_wanted(self) -> bool:
        self.asked += 1
        return self.stop_at is not None and self.asked > self.stop_at

    def take_notice(self) -> bool:
        return self.asked == self.notice_at


class Unhurried(Link):
    """Leaves the writing thread the time that it needs between two steps, as longer steps do."""

    saver: Saver | None = None

    def beat(self) -> None:
        if self.saver is not None:
            for pending in self.saver.pending:
                pending.share.result()
            for manifest in self.saver.manifests:
                manifest.result()


class PoisonedEngine(TorchEngine):
    """Gives log-odds that are no numbers for one target, at some forward passes."""

    def __init__(self, config: RunConfig, poisoned: set[int]) -> None:
        super().__init__(build_model(config, make_table()), config, CPU)
        self.passes, self.poisoned = 0, poisoned

    def forward_training(self, batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor]:
        log_odds, text_loss = super().forward_training(batch)
        self.passes += 1
        if self.passes in self.poisoned:
            row, column = batch.is_target.nonzero()[0]
            mask = torch.zeros_like(log_odds)
            mask[row, column] = math.nan
            return log_odds + mask, text_loss
        return log_odds, text_loss


def tiny_run(root: Path, *overrides: str) -> RunConfig:
    return make_config(
        f"storage.root={root}", "data.name=tiny", "train.engine=torch", "cluster.workers=1", "packing.k=4",
        "packing.n=3", "packing.streams=2", "optim.targets_per_step=16", "optim.epochs=2", "train.log_targets=40",
        "eval.every_targets=150", "model.layers=1", "checkpoint.every_steps=2", "checkpoint.keep_last=3",
        "model.dropout=0.1", *overrides,
    )  # fmt: skip


def train(
    config: RunConfig, stop_after_step: int | None = None, link: Link | None = None, poisoned: set[int] | None = None
) -> Progress:
    storage = Storage(config.storage.root)
    rows = TrainingRows(open_dataset(storage, config.data.name), make_table(), config, through_ray=False)

    def report(_kind: str, line: Line, _progress: Progress) -> None:
        if stop_after_step is not None and line["step"] >= stop_after_step:
            raise StoppedError

    engine = PoisonedEngine(config, poisoned or set())
    trainer = Trainer(config, storage, rows, engine, World(CPU), report, link)
    if isinstance(link, Unhurried):
        link.saver = trainer.saver
    return trainer.run()


def losses(root: Path) -> list[tuple[float, float]]:
    return [(line["step"], line["loss"]) for line in read_lines(Storage(str(root)), "runs/run", "train")]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[float, float]]:
    root = tmp_path_factory.mktemp("undisturbed")
    write_dataset(root, LENGTHS)
    train(tiny_run(root))
    return losses(root)


@pytest.fixture
def cut_off(tmp_path: Path) -> RunConfig:
    """A run that died after step 9, with states at steps 4, 6 and 8."""
    write_dataset(tmp_path, LENGTHS)
    config = tiny_run(tmp_path)
    with pytest.raises(StoppedError):
        train(config, stop_after_step=9, link=Unhurried())
    assert [one.progress.step for one in checkpoint.list_checkpoints(Storage(str(tmp_path)), "runs/run")] == [4, 6, 8]
    return config


def test_run_goes_on_between_two_lines_of_metrics_with_equal_losses(
    cut_off: RunConfig, tmp_path: Path, expected: list[tuple[float, float]]
) -> None:
    listener = Listener()
    train(cut_off, link=listener)
    assert losses(tmp_path) == expected
    assert listener.said[0].startswith("restored step 8, loss 0.")
    assert "epoch 0 step 8 of the data" in listener.said[0]


def damage_newest(root: Path, how: str) -> str:
    storage = Storage(str(root))
    newest = checkpoint.list_checkpoints(storage, "runs/run")[-1]
    file = root / newest.path / "moments-00000.safetensors"
    if how == "flipped byte":
        content = bytearray(file.read_bytes())
        content[-100] ^= 1
        file.write_bytes(content)
    elif how == "half uploaded":
        (root / newest.path / "manifest.json").unlink()
        file.unlink()
    elif how == "file gone":
        file.unlink()
    else:
        (root / newest.path / "manifest.json").write_text('{"files": [')
    return newest.path


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("flipped byte", "has hash"),
        ("half uploaded", "has no manifest"),
        ("file gone", "cannot be read"),
        ("manifest cut", "has a damaged manifest"),
    ],
)
def test_damaged_newest_state_is_refused_with_its_reason_and_the_one_before_is_taken(
    cut_off: RunConfig, tmp_path: Path, expected: list[tuple[float, float]], how: str, reason: str
) -> None:
    path = damage_newest(tmp_path, how)
    listener = Listener()
    train(cut_off, link=listener)
    assert path in listener.said[0]
    assert reason in listener.said[0]
    assert listener.said[1].startswith("restored step 6,")
    assert losses(tmp_path) == expected
    assert not (tmp_path / path).exists(), "it is deleted once a newer one is complete"


def test_run_whose_states_are_all_damaged_is_not_silently_started_anew(cut_off: RunConfig, tmp_path: Path) -> None:
    for file in (tmp_path / "runs/run/checkpoints").rglob("weights-*"):
        file.write_bytes(b"no weights")
    with pytest.raises(InputError, match="no checkpoint of it can be used") as caught:
        train(cut_off)
    assert len(caught.value.faults) == 4


def test_state_of_another_configuration_is_refused(cut_off: RunConfig) -> None:
    other = cut_off.model_copy(update={"optim": cut_off.optim.model_copy(update={"lr": 0.1})})
    with pytest.raises(InputError, match="was written under configuration"):
        train(other)
    quiet = cut_off.model_copy(update={"train": cut_off.train.model_copy(update={"log_targets": 99})})
    assert train(quiet), "how often it reports may change"


def test_litter_of_a_dead_attempt_is_removed_and_nothing_else(cut_off: RunConfig, tmp_path: Path) -> None:
    run = tmp_path / "runs/run"
    torso = run / "checkpoints/step-00000010-deadbeef"
    torso.mkdir()
    (torso / "weights-00000.safetensors").write_bytes(b"half of it")
    cut = run / f"metrics/.train.jsonl.{'0' * 32}"
    cut.write_bytes(b"half of it")
    (run / "config.yaml").write_text("stays")
    train(cut_off)
    assert not torso.exists()
    assert not cut.exists()
    assert (run / "config.yaml").exists()
    found = list((run / "checkpoints").iterdir())
    assert {path.name.rpartition("-")[2] for path in found if path.name > "step-00000009"} != {"deadbeef"}
    assert len(found) == len(checkpoint.list_checkpoints(Storage(str(tmp_path)), "runs/run"))


def test_stop_is_a_state_at_the_next_step_and_the_same_command_goes_on(
    tmp_path: Path, expected: list[tuple[float, float]]
) -> None:
    write_dataset(tmp_path, LENGTHS)
    config = tiny_run(tmp_path, "checkpoint.every_steps=1000")
    progress = train(config, link=Listener(stop_at=5))
    assert progress.step == 5
    newest = checkpoint.list_checkpoints(Storage(str(tmp_path)), "runs/run")[-1]
    assert newest.progress == progress
    train(config)
    assert losses(tmp_path) == expected


def test_notice_is_a_state_and_the_run_goes_on(tmp_path: Path, expected: list[tuple[float, float]]) -> None:
    write_dataset(tmp_path, LENGTHS)
    config = tiny_run(tmp_path, "checkpoint.every_steps=1000", "checkpoint.keep_last=9")
    train(config, link=Listener(notice_at=6))
    kept = checkpoint.list_checkpoints(Storage(str(tmp_path)), "runs/run")
    assert 6 in [one.progress.step for one in kept]
    assert losses(tmp_path) == expected


def test_nonfinite_loss_names_the_users_and_leaves_the_state_before_it(tmp_path: Path) -> None:
    write_dataset(tmp_path, LENGTHS)
    with pytest.raises(RunError, match=r"step 6: its loss is not finite; rows of users user \d;") as caught:
        train(tiny_run(tmp_path), poisoned={6})
    assert "train.on_nonfinite=skip" in str(caught.value)
    kept = checkpoint.list_checkpoints(Storage(str(tmp_path)), "runs/run")
    assert kept[-1].progress.step == 4


def test_skipped_steps_change_nothing_and_are_counted_up_to_the_limit(tmp_path: Path) -> None:
    write_dataset(tmp_path, LENGTHS)
    listener = Listener()
    progress = train(tiny_run(tmp_path, "train.on_nonfinite=skip"), link=listener, poisoned={6, 7})
    assert progress.skipped == 2
    assert progress.targets == 2 * open_dataset(Storage(str(tmp_path)), "tiny").targets[0]
    assert sum("left out" in text for text in listener.said) == 2
    assert all(math.isfinite(line[1]) for line in losses(tmp_path))
    limited = tiny_run(tmp_path, "train.on_nonfinite=skip", "train.max_skipped=1", "train.run=limited")
    with pytest.raises(RunError, match=r"step 7.*1 steps were left out before"):
        train(limited, poisoned={6, 7})


def test_lines_of_metrics_say_how_long_checkpoints_held_training_up(tmp_path: Path) -> None:
    write_dataset(tmp_path, LENGTHS)
    train(tiny_run(tmp_path))
    lines = read_lines(Storage(str(tmp_path)), "runs/run", "train")
    assert 0 < sum(line["checkpoint_s"] for line in lines) < 5


def test_sums_of_ranks_go_on_in_a_world_of_another_size() -> None:
    saved = [Tally(loss=1.0, targets=3, earlier_s=2.0).saved(), Tally(loss=2.0, targets=4, earlier_s=2.0).saved()]
    assert [Tally.of(saved, rank, 2).loss for rank in (0, 1)] == [1.0, 2.0]
    whole = Tally.of(saved, 0, 1)
    assert (whole.loss, whole.targets) == (3.0, 7)
    assert 2.0 <= whole.earlier_s < 2.5
    assert Tally.of(saved, 1, 4).loss == 0
    assert json.dumps(saved)
