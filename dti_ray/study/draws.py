"""AUC under many draws of the users at once, for the many models of a study.

Stage: study, below its comparison. In: users and labels of a split, then probabilities. Out: one AUC for each draw.
Invariant: entry 0 of every result is the value itself, the others are bootstrap replicates; all models of a split meet
the same draws, so that differences of results are paired. The draws are those of `dti_ray.metrics` for the same seed.

`dti_ray.metrics` computes the same for two models; here the work that depends on the model is one sparse product:

    AUC = sum_u w_u sum_{clicks i of u} (N_below(i) + N_up_to(i)) / 2  /  (clicks * no-clicks)

w_u says how often user u was drawn. N is the running sum of w over the no-clicks, by rising probability; a matrix of
users x ranks, made once per model, adds up where the clicks of each user lie in it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.sparse import csr_matrix

from dti_ray.metrics import Estimate, draw_counts
from dti_ray.metrics.formulas import Labels, Probabilities, Users

CHUNK_DRAWS = 16  # at once: ranks x draws stay in a core's cache


@dataclass(frozen=True, eq=False)
class Draws:
    """How often each user is drawn.

    Attributes:
        user: dense index of each target's user, int64[targets].
        label: of each target.
        counts: float64[users, 1 + replicates], the first column all ones.
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
    return Draws(index, np.asarray(label), np.stack([np.ones(len(distinct)), *drawn], axis=1).astype(np.float64))


def drawn_auc(draws: Draws, probability: Probabilities) -> Float[np.ndarray, " draws"]:
    """Return the AUC under each draw, exact under ties; nan where a draw holds one class only."""
    order = np.argsort(probability, kind="stable")
    clicks, no_clicks = order[draws.label[order] == 1], order[draws.label[order] == 0]
    lower = probability[no_clicks]
    beaten = [np.searchsorted(lower, probability[clicks], side) for side in ("left", "right")]
    users, columns = draws.counts.shape
    places = (np.tile(draws.user[clicks], 2), np.concatenate(beaten))
    at_rank = csr_matrix((np.full(2 * len(clicks), 0.5), places), shape=(users, len(no_clicks) + 1))
    clicks_of_user = np.bincount(draws.user[clicks], minlength=users).astype(np.float64)
    result = np.full(columns, math.nan)
    for start in range(0, columns, CHUNK_DRAWS):
        weight = np.ascontiguousarray(draws.counts[:, start : start + CHUNK_DRAWS])
        below = np.zeros((len(no_clicks) + 1, weight.shape[1]))
        np.cumsum(weight.take(draws.user[no_clicks], axis=0), axis=0, out=below[1:])
        in_order = np.einsum("ud,ud->d", weight, at_rank @ below)
        pairs = (clicks_of_user @ weight) * below[-1]
        np.divide(in_order, pairs, out=result[start : start + CHUNK_DRAWS], where=pairs > 0)
    return result


def estimate(values: Sequence[float] | np.ndarray) -> Estimate:
    """Return the value, and the 95 % percentile interval of its replicates where there are any; nan are left out."""
    return Estimate.of(np.float64(values[0]), [np.asarray(values[1:], dtype=np.float64)])
