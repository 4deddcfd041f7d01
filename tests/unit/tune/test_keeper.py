from __future__ import annotations

import json
from pathlib import Path

import pytest

from dti_ray.config import RunConfig, TuneConfig, load_config
from dti_ray.train.state import Progress
from dti_ray.tune.keeper import Keeper, Turn
from dti_ray.tune.ledger import Status
from tests.builders import make_config

TOTAL = 100


def base_of(root: Path, **tune: object) -> RunConfig:
    space = {"packing.k": {"choice": [5, 10]}, "optim.lr": {"loguniform": [1e-3, 1e-2]}}
    section = {"sweep": "s", "space": space, "trials": 2, "scheduler": "none", **tune}
    config = make_config(f"storage.root={root}", "eval.every_targets=50")
    return config.model_copy(update={"tune": TuneConfig.model_validate(section)})


def report(keeper: Keeper, run: str, targets: int, auc: float) -> str:
    line = {"step": 1, "targets": targets, "auc": auc, "log_loss": 0.6, "seconds": targets / 10}
    return keeper.report(run, line).kind


def finish(keeper: Keeper, run: str, auc: float) -> None:
    report(keeper, run, TOTAL, auc)
    keeper.end(run, Progress(targets=TOTAL, seconds=10.0))


def test_runs_are_given_out_in_order_until_none_is_left(tmp_path: Path) -> None:
    keeper = Keeper(base_of(tmp_path), TOTAL)
    assert keeper.next() == "s-0000-s0"
    assert keeper.next() == "s-0001-s0"
    assert keeper.next() == Turn.WAIT, "one of them may fail and come back"
    for run in ("s-0000-s0", "s-0001-s0"):
        finish(keeper, run, 0.7)
    assert keeper.next() == Turn.END


def test_base_configuration_is_the_first_trial_unless_others_are_named(tmp_path: Path) -> None:
    base = base_of(tmp_path / "a")
    assert Keeper(base, TOTAL).state.trials[0].params == {"packing.k": base.packing.k, "optim.lr": base.optim.lr}
    named = base_of(tmp_path / "b", first=[{"packing.k": 5}, {"optim.lr": 2e-3}], trials=3)
    trials = Keeper(named, TOTAL).state.trials
    assert [trials[number].params for number in (0, 1)] == [
        {"packing.k": 5, "optim.lr": base.optim.lr}, {"packing.k": base.packing.k, "optim.lr": 2e-3},
    ]  # fmt: skip
    assert len(trials) == 3, "they count among the trials"
    assert list(Keeper(named, TOTAL).state.trials) == list(trials)
    assert len(Keeper(base_of(tmp_path / "c", first=[]), TOTAL).state.trials) == 2


def test_run_is_the_base_with_its_parameters_its_name_and_its_seed(tmp_path: Path) -> None:
    base = base_of(tmp_path, seeds=[3, 4], max_gb=8)
    keeper = Keeper(base, TOTAL)
    job = keeper.job("s-0001-s4")
    params = keeper.state.trials[1].params
    assert (job.config.packing.k, job.config.optim.lr) == (params["packing.k"], params["optim.lr"])
    assert (job.config.train.run, job.config.train.seed, job.sources) == ("s-0001-s4", 4, ())
    assert job.config.checkpoint.max_gb == pytest.approx(8 / 4 / 2)
    assert job.config.tune == TuneConfig(), "a run does not know that it is searched"
    assert job.config.model == base.model


def test_killed_sweep_goes_on_with_what_it_had_begun_and_runs_nothing_again(tmp_path: Path) -> None:
    first = Keeper(base_of(tmp_path, trials=3), TOTAL)
    for _ in range(2):
        first.next()
    finish(first, "s-0000-s0", 0.7)
    report(first, "s-0001-s0", 50, 0.6)
    plans = {number: trial.params for number, trial in first.state.trials.items()}

    again = Keeper(base_of(tmp_path, trials=3), TOTAL)
    assert {number: trial.params for number, trial in again.state.trials.items()} == plans
    assert [again.next(), again.next(), again.next()] == ["s-0001-s0", "s-0002-s0", Turn.WAIT]
    assert again.state.runs["s-0001-s0"].reports == first.state.runs["s-0001-s0"].reports


def test_more_trials_and_more_seeds_are_added_to_those_that_are_known(tmp_path: Path) -> None:
    first = Keeper(base_of(tmp_path), TOTAL)
    for run in (first.next(), first.next()):
        finish(first, run, 0.7)
    more = Keeper(base_of(tmp_path, trials=3, seeds=[0, 1]), TOTAL)
    assert [run.name for run in more.state.runs.values() if run.status is Status.WAITING] == [
        "s-0000-s1", "s-0001-s1", "s-0002-s0", "s-0002-s1",
    ]  # fmt: skip
    assert first.state.trials.items() <= more.state.trials.items()


def test_run_that_fails_three_times_is_given_up_and_the_sweep_goes_on(tmp_path: Path) -> None:
    keeper = Keeper(base_of(tmp_path), TOTAL)
    run = keeper.next()
    for _ in range(2):
        keeper.fail(run, "rank 1: out of memory", is_final=False)
        assert keeper.next() == run, "what was begun comes first"
    keeper = Keeper(base_of(tmp_path), TOTAL)  # failures count over restarts of the driver
    assert keeper.next() == run
    keeper.fail(run, "rank 1: out of memory", is_final=False)
    assert keeper.state.runs[run].status is Status.FAILED
    assert keeper.next() == "s-0001-s0"
    assert keeper.look()[1] == [f"{run} is given up: rank 1: out of memory"]


def test_failure_that_would_only_repeat_is_final_at_once(tmp_path: Path) -> None:
    keeper = Keeper(base_of(tmp_path), TOTAL)
    run = keeper.next()
    keeper.fail(run, "packing.row_tokens: too small", is_final=True)
    assert keeper.state.runs[run].status is Status.FAILED


def test_process_that_dies_after_its_run_has_ended_changes_nothing(tmp_path: Path) -> None:
    keeper = Keeper(base_of(tmp_path), TOTAL)
    run = keeper.next()
    finish(keeper, run, 0.7)
    keeper.lose(run)
    assert keeper.state.runs[run].status is Status.DONE


def test_process_that_is_gone_counts_as_a_failure_only_where_it_had_brought_nothing(tmp_path: Path) -> None:
    keeper = Keeper(base_of(tmp_path), TOTAL)
    run = keeper.next()
    report(keeper, run, 50, 0.7)
    keeper.lose(run)
    assert (keeper.next(), keeper.state.runs[run].failures) == (run, ())
    keeper.lose(run)
    assert len(keeper.state.runs[run].failures) == 1
    assert keeper.next() == run


def test_run_that_asha_stops_says_why(tmp_path: Path) -> None:
    keeper = Keeper(base_of(tmp_path, scheduler="asha"), TOTAL)
    first, second = keeper.next(), keeper.next()
    assert report(keeper, first, 50, 0.70) == "go on"
    assert report(keeper, second, 50, 0.65) == "stop"
    text = keeper.look()[1][0]
    assert text.startswith("s-0001-s0: asha: auc 0.65")


def test_decision_stands_until_it_is_carried_out(tmp_path: Path) -> None:
    keeper = Keeper(base_of(tmp_path, scheduler="asha"), TOTAL)
    first, second = keeper.next(), keeper.next()
    report(keeper, first, 50, 0.70)
    assert report(keeper, second, 50, 0.65) == "stop"
    assert report(keeper, second, 60, 0.99) == "stop", "a validation that came while it ended changes nothing"
    keeper.settle(second)
    assert (keeper.state.runs[second].status, keeper.state.runs[second].targets) == (Status.STOPPED, 50)


@pytest.mark.parametrize("end", ["killed", "failed", "lost"])
def test_run_that_dies_while_it_is_being_stopped_is_stopped(tmp_path: Path, end: str) -> None:
    keeper = Keeper(base_of(tmp_path, scheduler="asha"), TOTAL)
    first, second = keeper.next(), keeper.next()
    report(keeper, first, 50, 0.70)
    report(keeper, second, 50, 0.65)
    if end == "killed":
        keeper = Keeper(base_of(tmp_path, scheduler="asha"), TOTAL)
    elif end == "failed":
        keeper.fail(second, "the disk is full", is_final=False)
    else:
        keeper.lose(second)
    run = keeper.state.runs[second]
    assert (run.status, run.failures, "0.65" in run.reason) == (Status.STOPPED, (), True)


def test_validation_that_a_restart_repeats_is_judged_once(tmp_path: Path) -> None:
    keeper = Keeper(base_of(tmp_path, scheduler="asha"), TOTAL)
    first, second = keeper.next(), keeper.next()
    assert report(keeper, first, 50, 0.70) == "go on"
    assert report(keeper, second, 50, 0.75) == "go on"
    assert report(keeper, first, 50, 0.70) == "go on", "by now it would be the second of two"
    assert len(keeper.state.runs[first].reports) == 1


def test_repeats_share_the_fate_of_the_first_seed(tmp_path: Path) -> None:
    keeper = Keeper(base_of(tmp_path, scheduler="asha", seeds=[0, 1]), TOTAL)
    for expected in ("s-0000-s0", "s-0000-s1", "s-0001-s0"):
        assert keeper.next() == expected
    report(keeper, "s-0000-s0", 50, 0.70)
    assert report(keeper, "s-0000-s1", 50, 0.10) == "go on", "repeats do not compete"
    assert report(keeper, "s-0001-s0", 50, 0.65) == "stop"
    assert keeper.next() == Turn.WAIT
    assert (keeper.state.runs["s-0001-s1"].status, keeper.state.runs["s-0001-s1"].starts) == (Status.STOPPED, 0)


def test_population_takes_over_the_state_that_was_best_when_it_was_decided(tmp_path: Path) -> None:
    space = {"optim.lr": {"loguniform": [1e-3, 1e-2]}}
    keeper = Keeper(base_of(tmp_path, scheduler="pbt", space=space, trials=4, max_concurrent=4), TOTAL)
    runs = [keeper.next() for _ in range(4)]
    for run, auc in zip(runs[:3], (0.70, 0.72, 0.74), strict=True):
        report(keeper, run, 50, auc)
    assert report(keeper, runs[3], 50, 0.60) == "change"
    keeper.settle(runs[3])
    assert keeper.next() == runs[3]
    job = keeper.job(runs[3])
    assert job.sources == (runs[2], runs[3]), "the best one's folder, then its own of before"
    assert job.config.train.run == f"{runs[3]}-g1"
    assert job.config.optim.lr == keeper.state.runs[runs[3]].changes[0].lr


def test_tracebacks_of_a_run_that_is_given_up_are_kept(tmp_path: Path) -> None:
    keeper = Keeper(base_of(tmp_path), TOTAL)
    run = keeper.next()
    trace = tmp_path / "runs" / run / "failure.txt"
    trace.parent.mkdir(parents=True)
    trace.write_text("Traceback")
    keeper.fail(run, f"out of memory; traceback in {trace}", is_final=True)
    kept = tmp_path / "sweeps/s/failures" / f"{run}.txt"
    assert kept.read_text() == "Traceback"
    assert not trace.exists()
    assert str(kept) in keeper.state.runs[run].reason


def test_only_the_best_run_stays_on_storage(tmp_path: Path) -> None:
    keeper = Keeper(base_of(tmp_path), TOTAL)
    runs = [keeper.next(), keeper.next()]
    for run in (*runs, "s-best", "other"):
        (tmp_path / "runs" / run).mkdir(parents=True)
    finish(keeper, runs[0], 0.70)
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == sorted([*runs, "s-best", "other"])
    finish(keeper, runs[1], 0.72)
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == sorted([runs[1], "s-best", "other"])


def test_every_event_stands_in_the_ledger_before_the_answer(tmp_path: Path) -> None:
    keeper = Keeper(base_of(tmp_path), TOTAL)

    def last() -> dict[str, object]:
        return json.loads((tmp_path / "sweeps/s/ledger.jsonl").read_text().splitlines()[-1])

    run = keeper.next()
    assert (last()["event"], last()["run"]) == ("start", run)
    keeper.cost(run, 5.0)
    keeper.cost(run, 5.0)
    report(keeper, run, 50, 0.7)
    assert (last()["event"], last()["targets"]) == ("report", 50)
    lines = (tmp_path / "sweeps/s/ledger.jsonl").read_text().splitlines()
    assert [json.loads(line)["event"] for line in lines] == ["session", "trial", "trial", "start", "cost", "report"]


def test_space_of_the_shipped_default_is_searched_on_the_defaults() -> None:
    assert list(load_config().tune.space) == ["packing.k", "optim.lr", "debias.strength"]
