"""The training loop: rows in, steps, validations and checkpoints out.

Stage: loop; free of Ray, so that a test or a notebook runs it in one process. In: an `Engine`, the rows of a
run, the other ranks. Out: `Progress`, metrics, checkpoints.
Invariant: a step is counted in targets over all ranks; its loss is (sum over all its targets) / (their global
number), so worker count and accumulation change nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from dti_ray.config import OptimConfig, RunConfig
from dti_ray.data.interactions import read_all
from dti_ray.data.packing import PackedRow
from dti_ray.data.pipeline import EMPTY_ROW, StepRows, TrainingRows
from dti_ray.data.plan import Position, derive_seed
from dti_ray.infer.evaluate import join, score_rows, sliding_rows
from dti_ray.metrics import auc, log_loss
from dti_ray.model.batch import collate_pass
from dti_ray.model.flops import count_flops, count_work, peak_flops
from dti_ray.model.loss import loss_sum
from dti_ray.storage import Storage
from dti_ray.telemetry import Line, MetricSink
from dti_ray.train import checkpoint
from dti_ray.train.checkpoint import Progress
from dti_ray.train.engine import Engine
from dti_ray.train.world import World

Report = Callable[[str, Line, Progress], None]


@dataclass
class Tally:
    """Sums since the last line of metrics, of this rank."""

    loss: float = 0.0
    targets: int = 0
    tokens: int = 0
    padded_tokens: int = 0
    flops: int = 0
    wait_s: float = 0.0
    since: float = 0.0


@dataclass(frozen=True)
class Step:
    """One step of one rank, with what all ranks know of it."""

    position: Position
    rows: StepRows
    global_targets: int
    global_tokens: int
    wait_s: float


class Trainer:
    """One rank of a run.

    Args:
        config: of the run.
        storage: the root.
        rows: of the run, for any rank.
        engine: holds weights and optimizer.
        world: the other ranks.
        report: called on every rank at each line of metrics: (kind, line, progress).
    """

    def __init__(
        self,
        config: RunConfig,
        storage: Storage,
        rows: TrainingRows,
        engine: Engine,
        world: World,
        report: Report,
    ) -> None:
        self.config, self.storage, self.rows = config, storage, rows
        self.engine, self.world, self.report = engine, world, report
        self.folder = f"runs/{config.train.run}"
        self.passes = passes_per_step(config, rows, world.size)
        stated = config.train.peak_tflops
        self.peak_flops = peak_flops(engine.device) if stated is None else stated * 1e12
        self.validation = sliding_rows(
            read_all(rows.dataset), rows.table, config, "valid", config.eval.max_valid_targets
        )[world.rank :: world.size]

    def run(self, rows: Iterator[tuple[Position, StepRows]] | None = None) -> Progress:
        """Train from the newest checkpoint to the end.

        Args:
            rows: of the steps from there on, where someone reads them already; None reads them here.
        """
        progress = self.restore()
        if rows is None:
            rows = self.rows.steps(progress.position, self.world.rank, self.world.size)
        sink = MetricSink(self.storage, self.folder, progress.step) if self.world.rank == 0 else None
        started = time.monotonic() - progress.seconds
        tally = Tally(since=time.monotonic())
        for step in self.steps(rows):
            lr = learning_rate(progress.targets / self.rows.total_targets, self.config.optim)
            grad_norm = self.train_step(step, lr, tally)
            before, progress = progress, self.advance(progress, step, time.monotonic() - started)
            is_last = progress.targets >= self.rows.total_targets
            if is_last or _crossed(before, progress, self.config.train.log_targets):
                self.log(sink, tally, progress, lr, grad_norm)
                tally = Tally(since=time.monotonic())
            if is_last or _crossed(before, progress, self.config.eval.every_targets):
                progress = self.validate_and_save(sink, progress)
                tally.since = time.monotonic()
        if sink is not None:
            sink.close()
        return progress

    def restore(self) -> Progress:
        """Return where the run stands, with the engine brought to that state."""
        found = checkpoint.list_checkpoints(self.storage, self.folder)
        return checkpoint.restore(self.storage, found[-1], self.engine) if found else Progress()

    def steps(self, rows_of_steps: Iterator[tuple[Position, StepRows]]) -> Iterator[Step]:
        """Yield the steps that are left, each with the time that its rows kept this rank waiting."""
        asked = time.monotonic()
        for position, rows in rows_of_steps:
            waited = time.monotonic() - asked
            local = (sum(row.targets for row in rows), self.tokens(rows))
            targets, tokens = (int(value) for value in self.world.sum(local))
            yield Step(position, rows, targets, tokens, waited)
            asked = time.monotonic()

    def tokens(self, rows: StepRows) -> int:
        """Return the tokens of this rank's part of a step: those of its rows, and the prefix once a pass."""
        inner = sum(row.size_tokens - row.prefix_tokens for row in rows)
        return inner + self.passes * len(self.rows.table.prefix) if rows else 0

    def train_step(self, step: Step, lr: float, tally: Tally) -> float:
        """Run all passes of one step and apply the gradient; return its norm."""
        torch.manual_seed(
            derive_seed(self.config.train.seed, "dropout", step.position.epoch, step.position.step, self.world.rank)
        )
        self.engine.set_training(True)
        for rows in _split(step.rows, self.passes):
            batch = collate_pass(rows, self.rows.table, self.config.model.attention)
            tally.tokens += batch.size_tokens
            if self.peak_flops is not None:
                work = count_work(batch, self.engine.model.rules)
                tally.flops += count_flops(self.engine.model, work).train
            batch = batch.to(self.engine.device)
            total = loss_sum(self.engine.forward(batch), batch.labels, batch.is_target)
            self.engine.backward(total / max(1, step.global_targets))
            tally.loss += float(total.detach())
            tally.targets += sum(row.targets for row in rows)
            tally.padded_tokens += batch.tokens.numel()
        tally.wait_s += step.wait_s
        return self.engine.step(lr)

    def advance(self, progress: Progress, step: Step, seconds: float) -> Progress:
        """Count one step."""
        return replace(
            progress,
            step=progress.step + 1,
            targets=progress.targets + step.global_targets,
            tokens=progress.tokens + step.global_tokens,
            seconds=seconds,
            position=Position(step.position.epoch, step.position.step + 1),
        )

    def log(self, sink: MetricSink | None, tally: Tally, progress: Progress, lr: float, grad_norm: float) -> None:
        """Report the means since the last line, over all ranks."""
        elapsed = time.monotonic() - tally.since
        loss, targets, tokens, padded, wait, flops = self.world.sum(
            (tally.loss, tally.targets, tally.tokens, tally.padded_tokens, tally.wait_s, tally.flops)
        )
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
            "seconds": progress.seconds,
        }
        if self.peak_flops is not None:
            line["mfu"] = flops / (elapsed * self.world.size * self.peak_flops)
        self.tell(sink, "train", line, progress)

    def validate_and_save(self, sink: MetricSink | None, progress: Progress) -> Progress:
        """Score the validation split under sliding inference, write a checkpoint, drop what is not kept."""
        self.engine.set_training(False)
        mine = score_rows(
            self.engine.forward,
            self.validation,
            self.rows.table,
            self.engine.device,
            self.config.train.rows_per_pass,
            self.config.model.attention,
        )
        scores = join(self.world.gather(mine)).predictions
        valid_auc = float(auc(scores.label, scores.probability))
        progress = replace(progress, valid_auc=valid_auc)
        line: Line = {
            "step": progress.step,
            "targets": progress.targets,
            "auc": valid_auc,
            "log_loss": float(log_loss(scores.label, scores.probability)),
            "seconds": progress.seconds,
        }
        checkpoint.save(self.storage, self.folder, self.engine, progress, self.world)
        if self.world.rank == 0:
            found = checkpoint.list_checkpoints(self.storage, self.folder)
            checkpoint.prune(self.storage, found, self.config.checkpoint)
        self.tell(sink, "valid", line, progress)
        return progress

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
