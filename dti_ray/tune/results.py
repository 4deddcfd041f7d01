"""What a sweep came to: means over seeds, the best trial, the Pareto front, what mattered, one table of all runs.

Stage: tune, after its runs. In: a `SweepState`. Out: one `TrialResult` a trial; an Arrow table with one row a run.
Invariant: a run counts with its best report by the metric, because its best checkpoint is the one that is kept; the
best trial and the front are chosen among trials of which every seed is done.

    seed 0: AUC 0.70, 0.74, 0.73   seed 1: AUC 0.71, 0.76   ->   0.75, from 0.62 to 0.88 (t is 12.7 for two seeds)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import pyarrow as pa
from scipy.special import stdtrit

from dti_ray.config import Value
from dti_ray.tune.ledger import Report, RunState, Status, SweepState, Trial

Cost: TypeAlias = Literal["seconds_per_target", "flops_per_target"]

ABSENT = "–"  # of a key that was not searched yet when a trial was chosen: it had the base configuration's value
FEWEST_TRIALS = 6  # a forest of fewer says nothing
FOREST_TREES = 200
UPPER_QUANTILE = 0.975
WIDE_FACTOR = 10  # positive numbers that span more are compared by their logarithms


@dataclass(frozen=True)
class SeedMean:
    """The mean of a trial's seeds.

    Attributes:
        low: lower end of Student's 95 % interval, `high` the upper one; None for one seed.
        values: one for each seed that has any.
    """

    mean: float
    low: float | None
    high: float | None
    values: tuple[float, ...]


@dataclass(frozen=True)
class TrialResult:
    """One configuration, over its seeds.

    Attributes:
        runs: names, one for each of `seeds`.
        status: failed or stopped if any run is, done if all are.
        auc: None until a run has reported; `log_loss` is that of the same reports.
        targets: that a run trained so far, on average.
        seconds_per_target: mean of the runs that trained; None before. `flops_per_target` alike.
        failures: of all runs, also those after which they went on.
    """

    number: int
    params: Mapping[str, Value]
    runs: tuple[str, ...]
    seeds: tuple[int, ...]
    status: Status
    auc: SeedMean | None
    log_loss: SeedMean | None
    targets: int
    seconds_per_target: float | None
    flops_per_target: float | None
    failures: tuple[str, ...]

    def value(self, metric: str) -> float | None:
        """Return the mean `auc` or `log_loss`, turned so that more is better."""
        mean = self.mean(metric)
        if mean is None:
            return None
        return mean.mean if metric == "auc" else -mean.mean

    def mean(self, metric: str) -> SeedMean | None:
        """Return `auc` or `log_loss`."""
        return self.auc if metric == "auc" else self.log_loss


def results(state: SweepState, metric: str) -> list[TrialResult]:
    """Return what each trial came to, by number; `metric` says which report of a run is its best."""
    return [_result(trial, state.of_trial(number), metric) for number, trial in sorted(state.trials.items())]


def best_report(run: RunState, metric: str) -> Report | None:
    """Return the best report of a run, the first of equals; None where none has a value."""
    defined = [report for report in run.reports if math.isfinite(report.value(metric))]
    return max(defined, key=lambda report: report.value(metric)) if defined else None


def best(trials: Sequence[TrialResult], metric: str) -> TrialResult | None:
    """Return the done trial with the best mean, the lowest number of equals; None where none is done."""
    return next(iter(ranked(trials, metric)), None)


def ranked(trials: Sequence[TrialResult], metric: str) -> list[TrialResult]:
    """Return the done trials, the best mean first, of equals the lowest number."""
    return sorted(_complete(trials, metric), key=lambda one: (one.value(metric), -one.number), reverse=True)


def by_metric(trials: Iterable[TrialResult], metric: str) -> list[TrialResult]:
    """Return all trials, whatever their status, the best mean first; those without one come last."""

    def place(one: TrialResult) -> tuple[float, int]:
        value = one.value(metric)
        return (math.inf if value is None or math.isnan(value) else -value), one.number

    return sorted(trials, key=place)


def pareto(trials: Sequence[TrialResult], cost: Cost) -> list[TrialResult]:
    """Return the done trials that no other beats, cheapest first.

    One beats another if it has at least its AUC at no more cost, and is better in one of the two; so of equals all
    stay. A trial of which AUC or cost is not known takes no part.
    """
    known = {
        one.number: (value, price)
        for one in _complete(trials, "auc")
        if (value := one.value("auc")) is not None and (price := getattr(one, cost)) is not None
    }

    def is_beaten(number: int) -> bool:
        value, price = known[number]
        return any(
            other_value >= value and other_price <= price and (other_value, other_price) != (value, price)
            for other_value, other_price in known.values()
        )

    front = [one for one in trials if one.number in known and not is_beaten(one.number)]
    return sorted(front, key=lambda one: (known[one.number][1], one.number))


def importance(trials: Sequence[TrialResult], metric: str) -> dict[str, float] | None:
    """Return how much each varied key explains of the metric, as shares of 1, the largest first.

    The mean decrease in impurity of a random forest (Breiman 2001). Done and stopped trials count, each with its best
    value, so a key that makes trials learn slowly counts as one that makes them worse.

    Returns:
        None with fewer than six such trials or fewer than two keys that vary among them.
    """
    from sklearn.ensemble import RandomForestRegressor  # takes seconds, which a sweep's start need not wait for

    told = [one for one in trials if one.status in (Status.DONE, Status.STOPPED) and one.value(metric) is not None]
    keys = varied_keys(one.params for one in told)
    if len(told) < FEWEST_TRIALS or len(keys) < 2:
        return None
    parts = [_features([one.params.get(key, ABSENT) for one in told]) for key in keys]
    forest = RandomForestRegressor(FOREST_TREES, random_state=0)
    forest.fit(np.hstack(parts), [one.value(metric) for one in told])
    ends = np.cumsum([part.shape[1] for part in parts])[:-1]
    shares = [float(part.sum()) for part in np.split(forest.feature_importances_, ends)]
    return dict(sorted(zip(keys, shares, strict=True), key=lambda pair: -pair[1]))


def varied_keys(params: Iterable[Mapping[str, Value]]) -> list[str]:
    """Return the keys that are not the same in all of some configurations."""
    each = list(params)
    keys = dict.fromkeys(key for one in each for key in one)
    return [key for key in keys if len({value_text(one.get(key, ABSENT)) for one in each}) > 1]


def is_wide(numbers: Sequence[float]) -> bool:
    """Return whether numbers are better told apart by their logarithms."""
    return bool(numbers) and min(numbers) > 0 and max(numbers) > WIDE_FACTOR * min(numbers)


def is_number(value: Value) -> bool:
    """Return whether a value can stand on a scale."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def value_text(value: Value) -> str:
    """Write a value of a configuration."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def table(state: SweepState, metric: str) -> pa.Table:
    """Return one row for each run; `auc` and `log_loss` are of its best report by the metric.

    A key's column has its values' type, and is text where they have several (`packing.k` of 20 and "all").
    """
    runs = sorted(state.runs.values(), key=lambda run: (run.trial, run.seed))
    params = [state.trials[run.trial].params for run in runs]
    keys = dict.fromkeys(key for trial in state.trials.values() for key in trial.params)
    reports = [best_report(run, metric) for run in runs]

    def column(kind: pa.DataType, read: Callable[[RunState], object]) -> pa.Array:
        return pa.array([read(run) for run in runs], kind)

    return pa.table(
        {
            "trial": column(pa.int64(), lambda run: run.trial),
            "run": column(pa.string(), lambda run: run.name),
            "seed": column(pa.int64(), lambda run: run.seed),
            "status": column(pa.string(), lambda run: run.status.value),
            **{key: _param_column([one.get(key) for one in params]) for key in keys},
            "targets": column(pa.int64(), lambda run: run.targets),
            "auc": pa.array([report and report.auc for report in reports], pa.float64()),
            "log_loss": pa.array([report and report.log_loss for report in reports], pa.float64()),
            "seconds": column(pa.float64(), lambda run: run.seconds),
            "seconds_per_target": column(pa.float64(), _seconds_per_target),
            "flops_per_target": column(pa.float64(), lambda run: run.flops_per_target),
            "starts": column(pa.int64(), lambda run: run.starts),
            "failures": column(pa.int64(), lambda run: len(run.failures)),
            "reason": column(pa.string(), lambda run: run.reason),
        }
    )


def _result(trial: Trial, runs: Sequence[RunState], metric: str) -> TrialResult:
    reports = [report for run in runs if (report := best_report(run, metric)) is not None]
    return TrialResult(
        number=trial.number,
        params=trial.params,
        runs=tuple(run.name for run in runs),
        seeds=tuple(run.seed for run in runs),
        status=_status({run.status for run in runs}),
        auc=_seed_mean([report.auc for report in reports]),
        log_loss=_seed_mean([report.log_loss for report in reports]),
        targets=round(sum(run.targets for run in runs) / max(1, len(runs))),
        seconds_per_target=_mean(map(_seconds_per_target, runs)),
        flops_per_target=_mean(run.flops_per_target for run in runs),
        failures=tuple(failure for run in runs for failure in run.failures),
    )


def _status(runs: set[Status]) -> Status:
    for one in (Status.FAILED, Status.STOPPED):
        if one in runs:
            return one
    if runs == {Status.DONE}:
        return Status.DONE
    return Status.RUNNING if runs & {Status.RUNNING, Status.DONE} else Status.WAITING


def _seed_mean(values: Sequence[float]) -> SeedMean | None:
    defined = tuple(value for value in values if math.isfinite(value))
    if not defined:
        return None
    mean, count = float(np.mean(defined)), len(defined)
    if count == 1:
        return SeedMean(mean, None, None, defined)
    half = float(stdtrit(count - 1, UPPER_QUANTILE) * np.std(defined, ddof=1) / math.sqrt(count))
    return SeedMean(mean, mean - half, mean + half, defined)


def _complete(trials: Sequence[TrialResult], metric: str) -> list[TrialResult]:
    """Return the done trials whose mean is one over all their seeds."""
    return [
        one
        for one in trials
        if one.status is Status.DONE
        and (mean := one.mean(metric)) is not None
        and len(mean.values) == len(one.runs)
    ]  # fmt: skip


def _seconds_per_target(run: RunState) -> float | None:
    return run.seconds / run.targets if run.targets else None


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _features(values: Sequence[Value]) -> np.ndarray:
    """Return the columns for one key: its numbers, if it has any, and one for each other value."""
    numbers = [float(value) for value in values if is_number(value)]  # pyright: ignore[reportArgumentType]
    middle = float(np.median(numbers)) if numbers else 0.0
    scaled = np.array([float(value) if is_number(value) else middle for value in values])  # pyright: ignore[reportArgumentType]
    others = sorted({value_text(value) for value in values if not is_number(value)})
    columns = [np.log(scaled) if is_wide(numbers) else scaled] if numbers else []
    columns += [np.array([not is_number(value) and value_text(value) == other for value in values]) for other in others]
    return np.stack(columns, axis=1).astype(float)


def _param_column(values: Sequence[Value]) -> pa.Array:
    kinds = {type(value) for value in values if value is not None}
    if kinds == {int, float}:
        return pa.array(values, pa.float64())
    if len(kinds) == 1:
        return pa.array(values)
    return pa.array([None if value is None else value_text(value) for value in values], pa.string())
