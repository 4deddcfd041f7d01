"""The ledger of a sweep: every event, one JSON line each, and what they amount to.

Stage: tune, its memory. In: events, in the order in which they happened. Out: a `SweepState`; `ledger.jsonl`.
Invariant: the state of a sweep is a function of its ledger and of nothing else; a line that was written stays. A line
that cannot be read is named and passed over.

    {"event": "session", ...}                                        a process works on the sweep
    {"event": "trial", "trial": 3, "params": {"packing.k": 20}, "runs": {"sweep-0003-s0": 0}}
    {"event": "start", "run": "sweep-0003-s0"}
    {"event": "report", "run": "sweep-0003-s0", "targets": 20000, "auc": 0.71, "log_loss": 0.61, "seconds": 31.0}
    {"event": "done", "run": "sweep-0003-s0", "targets": 80000, "seconds": 120.0, "status": "done", "reason": ""}
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Literal

from dti_ray.config import Value
from dti_ray.errors import Fault, InputError
from dti_ray.storage import Storage

Event = dict[str, Any]
LEDGER = "ledger.jsonl"
NUMBER, TEXT = (int, float), (str,)
FIELDS: dict[str, dict[str, tuple[type, ...]]] = {
    "session": {},
    "trial": {"trial": (int,), "params": (dict,), "runs": (dict,)},
    "start": {"run": TEXT},
    "cost": {"run": TEXT, "flops_per_target": NUMBER},
    "report": {"run": TEXT, "targets": NUMBER, "auc": NUMBER, "log_loss": NUMBER, "seconds": NUMBER},
    "decision": {"run": TEXT, "kind": TEXT, "reason": TEXT},
    "change": {"run": TEXT, "targets": NUMBER, "source": TEXT, "lr": NUMBER},
    "lost": {"run": TEXT},
    "fail": {"run": TEXT, "reason": TEXT, "is_final": (bool,)},
    "done": {"run": TEXT, "targets": NUMBER, "seconds": NUMBER, "status": TEXT, "reason": TEXT},
}


class Status(StrEnum):
    """Where a run of a sweep stands."""

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"  # it saw all its targets
    STOPPED = "stopped"  # the scheduler ended it
    FAILED = "failed"  # it failed `tune.max_failures` times

    @property
    def is_final(self) -> bool:
        """Whether it never runs again."""
        return self in (Status.DONE, Status.STOPPED, Status.FAILED)


@dataclass(frozen=True)
class Trial:
    """One configuration of a sweep: what it changes in the base configuration."""

    number: int
    params: Mapping[str, Value]


@dataclass(frozen=True)
class Report:
    """One validation of a run.

    Attributes:
        targets: trained until then, over all epochs.
        seconds: of training and validation until then.
    """

    targets: int
    auc: float
    log_loss: float
    seconds: float

    def value(self, metric: str) -> float:
        """Return `auc` or `log_loss`, turned so that more is better."""
        return self.auc if metric == "auc" else -self.log_loss


@dataclass(frozen=True)
class Decision:
    """What becomes of a run after a validation.

    Attributes:
        kind: what is done with it.
        reason: a sentence with the numbers that were compared; empty where nothing was.
        source: name of the run whose state it takes over; for `change` only.
        lr: its peak learning rate from now on; for `change` only.
    """

    kind: Literal["go on", "stop", "change"]
    reason: str = ""
    source: str | None = None
    lr: float | None = None


@dataclass(frozen=True)
class Change:
    """A learning rate that pbt changed in a run, with the state of another run taken over.

    Attributes:
        source: folder of the other run, below `<root>/runs`.
    """

    targets: int
    source: str
    lr: float


@dataclass(frozen=True)
class RunState:
    """One trial trained with one seed.

    Attributes:
        name: of the run in the ledger.
        targets: trained so far, or in all.
        seconds: of training and validation.
        flops_per_target: of training, forward and backward; None until it has started.
        failures: one line each, oldest first.
        changes: of its learning rate, oldest first.
        verdict: a decision that it has not carried out yet.
        reason: why it was stopped or failed; empty otherwise.
        starts: times that it was started.
    """

    name: str
    trial: int
    seed: int
    status: Status = Status.WAITING
    reports: tuple[Report, ...] = ()
    failures: tuple[str, ...] = ()
    changes: tuple[Change, ...] = ()
    starts: int = 0
    targets: int = 0
    seconds: float = 0.0
    flops_per_target: float | None = None
    verdict: Decision | None = None
    reason: str = ""

    @property
    def folder(self) -> str:
        """Name below `<root>/runs`: a run that took over another one's state is a new one there."""
        return self._folder_after(len(self.changes))

    @property
    def sources(self) -> tuple[str, ...]:
        """Folders of which it takes over a state, the first that is usable: another run's, else its own of before."""
        return (self.changes[-1].source, self._folder_after(len(self.changes) - 1)) if self.changes else ()

    def _folder_after(self, changes: int) -> str:
        return f"{self.name}-g{changes}" if changes else self.name


@dataclass(frozen=True)
class SweepState:
    """All that is known of a sweep.

    Attributes:
        trials: by number.
        runs: by name, in the order in which they were planned.
    """

    trials: Mapping[int, Trial] = field(default_factory=dict)
    runs: Mapping[str, RunState] = field(default_factory=dict)

    def of_trial(self, number: int) -> list[RunState]:
        """Return the runs of one trial, one for each seed."""
        return [run for run in self.runs.values() if run.trial == number]


def run_name(sweep: str, trial: int, seed: int) -> str:
    """Return the name of a trial's run with one seed."""
    return f"{sweep}-{trial:04d}-s{seed}"


def count_reruns(events: Iterable[Event]) -> int:
    """Return how often a run was started that had ended already."""
    ended: set[str] = set()
    reruns = 0
    for event in events:
        if event["event"] == "done" or (event["event"] == "fail" and event["is_final"]):
            ended.add(event["run"])
        reruns += event["event"] == "start" and event["run"] in ended
    return reruns


def fold(events: Iterable[Event]) -> SweepState:
    """Return what some events amount to."""
    trials: dict[int, Trial] = {}
    runs: dict[str, RunState] = {}
    for event in events:
        if event["event"] == "session":  # whatever ran before has lost its process
            runs = {name: _idle(run) for name, run in runs.items()}
        elif event["event"] == "trial":
            trials[event["trial"]] = Trial(event["trial"], event["params"])
            for name, seed in event["runs"].items():
                runs.setdefault(name, RunState(name, event["trial"], seed))
        elif "run" in event:
            runs[event["run"]] = _after(runs[event["run"]], event)
    return SweepState(trials, runs)


def _idle(run: RunState) -> RunState:
    return replace(run, status=Status.WAITING) if run.status is Status.RUNNING else run


def _after(run: RunState, event: Event) -> RunState:
    """Return a run after one of its events."""
    kind = event["event"]
    if kind == "start":
        return replace(run, status=Status.RUNNING, starts=run.starts + 1)
    if kind == "lost":
        return _idle(run)
    if kind == "cost":
        return replace(run, flops_per_target=event["flops_per_target"])
    if kind == "report":
        report = Report(event["targets"], event["auc"], event["log_loss"], event["seconds"])
        return replace(run, reports=(*run.reports, report), targets=report.targets, seconds=report.seconds)
    if kind == "decision":
        return replace(run, verdict=Decision(event["kind"], event["reason"], event["source"], event["lr"]))
    if kind == "change":
        change = Change(event["targets"], event["source"], event["lr"])
        return replace(run, status=Status.WAITING, changes=(*run.changes, change), verdict=None)
    if kind == "fail":
        status = Status.FAILED if event["is_final"] else Status.WAITING
        return replace(run, status=status, failures=(*run.failures, event["reason"]), reason=event["reason"])
    if kind == "done":
        return replace(
            run, status=Status(event["status"]), targets=event["targets"], seconds=event["seconds"],
            reason=event["reason"], verdict=None,
        )  # fmt: skip
    return run


@dataclass(frozen=True)
class Damage:
    """A line of a ledger that cannot be read.

    Attributes:
        line: its number, from 1.
        reason: what is wrong with it.
    """

    line: int
    reason: str


class Ledger:
    """The events of one sweep, on storage; it has one writer at a time.

    Args:
        storage: the root.
        sweep: name of the sweep.
    """

    def __init__(self, storage: Storage, sweep: str) -> None:
        self.storage, self.path = storage, f"sweeps/{sweep}/{LEDGER}"
        self.content = storage.read(self.path) if storage.exists(self.path) else b""
        self.events, self.damage = read_events(self.content.decode(errors="replace").splitlines())

    def add(self, *events: Event) -> None:
        """Write some events behind the others.

        Raises:
            InputError: someone else has written to the ledger meanwhile.
        """
        self._check_alone()
        lines = "".join(json.dumps(event) + "\n" for event in events)
        start = self.content if not self.content or self.content.endswith(b"\n") else self.content + b"\n"
        self.content = start + lines.encode()
        self.storage.write(self.path, self.content)
        self.events.extend(events)

    def state(self) -> SweepState:
        """Return what the events amount to."""
        return fold(self.events)

    def _check_alone(self) -> None:
        size = self.storage.infos([self.path])[0].size or 0
        if size != len(self.content):
            raise InputError(
                Fault(
                    self.storage.display(self.path), f"has {size} bytes",
                    f"{len(self.content)}, as this process left it",
                    "another process works on this sweep; end one of them, then run the same command again",
                )
            )  # fmt: skip


def read_events(lines: Sequence[str]) -> tuple[list[Event], list[Damage]]:
    """Return the events of a ledger's lines, and the lines that are none.

    An event of a run that no line has planned is damage too: the line that planned it is lost.
    """
    events: list[Event] = []
    damage: list[Damage] = []
    planned: set[str] = set()
    for number, line in enumerate(lines, 1):
        try:
            event = _checked(json.loads(line), planned)
        except (ValueError, KeyError, TypeError) as error:
            damage.append(Damage(number, f"{type(error).__name__}: {error}"))
        else:
            events.append(event)
            planned.update(event.get("runs", ()))
    return events, damage


def _checked(event: Event, planned: Set[str]) -> Event:
    """Return an event whose fields are there and of their type."""
    for name, types in FIELDS[event["event"]].items():
        if not isinstance(event[name], types):
            raise TypeError(f"{name} is {event[name]!r}")
    if event["event"] == "done":
        Status(event["status"])
    if "run" in event and event["run"] not in planned:
        raise ValueError(f"no line above plans the run {event['run']!r}")
    return event
