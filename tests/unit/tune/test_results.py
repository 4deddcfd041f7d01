from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dti_ray.tune.ledger import Report, RunState, Status, SweepState, Trial, run_name
from dti_ray.tune.results import (
    ABSENT,
    SeedMean,
    TrialResult,
    best,
    best_report,
    importance,
    is_wide,
    pareto,
    results,
    table,
    value_text,
    varied_keys,
)

PRICES = st.tuples(st.integers(0, 4), st.integers(0, 4))


def reports(*auc: float) -> tuple[Report, ...]:
    return tuple(Report(1000 * i, value, 1.3 - value, 2.0 * i) for i, value in enumerate(auc, 1))


def run(
    trial: int, seed: int = 0, *auc: float, status: Status = Status.DONE, flops: float | None = 5e9, **rest: object
) -> RunState:
    targets, seconds = 1000 * len(auc), 2.0 * len(auc)
    name = run_name("sweep", trial, seed)
    return RunState(
        name, trial, seed, status, reports(*auc), targets=targets, seconds=seconds, flops_per_target=flops, **rest
    )  # pyright: ignore[reportArgumentType]


def sweep(*runs: RunState, params: Sequence[dict[str, object]] = ()) -> SweepState:
    numbers = sorted({one.trial for one in runs})
    trials = {number: Trial(number, params[number] if params else {}) for number in numbers}  # pyright: ignore[reportArgumentType]
    return SweepState(trials, {one.name: one for one in runs})


def done(number: int, auc: float, seconds: float | None = None, **params: object) -> TrialResult:
    mean = SeedMean(auc, None, None, (auc,))
    return TrialResult(number, params, ("r",), (0,), Status.DONE, mean, mean, 10, seconds, None, ())  # pyright: ignore[reportArgumentType]


def test_run_counts_with_its_best_report_by_the_metric() -> None:
    one = RunState("r", 0, 0, reports=(Report(1, 0.7, 0.5, 1), Report(2, 0.8, 0.6, 2), Report(3, math.nan, 0.4, 3)))
    assert best_report(one, "auc") == Report(2, 0.8, 0.6, 2)
    assert best_report(one, "log_loss") == one.reports[2]
    assert best_report(RunState("r", 0, 0), "auc") is None


def test_first_of_equal_reports_is_the_best() -> None:
    assert best_report(RunState("r", 0, 0, reports=reports(0.6, 0.7, 0.7)), "auc") == Report(2000, 0.7, 1.3 - 0.7, 4.0)


def test_mean_over_two_seeds_has_students_interval() -> None:
    (one,) = results(sweep(run(0, 0, 0.70, 0.74, 0.73), run(0, 1, 0.71, 0.76)), "auc")
    assert one.auc is not None
    assert one.auc.values == (0.74, 0.76)
    assert (one.auc.mean, one.auc.low, one.auc.high) == pytest.approx(
        (0.75, 0.75 - 0.127062, 0.75 + 0.127062), abs=1e-6
    )
    assert one.log_loss is not None
    assert one.log_loss.mean == pytest.approx(0.55)
    assert (one.runs, one.seeds, one.targets) == (("sweep-0000-s0", "sweep-0000-s1"), (0, 1), 2500)
    assert one.seconds_per_target == pytest.approx(0.002)
    assert one.flops_per_target == 5e9


def test_interval_of_three_seeds_is_that_of_a_table_of_students_t() -> None:
    (one,) = results(sweep(run(0, 0, 0.1), run(0, 1, 0.2), run(0, 2, 0.3)), "auc")
    assert one.auc is not None
    assert one.auc.high == pytest.approx(0.2 + 4.302653 * 0.1 / math.sqrt(3))


def test_one_seed_has_no_interval() -> None:
    (one,) = results(sweep(run(0, 0, 0.7)), "auc")
    assert one.auc == SeedMean(0.7, None, None, (0.7,))


def test_trial_without_reports_has_no_values() -> None:
    (one,) = results(sweep(run(0, 0, status=Status.WAITING, flops=None)), "auc")
    assert (one.auc, one.log_loss, one.seconds_per_target, one.flops_per_target, one.targets) == (None,) * 4 + (0,)
    assert one.value("auc") is None


@pytest.mark.parametrize(
    ("runs", "status"),
    [
        ("done done", "done"),
        ("done failed", "failed"),
        ("stopped failed", "failed"),
        ("done stopped", "stopped"),
        ("done waiting", "running"),
        ("running waiting", "running"),
        ("waiting waiting", "waiting"),
    ],
)
def test_status_of_a_trial_is_that_of_its_seeds_together(runs: str, status: str) -> None:
    (one,) = results(sweep(*(run(0, seed, status=Status(name)) for seed, name in enumerate(runs.split()))), "auc")
    assert one.status == status


def test_best_is_the_done_trial_with_the_best_mean_and_the_lowest_number() -> None:
    state = sweep(run(0, 0, 0.70), run(1, 0, 0.75), run(2, 0, 0.75), run(3, 0, 0.9, status=Status.STOPPED))
    for metric in ("auc", "log_loss"):
        found = best(results(state, metric), metric)
        assert found is not None
        assert found.number == 1


def test_no_trial_is_best_while_none_is_done() -> None:
    assert best(results(sweep(run(0, 0, 0.7, status=Status.RUNNING)), "auc"), "auc") is None
    assert best([], "auc") is None


def test_done_trial_of_which_a_seed_has_no_value_is_not_compared() -> None:
    trials = results(sweep(run(0, 0, 0.9), run(0, 1, math.nan), run(1, 0, 0.7), run(1, 1, 0.7)), "auc")
    assert [one.number for one in pareto(trials, "seconds_per_target")] == [1]
    found = best(trials, "auc")
    assert found is not None
    assert found.number == 1


def test_front_keeps_equals_and_goes_from_cheap_to_dear() -> None:
    trials = [
        done(0, 0.8, 3.0),
        done(1, 0.7, 1.0),
        done(2, 0.7, 1.0),
        done(3, 0.7, 2.0),
        done(4, 0.6, 1.0),
        done(5, 0.9),
    ]
    assert [one.number for one in pareto(trials, "seconds_per_target")] == [1, 2, 0]
    assert pareto(trials, "flops_per_target") == []


@settings(deadline=None, max_examples=50)
@given(st.lists(PRICES, max_size=8))
def test_front_holds_exactly_what_no_other_beats(points: list[tuple[int, int]]) -> None:
    trials = [done(number, auc, float(cost)) for number, (auc, cost) in enumerate(points)]
    front = {one.number for one in pareto(trials, "seconds_per_target")}
    for number, (auc, cost) in enumerate(points):
        beaten = any(a >= auc and c <= cost and (a > auc or c < cost) for a, c in points)
        assert (number in front) is not beaten


def test_key_that_moves_the_metric_is_the_important_one() -> None:
    trials = [done(i, 0.7 + 0.01 * (i % 4), lr=10.0 ** -(i % 4), k=[10, "all"][i // 4 % 2], same=3) for i in range(16)]
    shares = importance(trials, "auc")
    assert shares is not None
    assert list(shares) == ["lr", "k"]
    assert shares["lr"] > 0.9
    assert sum(shares.values()) == pytest.approx(1)
    assert importance(trials, "auc") == shares


def test_category_of_several_values_counts_as_one_key() -> None:
    trials = [done(i, 0.7 + 0.05 * (i % 3), name="abc"[i % 3], lr=float(i // 3)) for i in range(12)]
    shares = importance(trials, "auc")
    assert shares is not None
    assert set(shares) == {"name", "lr"}
    assert shares["name"] > 0.9


def test_importance_needs_six_trials_and_two_varied_keys() -> None:
    trials = [done(i, 0.7 + 0.01 * i, lr=float(i), k=i) for i in range(6)]
    assert importance(trials, "auc") is not None
    assert importance(trials[:5], "auc") is None
    assert importance([done(i, 0.7 + 0.01 * i, lr=float(i), k=3) for i in range(6)], "auc") is None


def test_key_that_was_searched_later_varies() -> None:
    assert varied_keys([{"a": 1, "c": 2}, {"a": 1, "b": 1, "c": 3}]) == ["c", "b"]
    assert value_text(ABSENT) == ABSENT


def test_only_positive_numbers_that_span_much_are_wide() -> None:
    assert is_wide([1, 11])
    assert not is_wide([1, 10])
    assert not is_wide([0, 11])
    assert not is_wide([])


def test_table_has_a_row_for_each_run_and_a_column_for_each_key() -> None:
    state = sweep(
        run(1, 1, 0.7, status=Status.FAILED, starts=2, failures=("a", "b"), reason="b"),
        run(1, 0, 0.72, 0.71),
        run(0, 0, status=Status.WAITING, flops=None),
        params=[{"packing.k": "all", "optim.lr": 1, "reset.full": True}, {"packing.k": 20, "optim.lr": 0.5}],
    )
    found = table(state, "auc")
    assert found.column_names == [
        "trial", "run", "seed", "status", "packing.k", "optim.lr", "reset.full", "targets", "auc", "log_loss",
        "seconds", "seconds_per_target", "flops_per_target", "starts", "failures", "reason",
    ]  # fmt: skip
    columns = found.to_pydict()
    assert columns["run"] == ["sweep-0000-s0", "sweep-0001-s0", "sweep-0001-s1"]
    assert columns["status"] == ["waiting", "done", "failed"]
    assert columns["packing.k"] == ["all", "20", "20"]
    assert columns["optim.lr"] == [1.0, 0.5, 0.5]
    assert columns["reset.full"] == [True, None, None]
    assert columns["auc"] == [None, 0.72, 0.7]
    assert columns["log_loss"] == [None, pytest.approx(0.58), pytest.approx(0.6)]
    assert columns["seconds_per_target"] == [None, 0.002, 0.002]
    assert columns["failures"] == [0, 0, 2]
    assert columns["reason"] == ["", "", "b"]


def test_table_of_an_empty_sweep_has_its_columns_and_no_row() -> None:
    found = table(SweepState(), "auc")
    assert found.num_rows == 0
    assert {"trial", "auc", "reason"} <= set(found.column_names)
