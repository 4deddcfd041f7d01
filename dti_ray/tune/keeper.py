"""Keeps a sweep: the one writer of its ledger, who gives out runs, judges them, and deletes what need not stay.

Stage: tune, between the ledger and the trials. In: calls, one at a time. Out: what to run next, whether to go on.
Invariant: an event stands in the ledger before anyone acts on it, so a sweep whose driver was killed at any moment
goes on with nothing lost and nothing run again.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum

import ray

from dti_ray.config import RunConfig, TuneConfig, config_hash, with_values
from dti_ray.storage import Storage
from dti_ray.telemetry import Line
from dti_ray.train.state import Progress
from dti_ray.tune.decide import decide, follow
from dti_ray.tune.ledger import Decision, Event, Ledger, RunState, Status, SweepState, Trial, fold, run_name
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
        config: of the run, complete.
        reported: targets of its newest report; 0 before the first.
        sources: folders below `runs/`, of which it takes over the first usable state; empty: none.
    """

    config: RunConfig
    reported: int
    sources: tuple[str, ...] = ()


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
        self.moving = set[str]()  # runs that have validated since they were started
        self._add({"event": "session", "base": config_hash(base)})
        for run in self._waiting():
            if run.verdict is not None:
                self._settle(run)
        known = list(self.state.trials.values())
        known += plan_first(base, known)
        self._plan([*known, *plan_ahead(self.tune, known)])

    @ray.method
    def next(self) -> str:
        """Return the name of a run to start, or a `Turn`."""
        if not self._waiting() and (trial := ask(self.tune, self.state)) is not None:
            self._plan([trial])
        for run in sorted(self._waiting(), key=lambda run: run.starts == 0):  # what was begun is ended first
            if (decision := self._fate(run)).kind == "stop":
                self._decide(run.name, decision)
                continue
            self._add({"event": "start", "run": run.name})
            self.moving.discard(run.name)
            return run.name
        is_busy = any(run.status is Status.RUNNING for run in self.state.runs.values())
        return Turn.WAIT if is_busy else Turn.END

    @ray.method
    def job(self, name: str) -> Job:
        """Return what a run is."""
        run = self.state.runs[name]
        params, trials = self.state.trials[run.trial].params, len(self.state.trials)
        return Job(config_of(self.base, params, run, trials), run.targets, run.sources)

    @ray.method
    def cost(self, name: str, flops_per_target: float) -> None:
        """Take note of what a run costs."""
        if self.state.runs[name].flops_per_target is None:
            self._add({"event": "cost", "run": name, "flops_per_target": flops_per_target})

    @ray.method
    def report(self, name: str, line: Line) -> Decision:
        """Take note of a validation; return whether the run goes on.

        A decision stands: it is given again until it is carried out. A validation that a restart has repeated was
        judged the first time.
        """
        run = self.state.runs[name]
        values = {key: line[key] for key in ("targets", "auc", "log_loss", "seconds")}
        if run.verdict is not None or any(one.targets >= values["targets"] for one in run.reports):
            return run.verdict or Decision("go on")
        event = {"event": "report", "run": name, **values}
        self.moving.add(name)
        state = fold([*self.ledger.events, event])
        every = self.base.eval.every_targets
        decision = decide(self.tune, state, state.runs[name], self.total_targets, every)
        if decision.kind == "go on":
            self._add(event)
        else:
            self._decide(name, decision, event)
        return decision

    @ray.method
    def settle(self, name: str) -> None:
        """Take note that a run has saved its state and ended, as it was told to."""
        run = self.state.runs[name]
        if run.verdict is None:
            self._fail(name, "it was stopped by someone else", False)
        else:
            self._settle(run)

    @ray.method
    def end(self, name: str, progress: Progress) -> None:
        """Take note that a run has seen all its targets, and delete what need not stay."""
        facts = {"status": Status.DONE, "targets": progress.targets, "seconds": progress.seconds, "reason": ""}
        self._add({"event": "done", "run": name, **facts})
        self._clean()

    @ray.method
    def lose(self, name: str) -> None:
        """Take note that the process of a trial is gone, with its node perhaps; a failure if it had brought nothing."""
        run = self.state.runs[name]
        if run.status is not Status.RUNNING:
            return
        if run.verdict is not None:
            self._settle(run)
        elif name in self.moving:
            self._add({"event": "lost", "run": name})
            self.texts.append(f"{name}: its process is gone; it goes on from its newest state")
        else:
            self._fail(name, "its process died before a validation; Ray's logs tell why", False)

    @ray.method
    def fail(self, name: str, reason: str, is_final: bool) -> None:
        """Take note that a run has failed; it is given out again unless that would not help."""
        self._fail(name, reason, is_final)

    def _fail(self, name: str, reason: str, is_final: bool) -> None:
        run = self.state.runs[name]
        if run.verdict is not None:  # it failed while it ended: what was decided is done all the same
            self._settle(run)
            return
        is_final = is_final or len(run.failures) + 1 >= self.tune.max_failures
        reason = self._keep_trace(run, reason) if is_final else reason
        self._add({"event": "fail", "run": name, "reason": reason, "is_final": is_final})
        self.texts.append(f"{name} {'is given up' if is_final else 'will be started again'}: {reason}")
        if is_final:
            self._clean()

    def _keep_trace(self, run: RunState, reason: str) -> str:
        """Copy the tracebacks of a run whose folder will be deleted; return the reason with their new place."""
        path, kept = f"runs/{run.folder}/failure.txt", f"sweeps/{self.tune.sweep}/failures/{run.name}.txt"
        if not self.storage.exists(path):
            return reason
        self.storage.write(kept, self.storage.read(path))
        return reason.replace(self.storage.display(path), self.storage.display(kept))

    def _fate(self, run: RunState) -> Decision:
        is_repeat = self.tune.scheduler in ("asha", "median") and run.seed != self.tune.seeds[0]
        return follow(self.tune, self.state, run) if is_repeat else Decision("go on")

    def _decide(self, name: str, decision: Decision, *events: Event) -> None:
        """Write down a decision, and what led to it; one about a run that does not train is carried out at once."""
        source = None if decision.source is None else self.state.runs[decision.source].folder
        verdict = {**asdict(decision), "source": source}
        self._add(*events, {"event": "decision", "run": name, **verdict})
        self.texts.append(f"{name}: {decision.reason}")
        if self.state.runs[name].status is Status.WAITING:
            self._settle(self.state.runs[name])

    def _settle(self, run: RunState) -> None:
        """Carry out a decision about a run that does not train any more."""
        verdict = run.verdict
        assert verdict is not None, "asked only where there is one"
        if verdict.kind == "change":
            facts = {"targets": run.targets, "source": verdict.source, "lr": verdict.lr}
            self._add({"event": "change", "run": run.name, **facts})
            return
        facts = {"targets": run.targets, "seconds": run.seconds, "reason": verdict.reason}
        self._add({"event": "done", "run": run.name, "status": Status.STOPPED, **facts})
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
        events: list[Event] = []
        for trial in trials:
            runs = {run_name(self.tune.sweep, trial.number, seed): seed for seed in self.tune.seeds}
            if not runs.keys() <= self.state.runs.keys():
                events.append({"event": "trial", "trial": trial.number, "params": dict(trial.params), "runs": runs})
        self._add(*events)

    def _add(self, *events: Event) -> None:
        if events:
            self.ledger.add(*({**event, "at": round(time.time(), 3)} for event in events))
            self.state = self.ledger.state()


def config_of(base: RunConfig, params: Mapping[str, object], run: RunState, trials: int) -> RunConfig:
    """Return the configuration of one run of a trial; `trials` share the sweep's budget."""
    changed = {"optim.lr": run.changes[-1].lr} if run.changes else {}
    group = base.telemetry.group or base.tune.sweep
    own = {"train.run": run.folder, "train.seed": run.seed, "telemetry.group": group}
    budget = {} if base.tune.max_gb is None else {"checkpoint.max_gb": states_gb(base.tune, trials)}
    return with_values(base, {**params, **changed, **own, **budget}).model_copy(update={"tune": TuneConfig()})
