"""The formula of every metric, of one weight per target.

Stage: after any inference. In: users, labels, probabilities and weights, one row per target. Out: numbers.
Invariant: weights `[targets]` give one number, weights `[replicates, targets]` one number per replicate, by the same
formula. What is undefined is nan, not an exception: AUC and NE where the weighted targets hold one class only,
calibration without clicks, F1 with neither clicks nor predicted clicks.

Example: labels 0 1 0 1 with probabilities .1 .4 .4 .8 form four pairs of a click and a no-click; three
are in order and one is a tie, so AUC = 3.5 / 4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from jaxtyping import Float, Integer, Num

PROBABILITY_FLOOR = 1e-12  # log loss clips to [floor, 1 - floor]: one confident miss costs 27.6 nats at most
CLICK_THRESHOLD = 0.5
CALIBRATION_BINS = 15

Users: TypeAlias = Integer[np.ndarray, " targets"]
Labels: TypeAlias = Integer[np.ndarray, " targets"]
Probabilities: TypeAlias = Float[np.ndarray, " targets"]
PerTarget: TypeAlias = Float[np.ndarray, " targets"]
Rows: TypeAlias = Integer[np.ndarray, " _"]
Weights: TypeAlias = Num[np.ndarray, "*replicates targets"]
Values: TypeAlias = np.float64 | Float[np.ndarray, "*replicates"]


@dataclass(frozen=True, eq=False)
class Ranking:
    """The order of the targets by one model's probabilities, made once; each `auc` then is two sums over them.

    A bootstrap makes one of each model and asks all of them for every chunk of `user_weights`.

    Attributes:
        clicks: rows of the clicks.
        no_clicks: rows of the no-clicks, by rising probability.
        below: per click, number of no-clicks with a lower probability.
        up_to: per click, number of no-clicks with a lower or the same probability.
    """

    clicks: Rows
    no_clicks: Rows
    below: Rows
    up_to: Rows

    @classmethod
    def of(cls, label: Labels, probability: Probabilities) -> Ranking:
        """Rank the targets."""
        order = np.argsort(probability, kind="stable")
        clicks, no_clicks = order[label[order] == 1], order[label[order] == 0]
        lower = probability[no_clicks]
        below = np.searchsorted(lower, probability[clicks], side="left")
        up_to = np.searchsorted(lower, probability[clicks], side="right")
        return cls(clicks, no_clicks, below, up_to)

    def auc(self, weight: Weights) -> Values:
        """Return the area under the ROC curve, as `auc` does, for each row of weights."""
        clicks = weight[..., self.clicks]
        no_clicks = np.zeros((*weight.shape[:-1], len(self.no_clicks) + 1))
        np.cumsum(weight[..., self.no_clicks], axis=-1, out=no_clicks[..., 1:])
        beaten = no_clicks[..., self.below] + no_clicks[..., self.up_to]
        in_order = np.einsum("...i,...i->...", clicks, beaten) / 2
        return _ratio(in_order, clicks.sum(-1) * no_clicks[..., -1])


def auc(label: Labels, probability: Probabilities, weight: Weights | None = None) -> Values:
    """Return the area under the ROC curve, exact under ties; nan if either class has no weight.

    AUC = sum over pairs (click i, no-click j) of w_i w_j [p_i > p_j] + w_i w_j [p_i = p_j] / 2, divided by
    sum w_i * sum w_j (the Mann-Whitney statistic; Hanley and McNeil, Radiology 143, 1982).
    """
    return Ranking.of(label, probability).auc(_weights(label, weight))


def log_loss(label: Labels, probability: Probabilities, weight: Weights | None = None) -> Values:
    """Return the mean cross-entropy -y ln p - (1 - y) ln(1 - p), nats; p is clipped at 1e-12 on each side."""
    weight = _weights(label, weight)
    clipped = np.clip(probability, PROBABILITY_FLOOR, 1 - PROBABILITY_FLOOR)
    loss = -np.where(label == 1, np.log(clipped), np.log1p(-clipped))
    return _ratio(weight @ loss, weight.sum(-1))


def f1(label: Labels, probability: Probabilities, weight: Weights | None = None) -> Values:
    """Return F1 = 2 TP / (2 TP + FP + FN) of the class "click", predicted where p >= 0.5; nan for 0 / 0."""
    weight = _weights(label, weight)
    predicted = probability >= CLICK_THRESHOLD
    clicked = label == 1
    return _ratio(2 * (weight @ (predicted & clicked)), weight @ predicted + weight @ clicked)


def gauc(user: Users, label: Labels, probability: Probabilities, weight: Weights | None = None) -> Values:
    """Return sum_u n_u AUC_u / sum_u n_u over users with both classes; nan if there is none.

    n_u is the number of the user's targets, times the user's weight: all targets of a user must have the
    same. Source: Zhu et al., "Optimized Cost per Click in Taobao Display Advertising", KDD 2017.
    """
    return mean_of_defined(user_auc(user, label, probability), _weights(label, weight))


def normalised_entropy(label: Labels, probability: Probabilities, weight: Weights | None = None) -> Values:
    """Return log loss / (-b ln b - (1 - b) ln(1 - b)), b the share of clicks; nan if b is 0 or 1.

    Source: He et al., "Practical Lessons from Predicting Clicks on Ads at Facebook", ADKDD 2014.
    """
    weight = _weights(label, weight)
    clicks, others = weight @ (label == 1), weight @ (label == 0)
    share = np.stack([_ratio(clicks, clicks + others), _ratio(others, clicks + others)])
    entropy = -(share * np.log(np.where(share > 0, share, 1.0))).sum(0)
    return _ratio(log_loss(label, probability, weight), entropy)


def calibration(label: Labels, probability: Probabilities, weight: Weights | None = None) -> Values:
    """Return sum of p / number of clicks; 1 is calibrated on average, nan without clicks."""
    weight = _weights(label, weight)
    return _ratio(weight @ probability, weight @ (label == 1))


def calibration_error(label: Labels, probability: Probabilities, weight: Weights | None = None) -> Values:
    """Return the ECE: sum over bins of (n_b / n) |mean p - mean y|, 15 bins of equal width over [0, 1].

    Bin b holds b/15 <= p < (b+1)/15; the last one also p = 1. n_b |mean p - mean y| is the absolute sum of
    the residuals p - y in the bin. Source: Naeini et al., "Obtaining Well Calibrated Probabilities Using
    Bayesian Binning", AAAI 2015; here p is the probability of a click, not the confidence in a class.
    """
    weight = _weights(label, weight)
    bins = np.minimum((probability * CALIBRATION_BINS).astype(np.int64), CALIBRATION_BINS - 1)
    order = np.argsort(bins, kind="stable")
    first_of_bin = np.unique(bins[order], return_index=True)[1]
    residual = (probability - label)[order]
    by_bin = np.add.reduceat(weight[..., order] * residual, first_of_bin, axis=-1)
    return _ratio(np.abs(by_bin).sum(-1), weight.sum(-1))


def user_auc(user: Users, label: Labels, probability: Probabilities) -> PerTarget:
    """Return, for each target, the AUC within its user; nan where that user's targets hold one class.

    Ties are exact as in `auc`, and there must be at least one target.
    """
    order = np.lexsort((probability, user))
    by_user, by_probability, clicked = user[order], probability[order], label[order] == 1
    next_user = by_user[1:] != by_user[:-1]
    user_row, user_start, _ = _runs(next_user)
    tie_row, tie_start, tie_end = _runs(next_user | (by_probability[1:] != by_probability[:-1]))
    no_clicks = np.concatenate([[0], np.cumsum(~clicked)])
    # No-clicks of the same user that lie below a row, a tie counting half.
    beaten = (no_clicks[tie_start] + no_clicks[tie_end])[tie_row] / 2 - no_clicks[user_start][user_row]
    pairs = np.bincount(user_row, clicked) * np.bincount(user_row, ~clicked)
    of_user = np.asarray(_ratio(np.bincount(user_row, beaten * clicked), pairs))
    result = np.empty(len(label))
    result[order] = of_user[user_row]
    return result


def mean_of_defined(values: PerTarget, weight: Weights) -> Values:
    """Return the weighted mean of what is not nan; nan if nothing is."""
    defined = ~np.isnan(values)
    return _ratio(weight @ np.where(defined, values, 0.0), weight @ defined)


def _ratio(numerator: Values, denominator: Values) -> Values:
    """Return numerator / denominator, nan where the denominator is 0."""
    out = np.full(np.shape(denominator), math.nan)
    return np.divide(numerator, denominator, out=out, where=np.asarray(denominator) != 0)[()]


def _runs(changes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the run of each row, and each run's start and end, from "row i + 1 differs from row i"."""
    row = np.concatenate([[0], np.cumsum(changes)])
    start = np.concatenate([[0], np.flatnonzero(changes) + 1])
    return row, start, np.append(start[1:], len(row))


def _weights(label: Labels, weight: Weights | None) -> Weights:
    return np.ones(len(label)) if weight is None else weight.astype(np.float64, copy=False)
