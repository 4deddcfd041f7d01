"""One run of a study, trained in this process: the loop that Ray Train's workers run, without Ray.

Stage: study, training. In: a configuration and its `Inputs`. Out: `Trained`; a run's folder, as of `dti-ray train`.
Invariant: a run that was killed goes on from its newest state, and what it cost is counted over all its attempts: time
is read from the lines of metrics, which go back with the state.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass

import torch

from dti_ray.config import RunConfig
from dti_ray.data.pipeline import AHEAD_STEPS, RowsAhead, TrainingRows
from dti_ray.data.plan import Position
from dti_ray.estimate import flops_per_target
from dti_ray.model.backbone import build_model
from dti_ray.storage import MANIFEST, Storage
from dti_ray.telemetry import Line, read_lines
from dti_ray.train.checkpoint import Checkpoint, by_quality, list_checkpoints
from dti_ray.train.engine import build_engine
from dti_ray.train.identity import write_identity
from dti_ray.train.inputs import Inputs
from dti_ray.train.link import Link
from dti_ray.train.loop import Trainer, passes_per_step
from dti_ray.train.state import Progress
from dti_ray.train.world import World


@dataclass(frozen=True)
class Trained:
    """What came of one run.

    Attributes:
        seconds: of training steps at the pace of the median line of metrics (a sliding tail at that of its own),
            packing included; validations and checkpoints are left out.
        elapsed_seconds: the same, as a clock has it: with the minutes in which the machine stood still.
        loop_seconds: of the whole loop.
        targets: trained, over all epochs.
        tokens: trained, over all epochs.
        flops: of training, forward and backward.
        best_targets: trained until the state that is best on validation.
        valid_auc: of that state while training.
    """

    seconds: float
    elapsed_seconds: float
    loop_seconds: float
    targets: int
    tokens: int
    flops: float
    best_targets: int
    valid_auc: float


def train_run(
    config: RunConfig,
    storage: Storage,
    inputs: Inputs,
    device: torch.device,
    on_line: Callable[[str, Line], None],
    on_text: Callable[[str], None],
) -> Trained:
    """Train a run to its end, from its newest state if it has one.

    Args:
        config: of the run; `train.engine` is torch.
        storage: the root.
        inputs: of the run.
        device: where to train; `settle` was called for it.
        on_line: called with each line of metrics, as (kind, line).
        on_text: called with what there is to say besides.

    Raises:
        RunError: a loss or gradient is not finite.
        StorageError: a state could not be written in time, or read.
    """

    def report(kind: str, line: Line, _progress: Progress) -> None:
        on_line(kind, line)

    write_identity(config, storage, inputs.tokenizer)
    folder = f"runs/{config.train.run}"
    rows = TrainingRows(inputs.dataset, inputs.table, config, through_ray=False)
    found = list_checkpoints(storage, folder)
    start = found[-1].progress.position if found else Position()
    with closing(RowsAhead(rows, 0, 1, AHEAD_STEPS, start)) as ahead:
        model = build_model(config, inputs.table)
        engine = build_engine(model, config, passes_per_step(config, rows, 1), device)
        progress = Trainer(config, storage, rows, engine, World(device), report, _Teller(on_text)).run(ahead.at)
    best = best_state(storage, config.train.run)
    assert best is not None, "a run ends with a state"
    assert best.progress.valid_auc is not None, "and with a validation"
    seconds, elapsed_seconds = training_seconds(read_lines(storage, folder, "train"), config.optim.sliding_tail)
    return Trained(
        seconds=seconds,
        elapsed_seconds=elapsed_seconds,
        loop_seconds=progress.seconds,
        targets=progress.targets,
        tokens=progress.tokens,
        flops=flops_per_target(config, inputs.dataset, inputs.table) * progress.targets,
        best_targets=best.progress.targets,
        valid_auc=best.progress.valid_auc,
    )


def training_seconds(lines: Sequence[Line], tail: float) -> tuple[float, float]:
    """Return the seconds of training steps that lines of metrics tell, without the waits for states.

    Args:
        lines: of kind `train`, all of a run; each stands for the targets since the one before.
        tail: `optim.sliding_tail`; its targets cost many times those before it, so it has a pace of its own.

    Returns:
        At the pace of the median line, which a machine that others use may stop now and then without effect; and
        their plain sum.
    """
    ends = [line["targets"] for line in lines]
    tail_at = (1 - tail) * ends[-1]
    parts: list[list[tuple[float, float]]] = [[], [], []]  # before the tail, the line that it begins in, and the tail
    for start, end, line in zip([0.0, *ends], ends, lines, strict=False):
        seconds = (end - start) / line["targets_per_s"] - line["checkpoint_s"]
        parts[(start >= tail_at) + (end > tail_at)].append((end - start, seconds))
    paced = sum(
        statistics.median(seconds / targets for targets, seconds in part) * sum(targets for targets, _ in part)
        for part in parts
        if part
    )
    return paced, sum(seconds for part in parts for _, seconds in part)


def best_state(storage: Storage, run: str) -> Checkpoint | None:
    """Return the best complete state of a run by validation, or None where it has none."""
    return next(iter(by_quality(list_checkpoints(storage, f"runs/{run}"))), None)


def drop_states(storage: Storage, run: str, is_best_kept: bool) -> None:
    """Delete the states of a run that has answered; nothing happens where that was done.

    Args:
        storage: the root.
        run: its name.
        is_best_kept: leave the best one.
    """
    for state in by_quality(list_checkpoints(storage, f"runs/{run}"))[int(is_best_kept) :]:
        storage.delete(f"{state.path}/{MANIFEST}")  # first, so that no reader meets a torso
        storage.delete(state.path)


class _Teller(Link):
    """Hands the loop's remarks on."""

    def __init__(self, on_text: Callable[[str], None]) -> None:
        self.on_text = on_text

    def say(self, text: str) -> None:
        self.on_text(text)
