"""What becomes of a run: the schedulers, by tables small enough to check by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dti_ray.config import Dimension, TuneConfig, Value
from dti_ray.tune.decide import Decision, decide, rungs
from dti_ray.tune.ledger import Change, Report, RunState, Status, SweepState, Trial

EVERY, TOTAL = 10, 100
NAN = float("nan")
Curve = Sequence[float] | Mapping[int, float]


def tune(scheduler: str, **changes: object) -> TuneConfig:
    space = {"optim.lr": Dimension(loguniform=(1e-4, 1e-2)), "packing.k": Dimension(grid=(10, 20))}
    return TuneConfig(scheduler=scheduler, space=space, **changes)  # pyright: ignore[reportArgumentType]


def run(name: str, curve: Curve, trial: int = 0, status: Status = Status.RUNNING, lr: float | None = None) -> RunState:
    """Return a run from its values at 10, 20, 30 ... targets, or at the ones given."""
    points = curve if isinstance(curve, Mapping) else {EVERY * at: value for at, value in enumerate(curve, 1)}
    reports = tuple(Report(targets, auc, 1 - auc, 1.0) for targets, auc in points.items())
    changes = () if lr is None else (Change(EVERY, "other", lr),)
    return RunState(name, trial, 0, status, reports, changes=changes)


def state(*runs: RunState, params: Sequence[Mapping[str, Value]] = ()) -> SweepState:
    trials = {number: Trial(number, one) for number, one in enumerate(params or [{"optim.lr": 1e-3}])}
    return SweepState(trials, {one.name: one for one in runs})


def after(config: TuneConfig, mine: RunState, *others: RunState) -> Decision:
    return decide(config, state(*others, mine), mine, TOTAL, EVERY)


def last_of(config: TuneConfig, *curves: Curve) -> Decision:
    """Return what becomes of the last of some runs; the others were stopped since, except by pbt."""
    *others, mine = curves
    status = Status.RUNNING if config.scheduler == "pbt" else Status.STOPPED
    return after(config, run("mine", mine), *(run(f"run-{n}", curve, status=status) for n, curve in enumerate(others)))


@pytest.mark.parametrize(
    ("grace", "total", "factor", "expected"),
    [(10, 100, 3, [10, 30, 90]), (10, 90, 3, [10, 30]), (10, 10, 3, []), (25, 400, 2, [25, 50, 100, 200])],
)
def test_rungs_grow_by_the_factor_and_stay_below_the_total(
    grace: int, total: int, factor: int, expected: list[int]
) -> None:
    assert rungs(grace, total, factor) == expected


@settings(max_examples=50, deadline=None)
@given(grace=st.integers(1, 1000), total=st.integers(1, 10**7), factor=st.integers(2, 9))
def test_rungs_are_as_many_as_fit(grace: int, total: int, factor: int) -> None:
    found = rungs(grace, total, factor)
    assert found == [grace * factor**power for power in range(len(found))]
    assert all(rung < total for rung in found)
    assert grace * factor ** len(found) >= total


@pytest.mark.parametrize("scheduler", ["none", "asha", "median", "pbt"])
def test_a_run_that_has_seen_all_its_targets_is_left_alone(scheduler: str) -> None:
    others = [run(f"run-{number}", [0.9] * 10) for number in range(5)]
    assert after(tune(scheduler), run("mine", [0.1] * 10), *others).kind == "go on"


def test_without_a_scheduler_every_run_goes_on() -> None:
    assert last_of(tune("none"), [0.9], [0.9], [0.9], [0.1]) == Decision("go on")


@pytest.mark.parametrize(
    ("others", "mine", "kind"),
    [
        ([], 0.1, "go on"),  # the first passes
        ([], NAN, "go on"),
        ([0.7], 0.6, "stop"),  # ceil(2 / 3) = 1 of 2 passes
        ([0.7], 0.8, "go on"),
        ([0.7], 0.7, "go on"),  # a tie
        ([0.7, 0.6], 0.65, "stop"),  # 1 of 3
        ([0.7, 0.6, 0.5], 0.65, "go on"),  # ceil(4 / 3) = 2 of 4
        ([0.7, 0.7, 0.5], 0.65, "stop"),
        ([0.7, 0.6, 0.5, 0.4, 0.3], 0.65, "go on"),  # 2 of 6
        ([0.9, 0.8, 0.5, 0.4, 0.3], 0.65, "stop"),
        ([0.9, 0.8, 0.5, 0.4, 0.3, 0.2], 0.65, "go on"),  # 3 of 7
        ([0.2, 0.1], NAN, "stop"),
        ([NAN], 0.1, "go on"),
        ([NAN, NAN, 0.9], 0.1, "go on"),  # 2 of 4
    ],
)
def test_asha_lets_the_best_third_pass(others: list[float], mine: float, kind: str) -> None:
    assert last_of(tune("asha"), *([value] for value in others), [mine]).kind == kind


def test_asha_compares_at_the_rung_and_not_by_what_came_later() -> None:
    assert last_of(tune("asha"), [0.6, 0.9, 0.9], [0.7]).kind == "go on"
    assert last_of(tune("asha"), [0.7, 0.1, 0.1], [0.6]).kind == "stop"


def test_asha_judges_at_rungs_only() -> None:
    assert last_of(tune("asha"), [0.9, 0.9, 0.9], [0.9, 0.1]) == Decision("go on")
    assert last_of(tune("asha"), [0.9, 0.9, 0.9], [0.9, 0.1, 0.1]).kind == "stop"
    assert last_of(tune("asha"), [0.9] * 4, [0.9, 0.9, 0.9, 0.1]) == Decision("go on")


def test_asha_takes_the_first_report_at_or_past_a_rung() -> None:
    others = [{13: 0.7, 33: 0.9}, {11: 0.6}]
    assert last_of(tune("asha"), *others, {12: 0.65}).kind == "stop"
    assert last_of(tune("asha"), *others, {12: 0.75}).kind == "go on"
    assert last_of(tune("asha"), *others, {12: 0.75, 22: 0.1}).kind == "go on"


def test_asha_judges_a_report_that_passes_two_rungs_at_both() -> None:
    assert last_of(tune("asha"), [0.7, 0.7], {35: 0.6}).kind == "stop"
    assert last_of(tune("asha"), [0.5, 0.5, 0.7], {35: 0.6}).kind == "stop"
    passed = last_of(tune("asha"), [0.5, 0.5, 0.5], {35: 0.6})
    assert passed.kind == "go on"
    assert passed.reason.count("number 1 of 2") == 2


def test_asha_waits_for_the_grace_and_divides_by_the_reduction() -> None:
    late = tune("asha", grace_targets=40)
    assert last_of(late, [0.9] * 3, [0.1] * 3) == Decision("go on")
    assert last_of(late, [0.9] * 4, [0.1] * 4).kind == "stop"
    halves = [[value] for value in (0.9, 0.8, 0.5, 0.6)]
    assert last_of(tune("asha", reduction=2), *halves[:3], [0.7]).kind == "stop"  # 2 of 4
    assert last_of(tune("asha", reduction=2), *halves, [0.7]).kind == "go on"  # 3 of 5


def test_asha_says_what_it_compared() -> None:
    assert last_of(tune("asha"), [0.7], [0.65]).reason == "asha: auc 0.6500 at 10 targets: number 2 of 2, 1 go on"
    by_log_loss = last_of(tune("asha", metric="log_loss"), [0.7], [0.65])
    assert by_log_loss.reason == "asha: log_loss 0.3500 at 10 targets: number 2 of 2, 1 go on"
    assert "auc that is no number" in last_of(tune("asha"), [0.7], [NAN]).reason


@settings(max_examples=50, deadline=None)
@given(values=st.lists(st.floats(0, 1) | st.just(NAN), min_size=1, max_size=12), reduction=st.integers(2, 5))
def test_asha_never_stops_the_best_and_stops_no_more_than_it_must(values: list[float], reduction: int) -> None:
    *others, mine = values
    decision = last_of(tune("asha", reduction=reduction), *([value] for value in others), [mine])
    better = sum(value > mine or (math.isnan(mine) and not math.isnan(value)) for value in others)
    assert (decision.kind == "go on") == (better < math.ceil(len(values) / reduction))


@pytest.mark.parametrize(
    ("others", "mine", "kind"),
    [
        ([[0.7], [0.8]], [0.1], "go on"),  # too few to compare
        ([[0.7], [0.8], [0.6]], [0.69], "stop"),  # the median is 0.7
        ([[0.7], [0.8], [0.6]], [0.7], "go on"),
        ([[0.7], [0.8], [0.6], [0.6]], [0.66], "go on"),  # 0.65
        ([[0.5, 0.7]] * 3, [0.3, 0.61], "go on"),  # averages 0.6
        ([[0.5, 0.7]] * 3, [0.3, 0.59], "stop"),
        ([[0.5, 0.7]] * 3, [0.61, 0.3], "go on"),  # its best counts
        ([[0.5, 0.7, 0.9]] * 3, [0.3, 0.61], "go on"),  # what came later does not
        ([[0.5, 0.7], [0.5, 0.7], [0.5]], [0.3, 0.3], "go on"),  # one did not come there
        ([[0.7], [0.8], [0.6]], [NAN], "stop"),
        ([[NAN], [NAN], [0.6]], [0.1], "go on"),
    ],
)
def test_median_stops_a_run_whose_best_is_below_the_median_of_averages(
    others: list[list[float]], mine: list[float], kind: str
) -> None:
    assert last_of(tune("median"), *others, mine).kind == kind


def test_median_compares_validations_that_came_a_few_targets_apart() -> None:
    others = [{14: 0.5, 21: 0.7}, {11: 0.5, 23: 0.7}, {10: 0.5, 20: 0.7, 33: 0.9}]
    assert last_of(tune("median"), *others, {12: 0.3, 22: 0.61}).kind == "go on"
    assert last_of(tune("median"), *others, {12: 0.3, 22: 0.59}).kind == "stop"


def test_median_waits_for_the_grace_and_says_what_it_compared() -> None:
    others = [[0.7] * 3, [0.8] * 3, [0.6] * 3]
    assert last_of(tune("median", grace_targets=25), *others, [0.1] * 2) == Decision("go on")
    decision = last_of(tune("median", grace_targets=25), *others, [0.1] * 3)
    expected = "median: best auc 0.1000 by 30 targets, median of 3 other runs' averages auc 0.7000"
    assert decision == Decision("stop", expected)


@pytest.mark.parametrize(
    ("others", "mine", "sources"),
    [
        ([], 0.1, []),  # alone
        ([0.7], 0.6, [0.7]),  # the worse of two
        ([0.7], 0.8, []),
        ([0.7], 0.7, []),  # as good
        ([0.9, 0.8, 0.7], 0.6, [0.9]),
        ([0.9, 0.8, 0.6], 0.7, []),  # not the worst quarter
        ([0.9, 0.9, 0.7], 0.6, [0.9, 0.9]),
        ([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.2], 0.3, [0.9, 0.8]),  # 2 of 8
        ([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3], 0.45, []),
        ([0.9, NAN, 0.7], NAN, [0.9]),
        ([NAN], NAN, []),
    ],
)
def test_pbt_gives_the_worst_quarter_the_state_of_the_best(
    others: list[float], mine: float, sources: list[float]
) -> None:
    decision = last_of(tune("pbt"), *([value] for value in others), [mine])
    assert decision.kind == ("change" if sources else "go on")
    taken = None if decision.source is None else others[int(decision.source.removeprefix("run-"))]
    assert taken is None if not sources else taken in sources


def test_pbt_chooses_among_the_best_and_both_factors_by_run_and_milestone() -> None:
    best = [run(f"best-{number}", [0.9 - number / 100] * 2) for number in range(2)]
    rest = [run(f"run-{number}", [0.5] * 2) for number in range(5)]
    decisions = [after(tune("pbt"), run(f"mine-{number}", [0.1]), *best, *rest) for number in range(40)]
    assert {(decision.source, decision.lr) for decision in decisions} == {
        (name, lr) for name in ("best-0", "best-1") for lr in (8e-4, 1.25e-3)
    }
    assert decisions == [after(tune("pbt"), run(f"mine-{number}", [0.1]), *best, *rest) for number in range(40)]
    later = [after(tune("pbt"), run(f"mine-{number}", [0.1, 0.1]), *best, *rest) for number in range(40)]
    assert [decision.lr for decision in later] != [decision.lr for decision in decisions]


@pytest.mark.parametrize(
    ("now", "allowed"), [(2e-3, {1.6e-3, 2.5e-3}), (9e-3, {7.2e-3, 1e-2}), (1e-4, {1e-4, 1.25e-4})]
)
def test_pbt_changes_the_rate_that_the_source_has_now_within_the_space(now: float, allowed: set[float]) -> None:
    source = run("source", [0.9], lr=now)
    found = {after(tune("pbt"), run(f"mine-{number}", [0.1]), source).lr for number in range(20)}
    assert found == allowed


def test_pbt_stays_between_the_least_and_the_greatest_choice() -> None:
    space = {"optim.lr": Dimension(choice=(3e-3, 1e-3, 2e-3))}
    config = TuneConfig(scheduler="pbt", search="grid", space=space)
    found = {after(config, run(f"mine-{number}", [0.1]), run("source", [0.9])).lr for number in range(20)}
    assert found == {1e-3, 1.25e-3}


def test_pbt_compares_at_its_milestones_only() -> None:
    config = tune("pbt", perturb_targets=20)
    assert last_of(config, [0.9] * 3, [0.1]) == Decision("go on")
    assert last_of(config, [0.9] * 3, [0.1, 0.1]).kind == "change"
    assert last_of(config, [0.9] * 3, [0.1, 0.1, 0.1]) == Decision("go on")
    assert last_of(config, {13: 0.9, 21: 0.9}, {14: 0.1, 23: 0.1}).kind == "change"


def test_pbt_compares_runs_that_differ_in_nothing_but_learning_rate_and_seed() -> None:
    params = [{"optim.lr": lr, "packing.k": k} for k in (10, 20) for lr in (1e-3, 2e-3)]
    runs = [run("a", [0.9], trial=0), run("b", [0.7], trial=1), run("c", [0.5], trial=2), run("d", [0.4], trial=3)]
    kinds = [decide(tune("pbt"), state(*runs, params=params), one, TOTAL, EVERY) for one in runs]
    assert [(decision.kind, decision.source) for decision in kinds] == [
        ("go on", None), ("change", "a"), ("go on", None), ("change", "c"),
    ]  # fmt: skip


@pytest.mark.parametrize("status", [Status.FAILED, Status.DONE])
def test_pbt_compares_with_a_run_that_is_over_but_takes_nothing_over_from_it(status: Status) -> None:
    over = run("over", [0.9], status=status)
    assert after(tune("pbt"), run("mine", [0.1]), over).kind == "go on"
    rest = [run(f"run-{number}", [0.5 + number / 10]) for number in range(3)]
    decision = after(tune("pbt"), run("mine", [0.1]), over, *rest)
    assert (decision.kind, decision.source) == ("change", "run-2")
    assert "number 5 of 5" in decision.reason


def test_pbt_says_what_it_compared() -> None:
    decision = after(tune("pbt"), run("mine", [0.1]), run("source", [0.9]))
    expected = "pbt: auc 0.1000 at 10 targets: number 2 of 2; takes over source (auc 0.9000) with lr "
    assert decision.reason == f"{expected}{decision.lr:g}"
