from __future__ import annotations

import json
from pathlib import Path

import pytest

from dti_ray.errors import InputError
from dti_ray.storage import Storage
from dti_ray.tune.ledger import Event, Ledger, Report, Status, SweepState, count_reruns, fold

A, B = "s-0000-s0", "s-0001-s0"
PLAN: list[Event] = [
    {"event": "trial", "trial": 0, "params": {"packing.k": 10}, "runs": {A: 0}},
    {"event": "trial", "trial": 1, "params": {"packing.k": "all"}, "runs": {B: 0}},
]


def report(run: str, targets: int, auc: float = 0.7) -> Event:
    return {"event": "report", "run": run, "targets": targets, "auc": auc, "log_loss": 0.6, "seconds": targets / 10}


def done(run: str, status: str = "done") -> Event:
    return {"event": "done", "run": run, "targets": 100, "seconds": 10.0, "status": status, "reason": ""}


def started(run: str) -> Event:
    return {"event": "start", "run": run}


def test_planned_runs_wait() -> None:
    state = fold(PLAN)
    assert [run.status for run in state.runs.values()] == [Status.WAITING, Status.WAITING]
    assert state.trials[1].params == {"packing.k": "all"}


def test_run_is_followed_from_start_to_end() -> None:
    state = fold(
        [*PLAN, started(A), {"event": "cost", "run": A, "flops_per_target": 5.0}, report(A, 40), report(A, 80)]
    )
    assert state.runs[A].status is Status.RUNNING
    assert state.runs[A].reports == (Report(40, 0.7, 0.6, 4.0), Report(80, 0.7, 0.6, 8.0))
    assert state.runs[A].flops_per_target == 5.0
    assert fold([*PLAN, started(A), done(A, "stopped")]).runs[A].status is Status.STOPPED


def test_run_whose_process_is_gone_waits_again_and_one_that_ended_does_not() -> None:
    state = fold([*PLAN, started(A), started(B), done(B), {"event": "session"}])
    assert (state.runs[A].status, state.runs[B].status) == (Status.WAITING, Status.DONE)


def test_failed_run_waits_until_it_is_given_up() -> None:
    fail = {"event": "fail", "run": A, "reason": "out of memory", "is_final": False}
    state = fold([*PLAN, started(A), fail])
    assert (state.runs[A].status, state.runs[A].failures) == (Status.WAITING, ("out of memory",))
    state = fold([*PLAN, started(A), fail, started(A), {**fail, "is_final": True}])
    assert (state.runs[A].status, len(state.runs[A].failures)) == (Status.FAILED, 2)


def test_changed_run_goes_on_in_a_folder_of_its_own() -> None:
    state = fold([*PLAN, started(A), {"event": "change", "run": A, "targets": 40, "source": B, "lr": 1e-3}])
    assert (state.runs[A].folder, state.runs[A].status) == (f"{A}-g1", Status.WAITING)


def test_start_of_a_run_that_had_ended_is_counted() -> None:
    assert count_reruns([*PLAN, started(A), done(A), started(B)]) == 0
    assert count_reruns([*PLAN, started(A), done(A), {"event": "session"}, started(A)]) == 1


def test_ledger_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    ledger = Ledger(Storage(str(tmp_path)), "s")
    assert ledger.state() == SweepState()
    ledger.add(*PLAN)
    ledger.add(started(A), report(A, 40))
    again = Ledger(Storage(str(tmp_path)), "s")
    assert (again.events, again.damage, again.state()) == (ledger.events, [], ledger.state())


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"event": "start", "run"', "JSONDecodeError"),
        ("[1]", "TypeError"),
        ('{"event": "trial", "trial": null, "params": {}, "runs": {}}', "TypeError: trial is None"),
        ('{"event": "report", "run": "s-0000-s0", "targets": "9"}', "TypeError: targets is '9'"),
        ('{"event": "unknown"}', "KeyError: 'unknown'"),
        ('{"run": "s-0000-s0"}', "KeyError: 'event'"),
        ('{"event": "report", "run": "s-0000-s0"}', "KeyError: 'targets'"),
        ('{"event": "start", "run": "other"}', "no line above plans the run 'other'"),
    ],
)
def test_line_that_cannot_be_read_is_named_and_the_rest_is_kept(tmp_path: Path, line: str, reason: str) -> None:
    lines = [*map(json.dumps, PLAN), line, json.dumps(started(A))]
    Storage(str(tmp_path)).write("sweeps/s/ledger.jsonl", "\n".join(lines).encode())
    ledger = Ledger(Storage(str(tmp_path)), "s")
    assert [(one.line, reason in one.reason) for one in ledger.damage] == [(3, True)]
    assert ledger.state().runs[A].status is Status.RUNNING
    ledger.add(done(A))
    kept = (tmp_path / "sweeps/s/ledger.jsonl").read_text().splitlines()
    assert kept[:4] == lines, "what was written stays, damaged or not"
    assert Ledger(Storage(str(tmp_path)), "s").state().runs[A].status is Status.DONE


def test_second_writer_is_refused(tmp_path: Path) -> None:
    first, second = (Ledger(Storage(str(tmp_path)), "s") for _ in range(2))
    first.add(*PLAN)
    with pytest.raises(InputError, match="another process works on this sweep"):
        second.add(*PLAN)
