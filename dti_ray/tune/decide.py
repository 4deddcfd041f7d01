"""What becomes of a run after a validation: it goes on, it is stopped, or its learning rate changes.

Stage: tune, its schedulers. In: the state of a sweep, with a run's newest report in it. Out: a `Decision`.
Invariant: a pure function of the state; everything is counted in targets seen, so that a run with long prompts and one
with short ones are compared after the same training; a run that has seen all its targets is never ended.

    asha, reduction 3, rungs at 20,000 and 60,000 targets; auc of the runs at the first rung, as they come:
    0.70 goes on (it is the first)   0.68 is stopped (best 1 of 2)   0.72 goes on   0.71 goes on (best 2 of 4)
"""

from __future__ import annotations

import math
from statistics import fmean, median

import numpy as np

from dti_ray.config import Dimension, TuneConfig
from dti_ray.data.plan import derive_seed
from dti_ray.tune.ledger import Decision, Report, RunState, Status, SweepState
from dti_ray.tune.space import LR, ends, identity, rounded

OTHERS_AT_LEAST = 3  # the median of fewer runs says little
FACTORS = (0.8, 1.25)  # by which pbt changes a learning rate
QUARTER = 4  # pbt: the best and the worst of so many


def decide(tune: TuneConfig, state: SweepState, run: RunState, total_targets: int, every_targets: int) -> Decision:
    """Return what becomes of a run after its newest report.

    Args:
        tune: which scheduler, and its numbers.
        state: all that is known, the newest report included.
        run: which run, as it is in the state.
        total_targets: what a run sees in all.
        every_targets: targets between two validations.
    """
    newest = run.reports[-1]
    if newest.targets >= total_targets:
        return Decision("go on", "all targets are seen")
    if tune.scheduler in ("asha", "median") and run.seed != tune.seeds[0]:
        return follow(tune, state, run)
    grace = tune.grace_targets or every_targets
    if tune.scheduler == "asha":
        reached = [rung for rung in rungs(grace, total_targets, tune.reduction) if _is_at(run, rung)]
        return _asha(tune, state, run, reached)
    if tune.scheduler == "median" and newest.targets >= grace:
        return _median(tune, state, run, newest.targets // every_targets * every_targets)
    if tune.scheduler == "pbt":
        every = tune.perturb_targets or every_targets
        milestone = newest.targets // every * every
        return _pbt(tune, state, run, milestone) if milestone and _is_at(run, milestone) else Decision("go on")
    return Decision("go on")


def follow(tune: TuneConfig, state: SweepState, run: RunState) -> Decision:
    """Return what becomes of a repeat: the first seed's run is judged, the others share its fate."""
    first = next((one for one in state.of_trial(run.trial) if one.seed == tune.seeds[0]), run)
    is_stopped = first.status is Status.STOPPED or (first.verdict is not None and first.verdict.kind == "stop")
    return Decision("stop", f"{first.name} was stopped") if is_stopped else Decision("go on")


def rungs(grace: int, total: int, factor: int) -> list[int]:
    """Return the targets after which asha compares runs: `grace`, then `factor` times as many, below the total."""
    found: list[int] = []
    while grace < total:
        found.append(grace)
        grace *= factor
    return found


def _asha(tune: TuneConfig, state: SweepState, run: RunState, reached: list[int]) -> Decision:
    """Stop a run that is not among the best 1 / reduction of those that came to its rung so far.

    Asynchronous successive halving (Li et al., "A System for Massively Parallel Hyperparameter Tuning", MLSys 2020),
    as a rule for stopping: a run is judged once at each rung, when it comes there, and never waits for others.
    """
    reasons: list[str] = []
    for rung in reached:
        values = [value for other in _judged(tune, state) if (value := _value_at(tune, other, rung)) is not None]
        mine = _value_at(tune, run, rung)
        assert mine is not None
        place, passing = 1 + sum(value > mine for value in values), math.ceil(len(values) / tune.reduction)
        reasons.append(f"{_shown(tune, mine)} at {rung:,} targets: number {place} of {len(values)}, {passing} go on")
        if place > passing:
            return Decision("stop", f"asha: {reasons[-1]}")
    return Decision("go on", f"asha: {'; '.join(reasons)}" if reasons else "")


def _median(tune: TuneConfig, state: SweepState, run: RunState, milestone: int) -> Decision:
    """Stop a run whose best value is below the median of the other runs' averages, over as many targets.

    The median stopping rule (Golovin et al., "Google Vizier: A Service for Black-Box Optimization", KDD 2017), with one
    deviation: runs that are not over yet count as well.
    """
    averages: list[float] = []
    for other in _judged(tune, state):
        until = _up_to(other, milestone)
        if other.name != run.name and until is not None:
            averages.append(fmean(_worth(tune, report) for report in until))
    best = max(_worth(tune, report) for report in run.reports)
    if len(averages) < OTHERS_AT_LEAST:
        return Decision(
            "go on", f"median: {len(averages)} other runs came to {milestone:,} targets, too few to compare"
        )
    middle = median(averages)
    reason = (
        f"median: best {_shown(tune, best)} by {milestone:,} targets, "
        f"median of {len(averages)} other runs' averages {_shown(tune, middle)}"
    )
    return Decision("stop" if best < middle else "go on", reason)


def _pbt(tune: TuneConfig, state: SweepState, run: RunState, milestone: int) -> Decision:
    """Give one of the worst runs the state of one of the best, and a learning rate near that one's.

    Population based training (Jaderberg et al., arXiv 1711.09846), of the learning rate alone. A population are the
    runs that differ in nothing but learning rate and seed: a state fits no other configuration. A run that is over is
    compared with, but not taken over: what it trained last leaves nothing to train.
    """
    population = {
        other.name: value
        for other in state.runs.values()
        if _peers(state, other) == _peers(state, run) and (value := _value_at(tune, other, milestone)) is not None
    }
    mine, values = population[run.name], population.values()
    quarter = max(1, len(population) // QUARTER)
    place = 1 + sum(value > mine for value in values)
    reason = f"pbt: {_shown(tune, mine)} at {milestone:,} targets: number {place} of {len(population)}"
    live = {name: value for name, value in population.items() if not state.runs[name].status.is_final}
    best = [
        name for name, value in live.items() if value > mine and sum(other > value for other in live.values()) < quarter
    ]
    if not best or sum(value < mine for value in values) >= quarter:
        return Decision("go on", reason)
    generator = np.random.default_rng(derive_seed(tune.seed, "pbt", run.name, milestone))
    source = sorted(best)[generator.integers(len(best))]
    lr = _near(tune.space[LR], _lr(state, state.runs[source]) * FACTORS[generator.integers(len(FACTORS))])
    change = f"takes over {source} ({_shown(tune, population[source])}) with lr {lr:g}"
    return Decision("change", f"{reason}; {change}", source, lr)


def _judged(tune: TuneConfig, state: SweepState) -> list[RunState]:
    """Return the runs that compete: of each trial that with the first seed."""
    return [run for run in state.runs.values() if run.seed == tune.seeds[0]]


def _worth(tune: TuneConfig, report: Report) -> float:
    """Return a report's value, more is better; one that is no number is the worst."""
    value = report.value(tune.metric)
    return -math.inf if math.isnan(value) else value


def _is_at(run: RunState, targets: int) -> bool:
    """Say whether the newest report is the run's first at or past so many targets."""
    *before, newest = run.reports
    return newest.targets >= targets and all(report.targets < targets for report in before)


def _up_to(run: RunState, targets: int) -> list[Report] | None:
    """Return the reports until the first at or past so many targets; None if the run did not come there."""
    past = next((place for place, report in enumerate(run.reports) if report.targets >= targets), None)
    return None if past is None else list(run.reports[: past + 1])


def _value_at(tune: TuneConfig, run: RunState, targets: int) -> float | None:
    """Return the value of the first report at or past so many targets; None if the run did not come there."""
    reports = _up_to(run, targets)
    return None if reports is None else _worth(tune, reports[-1])


def _peers(state: SweepState, run: RunState) -> str:
    """Return what the runs of one population share: all values but the learning rate."""
    return identity({key: value for key, value in state.trials[run.trial].params.items() if key != LR})


def _lr(state: SweepState, run: RunState) -> float:
    """Return the learning rate that a run has now."""
    lr = run.changes[-1].lr if run.changes else state.trials[run.trial].params[LR]
    assert isinstance(lr, int | float)
    return lr


def _near(dimension: Dimension, lr: float) -> float:
    """Return a learning rate that reads well, between the bounds of its dimension."""
    numbers = [float(value) for value in ends(dimension) if isinstance(value, int | float)]
    return rounded(lr, min(numbers), max(numbers))


def _shown(tune: TuneConfig, value: float) -> str:
    """Return a value as a person knows the metric."""
    if math.isinf(value):
        return f"{tune.metric} that is no number"
    return f"{tune.metric} {value if tune.metric == 'auc' else -value:.4f}"
