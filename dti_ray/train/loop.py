"""The training loop: rows in, steps, validations and checkpoints out.

Stage: loop; free of Ray, so that a test or a notebook runs it in one process. In: an `Engine`, the rows of a
run, the other ranks. Out: `Progress`, metrics, checkpoints.
Invariant: a step is counted in targets over all ranks; its loss is (sum over all its targets) / (their global
number), so worker count and accumulation change nothing.
"""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dti_ray.config import OptimConfig, RunConfig
from dti_ray.data.interactions import read_all
from dti_ray.data.packing import PackedRow
from dti_ray.data.pipeline import EMPTY_ROW, StepRows, TrainingRows
from dti_ray.data.plan import Position, derive_seed
from dti_ray.errors import RunError
from dti_ray.infer.evaluate import join, score_rows, sliding_rows
from dti_ray.metrics import auc, log_loss
from dti_ray.model.batch import PackedBatch, collate_pass
from dti_ray.model.flops import count_flops, count_work, peak_flops
from dti_ray.model.loss import loss_sum
from dti_ray.storage import Storage
from dti_ray.telemetry import Line, MetricSink
from dti_ray.train.engine import Engine
from dti_ray.train.link import Link
from dti_ray.train.nonfinite import leave_out, users_of_step
from dti_ray.train.saver import Saver
from dti_ray.train.state import Progress
from dti_ray.train.world import World

Report = Callable[[str, Line, Progress], None]
RowsAt = Callable[[Position], Iterator[tuple[Position, StepRows]]]


@dataclass
class Tally:
    """Sums since the last line of metrics, of this rank; they are part of a saved state."""

    loss: float = 0.0
    targets: int = 0
    tokens: int = 0
    padded_tokens: int = 0
    flops: int = 0
    wait_s: float = 0.0
    checkpoint_s: float = 0.0
    earlier_s: float = 0.0
    since: float = field(default_factory=time.monotonic)

    @classmethod
    def of(cls, saved: Sequence[Mapping[str, Any]], rank: int, world: int) -> Tally:
        """Return a rank's part of what all ranks had counted: its own, or on another number of ranks all on rank 0."""
        if len(saved) == world:
            return cls(**saved[rank])
        if rank > 0 or not saved:
            return cls()
        sums: dict[str, Any] = {name: sum(one[name] for one in saved) for name in saved[0]}
        return cls(**{**sums, "earlier_s": sums["earlier_s"] / len(saved)})

    @property
    def elapsed_s(self) -> float:
        """Seconds that the sums stand for."""
        return self.earlier_s + time.monotonic() - self.since

    def saved(self) -> dict[str, float]:
        """Return what `of` takes."""
        values = asdict(self)
        del values["since"]
        return {**values, "earlier_s": self.elapsed_s}


@dataclass(frozen=True)
class Step:
    """One step of one rank, with what all ranks know when it begins.

    Attributes:
        is_state_written: every rank's share of the oldest state under way is written.
        is_stop_wanted: some rank was asked to end the run.
        is_save_wanted: some rank was told that its machine will go away.
    """

    position: Position
    rows: StepRows
    global_targets: int
    global_tokens: int
    wait_s: float
    is_state_written: bool = False
    is_stop_wanted: bool = False
    is_save_wanted: bool = False


class Trainer:
    """One rank of a run.

    Args:
        config: of the run.
        storage: the root.
        rows: of the run, for any rank.
        engine: holds weights and optimizer.
        world: the other ranks.
        report: called on every rank at each line of metrics: (kind, line, progress).
        link: to whoever launched this rank.
    """

    def __init__(
        self,
        config: RunConfig,
        storage: Storage,
        rows: TrainingRows,
        engine: Engine,
        world: World,
        report: Report,
        link: Link | None = None,
    ) -> None:
        self.config, self.storage, self.rows = config, storage, rows
        self.engine, self.world, self.report = engine, world, report
        self.link, self.is_noticed = link or Link(), False
        self.folder = f"runs/{config.train.run}"
        attempt = world.gather(uuid.uuid4().hex[:8])[0]
        self.saver = Saver(storage, self.folder, engine, world, config, attempt)
        self.passes = passes_per_step(config, rows, world.size)
        stated = config.train.peak_tflops
        self.peak_flops = peak_flops(engine.device) if stated is None else stated * 1e12
        self.validation = sliding_rows(
            read_all(rows.dataset), rows.table, config, "valid", config.eval.max_valid_targets
        )[world.rank :: world.size]

    def run(self, rows_at: RowsAt | None = None) -> Progress:
        """Train from the newest state to the end, or until the link wants a stop.

        Args:
            rows_at: gives the rows of the steps from a position on, where someone reads ahead; None reads them here.

        Raises:
            RunError: a loss or gradient is not finite and `train.on_nonfinite` does not allow it.
            StorageError: a state could not be written in time.
        """
        progress, tally = self.restore()
        self.link.reach(progress.step)
        rows = (rows_at or self.rows_at)(progress.position)
        with MetricSink(self.storage, self.folder, progress.step) if self.world.rank == 0 else nullcontext() as sink:
            return self.train(rows, sink, progress, tally)

    def train(
        self, rows: Iterator[tuple[Position, StepRows]], sink: MetricSink | None, progress: Progress, tally: Tally
    ) -> Progress:
        """Train from where the run stands; see `run`."""
        progress = self.validate_and_save(sink, progress, tally)
        started = time.monotonic() - progress.seconds
        for step in self.steps(rows):
            self.save_if_asked(step, progress, tally)
            if step.is_stop_wanted:
                break
            lr = learning_rate(progress.targets / self.rows.total_targets, self.config.optim)
            grad_norm, suspect = self.train_step(step, lr, tally)
            if not math.isfinite(grad_norm):
                progress = self.leave_out(step, progress, suspect)
            before, progress = progress, self.advance(progress, step, time.monotonic() - started)
            self.link.reach(progress.step)
            is_last = progress.targets >= self.rows.total_targets
            if is_last or _crossed(before, progress, self.config.train.log_targets):
                progress = self.log(sink, tally, progress, lr, grad_norm)
                tally = Tally()
            progress = self.validate_and_save(sink, progress, tally)
        self.saver.finish()
        return progress

    def restore(self) -> tuple[Progress, Tally]:
        """Return where the run stands, with the engine brought to that state."""
        restored = self.saver.restore()
        for one in restored.refused:
            self.link.say(f"checkpoint {one.path} is refused: {one.reason}")
        if restored.checkpoint is None:
            return Progress(), Tally()
        state, progress = restored.checkpoint.state, restored.checkpoint.progress
        loss = "none yet" if progress.loss is None else f"{progress.loss:.6f}"
        where = f"epoch {progress.position.epoch} step {progress.position.step} of the data"
        self.link.say(
            f"restored step {progress.step}, loss {loss}, {progress.targets:,} targets, {where}; "
            f"written by {len(state.tallies)} workers as {restored.checkpoint.path}"
        )
        return progress, Tally.of(state.tallies, self.world.rank, self.world.size)

    def save_if_asked(self, step: Step, progress: Progress, tally: Tally) -> None:
        """Before a step: make the state under way visible if it is written, save the present one if that is wanted."""
        if step.is_state_written:
            self.saver.complete()
        if step.is_stop_wanted or step.is_save_wanted:
            tally.checkpoint_s += self.saver.save(progress, tally.saved())
            self.is_noticed = False

    def validate_and_save(self, sink: MetricSink | None, progress: Progress, tally: Tally) -> Progress:
        """After a step, or when a run goes on: validate and save if that is due."""
        is_validated, started = self.owes_validation(progress), time.monotonic()
        if is_validated:
            progress = self.validate(sink, progress)
            tally.since += time.monotonic() - started  # a line of metrics is about training
        if is_validated or self.is_state_due(progress):
            tally.checkpoint_s += self.saver.save(progress, tally.saved())
        return progress

    def owes_validation(self, progress: Progress) -> bool:
        """Say whether a validation is due: by the targets since the last one, or at the end."""
        if progress.targets >= self.rows.total_targets:
            return progress.validated < progress.targets
        every = self.config.eval.every_targets
        return progress.targets // every != progress.validated // every

    def is_state_due(self, progress: Progress) -> bool:
        """Say whether a state is due beside those at validations."""
        every = self.config.checkpoint.every_steps
        return every is not None and progress.step > 0 and progress.step % every == 0

    def rows_at(self, position: Position) -> Iterator[tuple[Position, StepRows]]:
        """Return this rank's rows of the steps from a position on."""
        return self.rows.steps(position, self.world.rank, self.world.size)

    def steps(self, rows_of_steps: Iterator[tuple[Position, StepRows]]) -> Iterator[Step]:
        """Yield the steps that are left, each with the time that its rows kept this rank waiting."""
        self.link.beat()
        asked = time.monotonic()
        for position, rows in rows_of_steps:
            waited = time.monotonic() - asked
            local = (sum(row.targets for row in rows), self.tokens(rows), *self.signals())
            targets, tokens, written, stops, notices = (int(value) for value in self.world.sum(local))
            yield Step(position, rows, targets, tokens, waited, written == self.world.size, stops > 0, notices > 0)
            self.link.beat()
            asked = time.monotonic()

    def signals(self) -> tuple[bool, bool, bool]:
        """Return what this rank has to tell the others when a step begins."""
        self.is_noticed = self.link.take_notice() or self.is_noticed
        return self.saver.is_share_written(), self.link.is_stop_wanted(), self.is_noticed

    def tokens(self, rows: StepRows) -> int:
        """Return the tokens of this rank's part of a step: those of its rows, and the prefix once a pass."""
        inner = sum(row.size_tokens - row.prefix_tokens for row in rows)
        return inner + self.passes * len(self.rows.table.prefix) if rows else 0

    def train_step(self, step: Step, lr: float, tally: Tally) -> tuple[float, np.ndarray]:
        """Run all passes of one step and apply the gradient.

        Returns:
            The gradient's norm; not finite, on every rank alike, where the step changed nothing because a loss or
            the gradient is not. And for each target of this rank whether its log-odds are not finite.
        """
        epoch, number = step.position.epoch, step.position.step
        torch.manual_seed(derive_seed(self.config.train.seed, "dropout", epoch, number, self.world.rank))
        self.engine.set_training(True)
        losses, suspects = [], [np.zeros(0, dtype=bool)]
        for rows in _split(step.rows, self.passes):
            self.link.beat()
            batch = collate_pass(rows, self.rows.table, self.config.model.attention)
            tally.tokens += batch.size_tokens
            if self.peak_flops is not None:
                work = count_work(batch, self.engine.model.rules)
                tally.flops += count_flops(self.engine.model, work).train
            batch = batch.to(self.engine.device)
            log_odds, text_loss = self.engine.forward_training(batch)
            total = loss_sum(log_odds, batch.labels, batch.is_target)
            losses.append(float(total.detach()))
            suspects.append(np.zeros(sum(row.targets for row in rows), dtype=bool))
            if not math.isfinite(losses[-1]):
                suspects[-1] = ~torch.isfinite(log_odds[batch.is_target]).cpu().numpy()
                total = total * math.nan  # so that every rank finds a gradient that is not finite
            self.engine.backward((total + text_loss) / max(1, step.global_targets))
            tally.padded_tokens += batch.tokens.numel()
        tally.wait_s += step.wait_s
        grad_norm = self.engine.step(lr)
        if math.isfinite(grad_norm):
            for loss in losses:
                tally.loss += loss
            tally.targets += sum(row.targets for row in step.rows)
        return grad_norm, np.concatenate(suspects)

    def leave_out(self, step: Step, progress: Progress, suspect: np.ndarray) -> Progress:
        """Count a step that changed nothing, or end the run; every rank must call it."""
        found = users_of_step(self.rows, step.position, self.world, suspect)
        try:
            progress, text = leave_out(self.config, progress, self.world.gather(found))
        except RunError:
            self.saver.finish()  # the state before it is kept, as the message says
            raise
        self.link.say(text)
        return progress

    def advance(self, progress: Progress, step: Step, seconds: float) -> Progress:
        """Count one step."""
        return replace(
            progress,
            step=progress.step + 1,
            targets=progress.targets + step.global_targets,
            tokens=progress.tokens + step.global_tokens,
            seconds=seconds,
            position=Position(step.position.epoch, step.position.step + 1),
            valid_auc=None,
        )

    def log(self, sink: MetricSink | None, tally: Tally, progress: Progress, lr: float, grad_norm: float) -> Progress:
        """Report the means since the last line, over all ranks; return the progress with the loss in it."""
        elapsed = tally.elapsed_s
        loss, targets, tokens, padded, wait, flops, blocked = self.world.sum(
            (
                tally.loss, tally.targets, tally.tokens, tally.padded_tokens, tally.wait_s, tally.flops,
                tally.checkpoint_s,
            )
        )  # fmt: skip
        line: Line = {
            "step": progress.step,
            "targets": progress.targets,
            "tokens": progress.tokens,
            "loss": loss / max(1.0, targets),
            "lr": lr,
            "grad_norm": grad_norm,
            "targets_per_s": targets / elapsed,
            "tokens_per_s": tokens / elapsed,
            "padding": 1.0 - tokens / padded,
            "data_wait": wait / self.world.size / elapsed,
            "checkpoint_s": blocked / self.world.size,
            "skipped": progress.skipped,
            "seconds": progress.seconds,
        }
        if self.peak_flops is not None:
            line["mfu"] = flops / (elapsed * self.world.size * self.peak_flops)
        progress = replace(progress, loss=line["loss"])
        self.tell(sink, "train", line, progress)
        return progress

    def validate(self, sink: MetricSink | None, progress: Progress) -> Progress:
        """Score the validation split under sliding inference."""
        self.engine.set_training(False)
        mine = score_rows(
            self._forward,
            self.validation,
            self.rows.table,
            self.engine.device,
            self.config.train.rows_per_pass,
            self.config.model.attention,
        )
        scores = join(self.world.gather(mine)).predictions
        valid_auc = float(auc(scores.label, scores.probability))
        progress = replace(progress, valid_auc=valid_auc, validated=progress.targets)
        line: Line = {
            "step": progress.step,
            "targets": progress.targets,
            "auc": valid_auc,
            "log_loss": float(log_loss(scores.label, scores.probability)),
            "seconds": progress.seconds,
        }
        self.tell(sink, "valid", line, progress)
        return progress

    def _forward(self, batch: PackedBatch) -> Tensor:
        self.link.beat()
        return self.engine.forward(batch)

    def tell(self, sink: MetricSink | None, kind: str, line: Line, progress: Progress) -> None:
        """Write a line on rank 0 and report it on every rank."""
        if sink is not None:
            sink.add(kind, line)
            sink.flush()
        self.report(kind, line, progress)


def passes_per_step(config: RunConfig, rows: TrainingRows, world: int) -> int:
    """Return the forward passes of one step: the same on every rank, whatever rows it has."""
    return math.ceil(config.packing.streams // world * rows.rows_per_step / config.train.rows_per_pass)


def learning_rate(done: float, optim: OptimConfig) -> float:
    """Return the rate after a share of all targets: linear warm-up, then a cosine down to `final_lr`."""
    if done < optim.warmup:
        return optim.lr * max(done / optim.warmup, 1e-3)
    turn = (done - optim.warmup) / max(1.0 - optim.warmup, 1e-9)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, turn)))
    return optim.lr * (optim.final_lr + (1.0 - optim.final_lr) * cosine)


def _crossed(before: Progress, after: Progress, every: int) -> bool:
    return before.targets // every != after.targets // every


def _split(rows: StepRows, passes: int) -> list[list[PackedRow]]:
    """Deal rows to exactly `passes` batches of about equal size; a pass without rows takes an empty one."""
    size = math.ceil(max(len(rows), 1) / passes)
    parts = [list(rows[i * size : (i + 1) * size]) for i in range(passes)]
    return [part or [EMPTY_ROW] for part in parts]
