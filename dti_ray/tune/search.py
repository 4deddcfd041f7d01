"""Which configurations are tried next, given all that is known.

Stage: tune, its searchers. In: the `tune` section; the known trials, or the state of a sweep. Out: `Trial`s.
Invariant: a pure function of its arguments, so a sweep that was killed goes on as if it had not been; no configuration
is planned twice; a trial that is known keeps its number.

    random, 3 trials, k {grid: [10, 20]}; known: 0 {lr: 0.001, k: 10}, 1 {lr: 0.001, k: 20}, 2 {lr: 0.002, k: 10}
    plan_ahead -> 3 {lr: 0.002, k: 20}, 4 {lr: 0.0007, k: 10}, 5 {lr: 0.0007, k: 20}
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from dti_ray.config import Dimension, RunConfig, TuneConfig, Value
from dti_ray.data.plan import derive_seed
from dti_ray.errors import ConfigError, Fault
from dti_ray.tune.ledger import RunState, Status, SweepState, Trial
from dti_ray.tune.space import (
    LR,
    Params,
    combinations,
    count,
    ends,
    grid_part,
    holds,
    identity,
    rounded,
    sample,
    values_of,
)

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution

TRIES = 20  # that tpe has to propose what is not known yet, before a random configuration is taken
STARTUP = (3, 10)  # random configurations before tpe has an opinion: a quarter of all, within these


def plan_first(base: RunConfig, known: Sequence[Trial]) -> list[Trial]:
    """Return the configurations of `tune.first` that are still to be planned; a key that one leaves out is the base's.

    A grid search has none: its combinations are all that is asked for.
    """
    if base.tune.search == "grid":
        return []
    own = values_of(base, base.tune.space)
    wanted = {identity(params): params for params in ({**own, **first} for first in base.tune.first)}
    seen = {identity(trial.params) for trial in known}
    new = [params for name, params in wanted.items() if name not in seen]
    return [Trial(number, params) for number, params in enumerate(new, _next_number(known))]


def plan_ahead(tune: TuneConfig, known: Sequence[Trial]) -> list[Trial]:
    """Return the trials of a random or a grid search that are still to be planned, numbered after the known ones.

    Random: `tune.trials` configurations, known ones included, each with every combination of the grid keys.
    Grid: every combination that no known trial has. TPE: none; `ask` for one at a time.
    """
    if tune.search == "tpe":
        return []
    if tune.search == "grid":
        wanted = combinations(tune.space)
    else:
        samples = [params for params in _samples(tune, known) if holds(_sampled(tune), params)]
        crossed = combinations(grid_part(tune.space))
        wanted = [{**params, **combination} for params in samples for combination in crossed]
    seen = {identity(trial.params) for trial in known}
    new = [params for params in wanted if identity(params) not in seen]
    return [Trial(number, params) for number, params in enumerate(new, _next_number(known))]


def ask(tune: TuneConfig, state: SweepState) -> Trial | None:
    """Return the next trial that Optuna's TPE proposes, or None where all are planned, or by another search.

    Its study is built anew from the state: finished runs with their best values, stopped ones with what they
    reported, unfinished ones as such, so that it does not propose the same again meanwhile. Trials that the space does
    not hold (it was another one when they were planned) are left out.

    Raises:
        ConfigError: Optuna is not installed.
    """
    known = list(state.trials.values())
    if tune.search != "tpe" or len(known) >= tune.trials or not _left(tune, known):
        return None
    check_search(tune)
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    number = _next_number(known)
    space = {key: _distribution(dimension) for key, dimension in tune.space.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # `multivariate`, before version 5
        sampler = optuna.samplers.TPESampler(
            seed=derive_seed(tune.seed, "tpe", number) % 2**32,
            multivariate=True,
            constant_liar=True,
            n_startup_trials=min(max(tune.trials // 4, STARTUP[0]), STARTUP[1]),
        )
    study = optuna.create_study(direction="maximize", sampler=sampler)
    study.add_trials(_told(tune, state, trial, space) for trial in known if holds(tune.space, trial.params))
    seen = {identity(trial.params) for trial in known}
    for _ in range(TRIES):
        params = _decoded(tune, study.ask(space).params)
        if identity(params) not in seen:
            return Trial(number, params)
    return Trial(number, _samples(tune, known)[-1])


def check_search(tune: TuneConfig) -> None:
    """Refuse a search whose package is missing.

    Raises:
        ConfigError: with the command that installs it.
    """
    if faults := _missing(tune):
        raise ConfigError(*faults)


def check_plan(tune: TuneConfig) -> None:
    """Refuse a search whose package is missing, and searches and schedulers that do not go together.

    Raises:
        ConfigError: with one fault per disagreement.
    """
    faults = _missing(tune)
    grid = grid_part(tune.space)
    if tune.search == "tpe":
        problem = "is a grid with search: tpe, which proposes one configuration at a time"
        faults += [Fault(f"tune.space.{key}", problem, "choice") for key in grid]
    if tune.scheduler == "pbt" and tune.search == "tpe":
        problem = "pbt with search: tpe, which would learn from learning rates that no run keeps"
        faults.append(Fault("tune.scheduler", problem, "asha, median or none; or search: random or grid"))
    if tune.scheduler == "pbt" and tune.max_concurrent == 1:
        problem = "1 with scheduler: pbt, which takes over the states of runs that train at the same time"
        faults.append(Fault("tune.max_concurrent", problem, "at least 2"))
    if tune.scheduler == "pbt" and tune.search == "random":
        problem = "is drawn at random with scheduler: pbt, which compares runs that differ in learning rate only"
        hint = "each of its values then has a population of its own"
        faults += [Fault(f"tune.space.{key}", problem, "grid", hint) for key in _sampled(tune) if key != LR]
    if faults:
        raise ConfigError(*faults)


def _missing(tune: TuneConfig) -> list[Fault]:
    if tune.search != "tpe" or importlib.util.find_spec("optuna") is not None:
        return []
    return [Fault("tune.search", "tpe needs Optuna", hint="pip install 'dti-ray[search]'")]


def _samples(tune: TuneConfig, known: Sequence[Trial]) -> list[Params]:
    """Return `tune.trials` different configurations without grid keys: known ones, then as many new ones as it takes.

    The new ones' indexes go on after the number of the known; fewer come where the space holds no more.
    """
    samples = _bare(tune, known)
    wanted = min(tune.trials, len(samples) + _left(tune, known))
    for number in itertools.count(len(samples)):
        if len(samples) >= wanted:
            break
        params = sample(tune.space, number, tune.seed)
        samples.setdefault(identity(params), params)
    return list(samples.values())[: tune.trials]


def _bare(tune: TuneConfig, known: Sequence[Trial]) -> dict[str, Params]:
    """Return the known configurations without grid keys, by identity."""
    grid = grid_part(tune.space)
    bare = ({key: value for key, value in trial.params.items() if key not in grid} for trial in known)
    return {identity(params): params for params in bare}


def _sampled(tune: TuneConfig) -> dict[str, Dimension]:
    """Return the space without its grid keys."""
    return {key: dimension for key, dimension in tune.space.items() if dimension.grid is None}


def _left(tune: TuneConfig, known: Sequence[Trial]) -> float:
    """Return how many configurations without grid keys are not known yet, at least."""
    space = _sampled(tune)
    return max(0, count(space) - sum(holds(space, params) for params in _bare(tune, known).values()))


def _next_number(known: Iterable[Trial]) -> int:
    return 1 + max((trial.number for trial in known), default=-1)


def _told(
    tune: TuneConfig, state: SweepState, trial: Trial, space: dict[str, BaseDistribution]
) -> optuna.trial.FrozenTrial:
    """Return what Optuna is told of a trial; it takes the number of a validation for the time at which it was."""
    from optuna.trial import TrialState, create_trial

    runs = state.of_trial(trial.number)
    statuses = {run.status for run in runs}
    params = {key: _encoded(tune.space[key], value) for key, value in trial.params.items()}
    if not all(status.is_final for status in statuses):
        return create_trial(state=TrialState.RUNNING, params=params, distributions=space)
    if statuses <= {Status.FAILED}:
        return create_trial(state=TrialState.FAIL, params=params, distributions=space)
    if Status.STOPPED in statuses:
        return create_trial(
            state=TrialState.PRUNED, params=params, distributions=space, intermediate_values=_curve(tune, runs)
        )
    value = fmean(_best(tune, run) for run in runs if run.status is Status.DONE)
    return create_trial(state=TrialState.COMPLETE, params=params, distributions=space, value=value)


def _best(tune: TuneConfig, run: RunState) -> float:
    """Return a run's best value; one without any is worse than all others."""
    values = (report.value(tune.metric) for report in run.reports)
    return max(filter(math.isfinite, values), default=-math.inf)


def _curve(tune: TuneConfig, runs: Sequence[RunState]) -> dict[int, float]:
    """Return the mean over seeds of each validation, numbered from 1; to Optuna, no number is the worst."""
    each = itertools.zip_longest(*(run.reports for run in runs))
    return {
        number: fmean(report.value(tune.metric) for report in reports if report is not None)
        for number, reports in enumerate(each, 1)
    }


def _distribution(dimension: Dimension) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if dimension.randint is not None:
        return IntDistribution(*dimension.randint)
    if bounds := dimension.uniform or dimension.loguniform:
        return FloatDistribution(*bounds, log=dimension.loguniform is not None)
    return CategoricalDistribution([_encoded(dimension, value) for value in ends(dimension)])


def _encoded(dimension: Dimension, value: Value) -> Value:
    """Return a choice as text: Optuna would take 1, 1.0 and true for one."""
    return value if dimension.choice is None else json.dumps(value)


def _decoded(tune: TuneConfig, params: Mapping[str, Any]) -> dict[str, Value]:
    decoded: dict[str, Value] = {}
    for key, dimension in tune.space.items():
        value = params[key]
        if dimension.choice is not None:
            value = json.loads(value)
        elif bounds := dimension.uniform or dimension.loguniform:
            value = rounded(value, *bounds)
        decoded[key] = value
    return decoded
