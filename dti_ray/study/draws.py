"""AUC under many draws of the users at once, for the many models of a study.

Stage: study, below its comparison. In: users and labels of a split, then probabilities. Out: one AUC for each draw.
Invariant: entry 0 of every result is the value itself, the others are bootstrap replicates; all models of a split meet
the same draws, so that differences of results are paired. The draws are those of `dti_ray.metrics` for the same seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from dti_ray.metrics import Estimate, draw_counts
from dti_ray.metrics.formulas import Labels, Probabilities, Ranking, Users

CHUNK_DRAWS = 16  # at once: targets x draws stay in a core's cache


@dataclass(frozen=True, eq=False)
class Draws:
    """How often each user is drawn.

    Attributes:
        user: dense index of each target's user, int64[targets].
        label: of each target.
        counts: float64[1 + replicates, users], the first row all ones.
    """

    user: np.ndarray
    label: np.ndarray
    counts: np.ndarray


def draw_users(user: Users, label: Labels, replicates: int, seed: int) -> Draws:
    """Return draws of as many users as there are, with replacement, each with all its targets.

    Args:
        user: of each target.
        label: of each target.
        replicates: number of draws; 0 leaves the value only.
        seed: of the draws.
    """
    distinct, index = np.unique(user, return_inverse=True)
    drawn = draw_counts(len(distinct), replicates, seed)
    return Draws(index, np.asarray(label), np.stack([np.ones(len(distinct)), *drawn]).astype(np.float64))


def drawn_auc(draws: Draws, probability: Probabilities) -> Float[np.ndarray, " draws"]:
    """Return the AUC under each draw, exact under ties; nan where a draw holds one class only."""
    ranking = Ranking.of(draws.label, probability)
    starts = range(0, len(draws.counts), CHUNK_DRAWS)
    return np.concatenate([ranking.auc(draws.counts[at : at + CHUNK_DRAWS, draws.user]) for at in starts])


def estimate(values: Sequence[float] | np.ndarray) -> Estimate:
    """Return the value, and the 95 % percentile interval of its replicates where there are any; nan are left out."""
    return Estimate.of(np.float64(values[0]), [np.asarray(values[1:], dtype=np.float64)])
