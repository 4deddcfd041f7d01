"""A study from its first run to its last: each trained, asked, and written down before the next begins.

Stage: study, its work. In: a `Study`. Out: `Outcome`; the ledger, the answers, a folder for each run.
Invariant: a run is done when its `done` line stands in the ledger, behind its answers, and only then are its states
deleted: a study that was killed at any moment goes on with nothing lost and nothing trained twice. A run that fails is
told and the others go on; the next command tries it again.

    {"event": "session", "study": "smoke", "machine": {...}, ...}
    {"event": "trial", "trial": 0, "params": {"packing.k": 1}, "runs": {"smoke-sliding-s0": 0, "smoke-sliding-s1": 1}}
    {"event": "start", "run": "smoke-sliding-s0"}   report ...   {"event": "done", "run": "smoke-sliding-s0", ...}
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields

import torch

from dti_ray.config import config_hash, to_yaml
from dti_ray.errors import DtiRayError
from dti_ray.study.answers import answers_folder, asked, compute_answers, find_answers, read_answers
from dti_ray.study.check import Study
from dti_ray.study.follow import Follow
from dti_ray.study.once import fit_once, measure_once
from dti_ray.study.plan import PlannedRun
from dti_ray.study.train import Trained, best_state, drop_states, train_run
from dti_ray.telemetry import Line
from dti_ray.train.host import settle
from dti_ray.train.identity import git_commit, machine, versions
from dti_ray.tune.ledger import Event, Ledger, Status


@dataclass(frozen=True)
class Outcome:
    """Where a study stands when a command ends.

    Attributes:
        done: names of the runs that have ended with all their answers.
        failed: name -> reason, of those that failed now.
        left: names of all others.
    """

    done: tuple[str, ...]
    failed: Mapping[str, str]
    left: tuple[str, ...]


def run_study(study: Study, follow: Follow, limit_hours: float | None = None) -> Outcome:
    """Do what is left of a study.

    Args:
        study: from `check_study`.
        follow: is told what happens.
        limit_hours: no run begins after so many hours; 0 does nothing but count; None sets no limit.

    Raises:
        ConfigError: the classical baselines' packages are not installed.
        InputError: another process works on the study.
        StorageError: storage cannot be reached.
    """
    end_s = None if limit_hours is None else time.monotonic() + 3600 * limit_hours
    session = _Session(study, follow)
    left = session.left()
    if len(left) < len(study.runs):
        follow.say(f"{len(study.runs) - len(left)} of {len(study.runs)} runs are done{session.foretold(left)}")
    if end_s is None or time.monotonic() < end_s:
        settle(study.device)
        fit_once(study, follow)  # first, as it may lack a package
        session.begin()
        measure_once(study, follow)
    failed: dict[str, str] = {}
    for number, run in enumerate(left, 1):
        if end_s is not None and time.monotonic() >= end_s:
            break
        follow.begin(run, number, len(left), study.total_targets(run))
        if (reason := session.attempt(run)) is not None:
            failed[run.name] = reason
        else:
            follow.say(f"{run.name}: {session.summary(run)}{session.foretold(left[number:])}")
    waiting = [run.name for run in session.left()]
    done = tuple(run.name for run in study.runs if run.name not in waiting)
    return Outcome(done, failed, tuple(name for name in waiting if name not in failed))


def records(events: Sequence[Event]) -> dict[str, Trained]:
    """Return what a ledger says of the runs that have ended."""
    names = [field.name for field in fields(Trained)]
    return {
        event["run"]: Trained(**{name: event[name] for name in names}) for event in events if event["event"] == "done"
    }


def hours_left(left: Sequence[tuple[str, float]], done: Sequence[tuple[str, float, float]]) -> float | None:
    """Foretell how long some runs will take.

    Args:
        left: (row, tokens) of each run to come.
        done: (row, tokens, seconds) of each run behind.

    Returns:
        Hours; a run takes what the last one of its row took, or as long a token as all runs so far. None where no run
        is behind.
    """
    if not done:
        return None
    of_row = {row: seconds for row, _, seconds in done}
    per_token = sum(seconds for *_, seconds in done) / sum(tokens for _, tokens, _ in done)
    return sum(of_row.get(row, tokens * per_token) for row, tokens in left) / 3600


class _Session:
    """One process at work on a study; the one writer of its ledger."""

    def __init__(self, study: Study, follow: Follow) -> None:
        self.study, self.storage, self.follow = study, study.storage, follow
        self.ledger = Ledger(study.storage, study.name)
        for damage in self.ledger.damage:
            follow.say(f"{self.ledger.path}: line {damage.line} is left out: {damage.reason}")

    def begin(self) -> None:
        """Write down who works on what."""
        path = f"{self.study.folder}/config.yaml"
        if not self.storage.exists(path):
            self.storage.write(path, to_yaml(self.study.base).encode())
        facts = {"base": config_hash(self.study.base), "commit": git_commit()}
        facts |= {"machine": machine(), "threads": torch.get_num_threads(), "versions": versions()}
        self._add({"event": "session", "study": self.study.name, **facts})
        state = self.ledger.state()
        known = {run.row: state.runs[run.name].trial for run in self.study.runs if run.name in state.runs}
        free = max(state.trials, default=-1) + 1
        for row, asked_row in self.study.base.study.rows.items():
            runs = {run.name: run.seed for run in self.study.of_row(row)}
            if not runs.keys() <= state.runs.keys():
                number = known.get(row, free)
                free = max(free, number + 1)
                self._add({"event": "trial", "trial": number, "params": dict(asked_row.change), "runs": runs})

    def left(self) -> list[PlannedRun]:
        """Return the runs that are not done, or of which an answer is missing; states that nobody needs go."""
        done = records(self.ledger.events)
        left = []
        for run in self.study.runs:
            if run.name in done and find_answers(self.storage, self.study.name, run) is not None:
                drop_states(self.storage, run.name, is_best_kept="test" in run.splits)
            else:
                left.append(run)
        return left

    def attempt(self, run: PlannedRun) -> str | None:
        """Train and ask a run; return why that failed, or None."""
        try:
            self._work(run)
        except DtiRayError as error:
            reason = "; ".join(map(str, error.faults))
        except Exception as error:  # noqa: BLE001 - one run must not end the others; the ledger says what it was
            reason = f"{type(error).__name__}: {error}"
            trace = traceback.format_exc().encode()
            self.storage.write(f"{self.study.folder}/failures/{run.name}.txt", trace)
        else:
            return None
        self._add({"event": "fail", "run": run.name, "reason": reason, "is_final": False})
        return reason

    def summary(self, run: PlannedRun) -> str:
        """Return what came of a run."""
        trained = records(self.ledger.events)[run.name]
        return f"validation AUC {trained.valid_auc:.4f}, {trained.seconds:,.1f} s of training"

    def foretold(self, left: Sequence[PlannedRun]) -> str:
        """Return how long the runs that are left will take, as the end of a sentence; empty where nobody knows."""
        found = records(self.ledger.events)
        behind = [(one.row, found[one.name]) for one in self.study.runs if one.name in found]
        costs = [(row, float(one.tokens), one.loop_seconds) for row, one in behind]
        hours = hours_left([(one.row, self.study.tokens(one)) for one in left], costs)
        if not hours:
            return ""
        return f"; about {hours:.1f} h left" if hours >= 1 else f"; about {60 * hours:.1f} min left"

    def _work(self, run: PlannedRun) -> None:
        study, inputs = self.study, self.study.inputs[run.row]
        trained = records(self.ledger.events).get(run.name)
        if trained is not None and best_state(self.storage, run.name) is None:
            self.follow.say(f"{run.name}: an answer is missing and its states are deleted; it is trained again")
            self.storage.delete(answers_folder(study.name, run.name))
            self.storage.delete(f"runs/{run.name}")
            trained = None
        if trained is None:
            self._add({"event": "start", "run": run.name})
            on_line = self._on_line(run)
            trained = train_run(run.config, self.storage, inputs, study.device, on_line, self.follow.say)
        for split, n in asked(run):
            if read_answers(self.storage, study.name, run, split, n) is None:
                self._ask(run, split, n)
        self._add({"event": "done", "run": run.name, "status": Status.DONE, "reason": "", **asdict(trained)})
        drop_states(self.storage, run.name, is_best_kept="test" in run.splits)

    def _ask(self, run: PlannedRun, split: str, n: int) -> None:
        def on_progress(done: int, total: int) -> None:
            self.follow.stage(f"asking {split}, n = {n}", done, total)

        table, device = self.study.inputs[run.row].table, self.study.device
        compute_answers(self.storage, self.study.name, run, split, n, table, device, on_progress)

    def _on_line(self, run: PlannedRun) -> Callable[[str, Line], None]:
        reported = max((report.targets for report in self.ledger.state().runs[run.name].reports), default=0)

        def on_line(kind: str, line: Line) -> None:
            self.follow.line(kind, line)
            if kind == "valid" and line["targets"] > reported:
                values = {name: line[name] for name in ("targets", "auc", "log_loss", "seconds")}
                self._add({"event": "report", "run": run.name, **values})

        return on_line

    def _add(self, *events: Event) -> None:
        self.ledger.add(*({**event, "at": round(time.time(), 3)} for event in events))
