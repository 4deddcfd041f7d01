"""Keeps a sweep: the one writer of its ledger, who gives out runs, judges them, and deletes what need not stay.

Stage: tune, between the ledger and the trials. In: calls, one at a time. Out: what to run next, whether to go on.
Invariant: an event stands in the ledger before anyone acts on it, so a sweep whose driver was killed at any moment
goes on with nothing lost and nothing run again.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import ray

from dti_ray.config import RunConfig, TuneConfig, config_hash, with_values
from dti_ray.storage import Storage
from dti_ray.telemetry import Line
from dti_ray.train.state import Progress
from dti_ray.tune.decide import Decision, decide
from dti_ray.tune.ledger import Event, Ledger, RunState, Status, SweepState, Trial, run_name
from dti_ray.tune.retention import states_gb, to_delete
from dti_ray.tune.search import ask, plan_ahead, plan_first


class Turn(StrEnum):
    """What there is to do where no run can be given out."""

    WAIT = "wait"
    END = "end"


@dataclass(frozen=True)
class Job:
    """One run to start, or to go on with.

    Attributes:
        name: of the run in the ledger.
        config: of the run, complete.
        source: run below `<root>/runs` whose newest state it takes over; None: none.
    """

    name: str
    config: RunConfig
    source: str | None = None


class Keeper:
    """The sweep's memory and judge: a Ray actor, which answers one call at a time.

    Args:
        base: configuration that trials change.
        total_targets: of one run.
    """

    def __init__(self, base: RunConfig, total_targets: int) -> None:
        self.base, self.tune, self.total_targets = base, base.tune, total_targets
        self.storage = Storage(base.storage.root)
        self.ledger = Ledger(self.storage, self.tune.sweep)
        self.state, self.texts = self.ledger.state(), list[str]()
        self._add({"event": "session", "base": config_hash(base)})
        known = list(self.state.trials.values())
        known += plan_first(base, known)
        self._plan([*known, *plan_ahead(self.tune, known)])

    @ray.method
    def next(self) -> str:
        """Return the name of a run to start, or a `Turn`."""
        if not self._waiting() and (trial := ask(self.tune, self.state)) is not None:
            self._plan([trial])
        waiting = sorted(self._waiting(), key=lambda run: run.starts == 0)  # what was begun is ended first
        if waiting:
            self._add({"event": "start", "run": waiting[0].name})
            return waiting[0].name
        is_busy = any(run.status is Status.RUNNING for run in self.state.runs.values())
        return Turn.WAIT if is_busy else Turn.END

    @ray.method
    def job(self, name: str) -> Job:
        """Return what a run is."""
        run = self.state.runs[name]
        source = self.state.runs[run.changes[-1].source].folder if run.changes else None
        return Job(name, config_of(self.base, self.state.trials[run.trial].params, run), source)

    @ray.method
    def cost(self, name: str, flops_per_target: float) -> None:
        """Take note of what a run costs."""
        if self.state.runs[name].flops_per_target is None:
            self._add({"event": "cost", "run": name, "flops_per_target": flops_per_target})

    @ray.method
    def report(self, name: str, line: Line) -> Decision:
        """Take note of a validation; return whether the run goes on."""
        values = {key: line[key] for key in ("targets", "auc", "log_loss", "seconds")}
        self._add({"event": "report", "run": name, **values})
        every = self.base.eval.every_targets
        decision = decide(self.tune, self.state, self.state.runs[name], self.total_targets, every)
        if decision.kind != "go on":
            self.texts.append(f"{name}: {decision.reason}")
        return decision

    @ray.method
    def change(self, name: str, decision: Decision) -> None:
        """Let a run go on from another one's state, with another learning rate."""
        targets = self.state.runs[name].targets
        self._add({"event": "change", "run": name, "targets": targets, "source": decision.source, "lr": decision.lr})

    @ray.method
    def end(self, name: str, status: Status, progress: Progress, reason: str) -> None:
        """Take note that a run has ended, and delete what need not stay."""
        facts = {"status": status, "targets": progress.targets, "seconds": progress.seconds, "reason": reason}
        self._add({"event": "done", "run": name, **facts})
        self._clean()

    @ray.method
    def fail(self, name: str, reason: str, is_final: bool) -> None:
        """Take note that a run has failed; it is given out again unless that would not help."""
        run = self.state.runs[name]
        if run.status is not Status.RUNNING:
            return
        is_final = is_final or len(run.failures) + 1 >= self.tune.max_failures
        self._add({"event": "fail", "run": name, "reason": reason, "is_final": is_final})
        self.texts.append(f"{name} {'is given up' if is_final else 'will be started again'}: {reason}")
        if is_final:
            self._clean()

    @ray.method
    def say(self, text: str) -> None:
        """Have the driver tell a person something."""
        self.texts.append(text)

    @ray.method
    def look(self) -> tuple[SweepState, list[str]]:
        """Return where the sweep stands, and what was said since the last call."""
        texts, self.texts = self.texts, []
        return self.state, texts

    @ray.method
    def clean(self) -> None:
        """Delete what is left of runs whose trial has ended and is not among the best."""
        self._clean()

    def _clean(self) -> None:
        folders = [path.rpartition("/")[2] for path in self.storage.list("runs")]
        for folder in to_delete(self.state, self.tune, folders):
            self.storage.delete(f"runs/{folder}")

    def _waiting(self) -> list[RunState]:
        return [run for run in self.state.runs.values() if run.status is Status.WAITING]

    def _plan(self, trials: Sequence[Trial]) -> None:
        """Take note of trials that have no runs yet, or not with all seeds."""
        for trial in trials:
            runs = {run_name(self.tune.sweep, trial.number, seed): seed for seed in self.tune.seeds}
            if not runs.keys() <= self.state.runs.keys():
                self._add({"event": "trial", "trial": trial.number, "params": dict(trial.params), "runs": runs})

    def _add(self, event: Event) -> None:
        self.ledger.add({**event, "at": round(time.time(), 3)})
        self.state = self.ledger.state()


def config_of(base: RunConfig, params: Mapping[str, object], run: RunState) -> RunConfig:
    """Return the configuration of one run of a trial."""
    changed = {"optim.lr": run.changes[-1].lr} if run.changes else {}
    own = {"train.run": run.folder, "train.seed": run.seed}
    budget = {} if base.tune.max_gb is None else {"checkpoint.max_gb": states_gb(base.tune)}
    return with_values(base, {**params, **changed, **own, **budget}).model_copy(update={"tune": TuneConfig()})
