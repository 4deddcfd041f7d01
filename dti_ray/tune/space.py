"""The search space: its configurations, by number or in full, and whether a base configuration allows them.

Stage: tune, what may be tried. In: `tune.space`. Out: the values of a configuration, by dotted key.
Invariant: a random configuration is a pure function of the space, the seed and its number; each key draws for itself,
so that another key, or another number of trials, changes no value. Random search crosses `grid` keys: every random
configuration of the other keys is repeated with each combination of the grid's values.

    space: optim.lr {loguniform: [3e-4, 3e-3]}, packing.k {grid: [10, 20]}; number 0
    sample -> {optim.lr: 0.00121443}    crossed -> with packing.k 10, then with packing.k 20
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import reduce
from typing import Any

import numpy as np

from dti_ray.config import Dimension, RunConfig, Value, dotted_keys, with_values
from dti_ray.config.load import unknown_key
from dti_ray.data.plan import derive_seed
from dti_ray.errors import ConfigError, Fault

Space = Mapping[str, Dimension]
Params = Mapping[str, Value]
LR = "optim.lr"  # the key that pbt changes
DIGITS = 6  # significant ones of a number drawn between two bounds: a configuration is read by people
INSIDE = 0.381966  # of the way between two bounds: no whole number, where whole numbers are all that is allowed


def sample(space: Space, number: int, seed: int) -> dict[str, Value]:
    """Return the random configuration of a number, without the grid keys."""
    return {
        key: _draw(dimension, np.random.default_rng(derive_seed(seed, "tune", number, key)))
        for key, dimension in space.items()
        if dimension.grid is None
    }


def grid_part(space: Space) -> dict[str, Dimension]:
    """Return the keys that random search crosses with every sampled configuration."""
    return {key: dimension for key, dimension in space.items() if dimension.grid is not None}


def combinations(space: Space) -> list[dict[str, Value]]:
    """Return every configuration of keys that are all `choice` or `grid`; the first key changes slowest."""
    every = itertools.product(*(_listed(dimension) for dimension in space.values()))
    return [dict(zip(space, values, strict=True)) for values in every]


def count(space: Space) -> float:
    """Return how many configurations without grid keys there are, or a lower bound where numbers are drawn."""
    return math.prod(_count(dimension) for dimension in space.values() if dimension.grid is None)


def holds(space: Space, params: Params) -> bool:
    """Say whether a configuration has exactly the keys of a space, and values that it may take."""
    return space.keys() == params.keys() and all(_may_be(dimension, params[key]) for key, dimension in space.items())


def identity(params: Params) -> str:
    """Return what two configurations share only if they are the same; 1 and 1.0 are one value, true is another."""
    return json.dumps({key: _plain(value) for key, value in params.items()}, sort_keys=True)


def rounded(value: float, low: float, high: float) -> float:
    """Return a number that reads well and is still between two bounds."""
    return min(max(float(f"{value:.{DIGITS}g}"), low), high)


def values_of(base: RunConfig, keys: Iterable[str]) -> dict[str, Value]:
    """Return what some dotted keys are in a configuration."""
    tree: Any = base.model_dump(mode="json")
    return {key: reduce(lambda section, name: section[name], key.split("."), tree) for key in keys}


def ends(dimension: Dimension) -> tuple[Value, ...]:
    """Return the values that one key may have, or the bounds between which it lies."""
    return _listed(dimension) or _bounds(dimension)


def corners(space: Space) -> list[tuple[str, Value]]:
    """Return every choice and every bound of a space."""
    return [(key, value) for key, dimension in space.items() for value in ends(dimension)]


def check_space(base: RunConfig, space: Space) -> None:
    """Apply every choice and bound to the base configuration, each alone.

    Raises:
        ConfigError: with one fault per unknown key and per value that the field, or the rest of the base, forbids.
    """
    faults = [fault for key, dimension in space.items() for fault in _faults(base, key, dimension)]
    if "packing.n" in space and base.eval.n is None:
        faults.append(
            Fault(
                "tune.space.packing.n", "trials would be evaluated with different contexts (eval.n is null)",
                hint="set eval.n",
            )
        )  # fmt: skip
    if faults:
        raise ConfigError(*faults)


def check_together(base: RunConfig, configurations: Iterable[Params]) -> None:
    """Apply whole configurations to the base: values that are allowed alone may exclude each other.

    Raises:
        ConfigError: with the faults of all configurations.
    """
    faults: list[Fault] = []
    for params in configurations:
        try:
            with_values(base, params)
        except ConfigError as error:
            together = ", ".join(f"{key}={value}" for key, value in params.items())
            faults.extend(Fault("tune.space", f"{together}: {fault}") for fault in error.faults)
    if faults:
        raise ConfigError(*faults)


def _draw(dimension: Dimension, generator: np.random.Generator) -> Value:
    if dimension.choice is not None:
        return dimension.choice[generator.integers(len(dimension.choice))]
    if dimension.randint is not None:
        return int(generator.integers(*dimension.randint, endpoint=True))
    low, high = _bounds(dimension)
    if dimension.uniform is not None:
        return rounded(generator.uniform(low, high), low, high)
    return rounded(math.exp(generator.uniform(math.log(low), math.log(high))), low, high)


def _listed(dimension: Dimension) -> tuple[Value, ...]:
    """Return the values of a `choice` or a `grid`, else none."""
    return dimension.choice or dimension.grid or ()


def _bounds(dimension: Dimension) -> tuple[float, float]:
    bounds = dimension.uniform or dimension.loguniform or dimension.randint
    assert bounds is not None
    return bounds


def _count(dimension: Dimension) -> float:
    if values := _listed(dimension):
        return len(values)
    low, high = _bounds(dimension)
    if dimension.randint is not None:
        return high - low + 1
    step = 10.0 ** (math.floor(math.log10(max(abs(low), abs(high)))) - DIGITS + 1)
    return max(1, math.floor((high - low) / step))


def _plain(value: Value) -> Value:
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _may_be(dimension: Dimension, value: Value) -> bool:
    if values := _listed(dimension):
        return repr(_plain(value)) in (repr(_plain(one)) for one in values)
    low, high = _bounds(dimension)
    kind = float if dimension.randint is None else int
    return isinstance(value, kind) and not isinstance(value, bool) and low <= value <= high


def _faults(base: RunConfig, key: str, dimension: Dimension) -> list[Fault]:
    """Return what is wrong with one key of a space."""
    where = f"tune.space.{key}"
    if key not in set(dotted_keys()):
        return [replace(unknown_key(key), where=where)]
    if faults := [fault for value in ends(dimension) for fault in _faults_with(base, key, value)]:
        return faults
    if _listed(dimension) or dimension.randint is not None:
        return []
    low, high = _bounds(dimension)
    between = _faults_with(base, key, rounded(low + INSIDE * (high - low), low, high))
    return [replace(fault, hint="both bounds are allowed, but not what lies between; try randint") for fault in between]


def _faults_with(base: RunConfig, key: str, value: Value) -> list[Fault]:
    """Return what is wrong with one value, as the user sees it who wrote the space."""
    try:
        with_values(base, {key: value})
    except ConfigError as error:
        return [
            replace(fault, where=f"tune.space.{key}")
            if fault.where == key
            else Fault(f"tune.space.{key}", f"got {value!r}: {fault}", hint="all else is as in the base configuration")
            for fault in error.faults
        ]
    return []
