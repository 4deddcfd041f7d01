"""What another seed would change: deviations over seeds, and the interval in which a rerun lies.

Stage: study, below its comparison. In: values of one row, one for each seed. Out: deviations and intervals.
Invariant: one seed says nothing of seeds, so that its deviation is nan, never 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
from scipy.stats import t as student

UPPER_TAIL = 0.975  # of a two-sided interval of 95 %


def deviation(values: Sequence[float]) -> float:
    """Return the standard deviation of a sample; nan for one value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def rerun_interval(mean: float, seeds: int, pooled_sd: float, freedom: int) -> tuple[float, float]:
    """Return where the AUC of one more seed lies with 95 %.

    The prediction interval of one more value of a normal sample: mean +- t * sd * sqrt(1 + 1 / seeds), t being
    Student's with the degrees of freedom of the deviation.

    Args:
        mean: of the row's seeds.
        seeds: number of these.
        pooled_sd: standard deviation over seeds, pooled over rows: that of three values alone says little.
        freedom: degrees of freedom of `pooled_sd`.
    """
    half = float(student.ppf(UPPER_TAIL, freedom)) * pooled_sd * math.sqrt(1 + 1 / seeds)
    return mean - half, mean + half


def pooled_deviation(samples: Iterable[Sequence[float]]) -> tuple[float, int]:
    """Return the standard deviation within samples, and its degrees of freedom; nan and 0 for none."""
    squares = [(deviation(one) ** 2 * (len(one) - 1), len(one) - 1) for one in samples if len(one) > 1]
    freedom = sum(count for _, count in squares)
    return (math.sqrt(sum(square for square, _ in squares) / freedom), freedom) if freedom else (math.nan, 0)
