"""Intervals by a bootstrap over users.

Stage: after any inference. In: the user of each target, and numbers per replicate. Out: weights, and `Estimate`s.
Invariant: a replicate is nothing but a row of weights, how often each target's user was drawn; so whatever has a
formula with weights has an interval. Users are drawn, not targets, since one user's targets depend on each other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TypeAlias

import numpy as np
from jaxtyping import Float, Integer

from dti_ray.metrics.formulas import Users, Values

INTERVAL_PERCENTILES = (2.5, 97.5)
CHUNK_WEIGHTS = 1 << 17  # weights made at once: 1 MiB stays in a core's cache

Replicates: TypeAlias = Float[np.ndarray, "replicates targets"]
Counts: TypeAlias = Integer[np.ndarray, " users"]
Draws: TypeAlias = Sequence[np.float64 | Float[np.ndarray, " _"]]


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % bootstrap interval; nan where undefined, low and high also without bootstrap."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, value: Values, draws: Draws) -> Estimate:
        """Return a value with the 2.5 and 97.5 percentiles of its replicates.

        Args:
            value: of all targets, each with the weight 1.
            draws: the same number of each replicate, in chunks as `user_weights` yields them; nan is left out.
        """
        replicates = np.concatenate([[math.nan], *draws])
        defined = replicates[~np.isnan(replicates)]
        low, high = np.percentile(defined, INTERVAL_PERCENTILES) if len(defined) else (math.nan, math.nan)
        return cls(float(value), float(low), float(high))


def user_weights(user: Users, replicates: int, seed: int) -> Iterator[Replicates]:
    """Yield the weights of some replicates, a chunk of [replicates, targets] at a time.

    A replicate draws as many users as there are, with replacement, and takes each with all its targets.

    Args:
        user: of each target; at least one.
        replicates: number of all, 0 for none.
        seed: the same seed and users give the same draws, so several models meet the same users in each replicate:
            in one pass over the chunks, or in one pass each.
    """
    distinct, user_row = np.unique(user, return_inverse=True)
    counts = draw_counts(len(distinct), replicates, seed)
    chunk = max(1, CHUNK_WEIGHTS // len(user))  # the draws do not depend on it
    while drawn := list(islice(counts, chunk)):
        yield np.stack(drawn).astype(np.float64)[:, user_row]


def draw_counts(users: int, replicates: int, seed: int) -> Iterator[Counts]:
    """Yield how often each of some users is drawn, one replicate after the other; see `user_weights`."""
    generator = np.random.default_rng(seed)
    for _ in range(replicates):
        yield np.bincount(generator.integers(users, size=users), minlength=users)
