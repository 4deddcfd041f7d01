"""How good predicted click probabilities are, with 95 % intervals by a bootstrap over users.

Stage: after any inference. In: `Predictions`, one row per target scored. Out: `Metrics`.
Invariant: every metric is a function of one weight per target, and a bootstrap replicate is nothing but
another row of weights (how often each target's user was drawn). So value, interval and paired difference
come from the same formulas. Users are drawn, not targets, since one user's targets depend on each other.

Shapes: weights `[targets]` give one number, weights `[replicates, targets]` one number per replicate.
What is undefined is nan, not an exception: AUC and NE where the weighted targets hold one class only,
calibration without clicks, F1 with neither clicks nor predicted clicks.

Example: labels 0 1 0 1 with probabilities .1 .4 .4 .8 form four pairs of a click and a no-click; three
are in order and one is a tie, so AUC = 3.5 / 4.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TypeAlias

import numpy as np
from jaxtyping import Float, Integer, Num

from dti_ray.errors import Fault, InputError

PROBABILITY_FLOOR = 1e-12  # log loss clips to [floor, 1 - floor]: one confident miss costs 27.6 nats at most
CLICK_THRESHOLD = 0.5
CALIBRATION_BINS = 15
COUNTS = ("targets", "users", "gauc_users_left_out")
INTERVAL_PERCENTILES = (2.5, 97.5)
CHUNK_WEIGHTS = 1 << 17  # weights that the bootstrap makes at once: 1 MiB stays in a core's cache

Users: TypeAlias = Integer[np.ndarray, " targets"]
Labels: TypeAlias = Integer[np.ndarray, " targets"]
Probabilities: TypeAlias = Float[np.ndarray, " targets"]
PerTarget: TypeAlias = Float[np.ndarray, " targets"]
Rows: TypeAlias = Integer[np.ndarray, " _"]
Weights: TypeAlias = Num[np.ndarray, "*replicates targets"]
Values: TypeAlias = np.float64 | Float[np.ndarray, "*replicates"]
Draws: TypeAlias = Sequence[np.float64 | Float[np.ndarray, " _"]]
MetricsJson: TypeAlias = dict[str, dict[str, float | None] | int]


@dataclass(frozen=True, eq=False)
class Predictions:
    """What a model said about each target, in any order; one row per target.

    Attributes:
        user: dense index of the user, int64[targets], at least 0.
        label: 1 click, 0 no click, int8[targets].
        probability: predicted probability of a click, float64[targets], finite, in [0, 1].

    Raises:
        InputError: the lengths differ, or a value is outside its range.
    """

    user: np.ndarray  # plain types: shapes and values are checked below, with an error for users
    label: np.ndarray
    probability: np.ndarray

    def __post_init__(self) -> None:
        user, label, probability = (np.asarray(a) for a in (self.user, self.label, self.probability))
        _check_columns(user, label, probability)
        # Frozen for everyone else; here the columns get the dtypes that are promised above.
        object.__setattr__(self, "user", user.astype(np.int64))
        object.__setattr__(self, "label", label.astype(np.int8))
        object.__setattr__(self, "probability", probability.astype(np.float64))

    def __len__(self) -> int:
        return len(self.label)


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % bootstrap interval; nan where undefined, low and high also without bootstrap."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Metrics:
    """The metrics of one set of targets.

    Attributes:
        auc: area under the ROC curve, 0 to 1.
        log_loss: mean cross-entropy, nats per target.
        f1: F1 of the class "click" at probability >= 0.5, 0 to 1.
        gauc: AUC within each user, averaged with the user's number of targets as weight, 0 to 1.
        ne: normalised entropy, log loss / entropy of the base rate; below 1 beats a constant.
        calibration: sum of probabilities / number of clicks; above 1 promises too many clicks.
        ece: expected calibration error over 15 bins of equal width, 0 to 1. Each resample adds noise to
            every bin, so its interval leans upwards and may even lie above the value.
        targets: number of targets.
        users: number of users with at least one target.
        gauc_users_left_out: users whose targets hold one class only; they are not in `gauc`.
    """

    auc: Estimate
    log_loss: Estimate
    f1: Estimate
    gauc: Estimate
    ne: Estimate
    calibration: Estimate
    ece: Estimate
    targets: int
    users: int
    gauc_users_left_out: int

    def to_json(self) -> MetricsJson:
        """Return plain values; nan, which JSON does not know, becomes None."""
        plain: MetricsJson = asdict(self)
        for name in plain.keys() - set(COUNTS):
            plain[name] = {k: None if math.isnan(v) else v for k, v in asdict(getattr(self, name)).items()}
        return plain

    @classmethod
    def from_json(cls, document: Mapping[str, object]) -> Metrics:
        """Return the metrics that `to_json` wrote.

        Raises:
            InputError: a field is missing, unknown or of another kind.
        """
        names = [field.name for field in fields(cls)]
        if set(document) != set(names):
            raise InputError(Fault("metrics", f"fields {sorted(document)}", f"fields {sorted(names)}"))
        return cls(*(_read_field(name, document[name]) for name in names))  # pyright: ignore[reportArgumentType]


def evaluate(predictions: Predictions, bootstrap: int, seed: int) -> Metrics:
    """Return all metrics with 95 % percentile intervals from a bootstrap over users.

    A replicate draws as many users as there are, with replacement, and takes each with all its targets.
    A replicate on which a metric is undefined is left out of that metric's interval.

    Args:
        predictions: at least one target.
        bootstrap: number of replicates, 0 for no intervals.
        seed: the same seed and users give the same draws, here and in `paired_difference`.

    Raises:
        InputError: there is no target, or `bootstrap` is negative.
    """
    _check_request(predictions, bootstrap)
    ranking = _rank(predictions.label, predictions.probability)
    of_user = user_auc(predictions.user, predictions.label, predictions.probability)
    value = _score(predictions, ranking, of_user, np.ones(len(predictions)))
    draws = [
        _score(predictions, ranking, of_user, weight) for weight in _resample_users(predictions.user, bootstrap, seed)
    ]
    estimate = {name: _estimate(value[name], [draw[name] for draw in draws]) for name in value}
    users = len(np.unique(predictions.user))
    users_in_gauc = len(np.unique(predictions.user[~np.isnan(of_user)]))
    return Metrics(**estimate, targets=len(predictions), users=users, gauc_users_left_out=users - users_in_gauc)


def paired_difference(a: Predictions, b: Predictions, bootstrap: int, seed: int) -> Estimate:
    """Return AUC(a) - AUC(b) with its interval; both models meet the same drawn users in each replicate.

    Args:
        a: predictions of one model.
        b: predictions of another for the same targets in the same order.
        bootstrap: number of replicates, 0 for no interval.
        seed: seed of the draws.

    Raises:
        InputError: the two do not hold the same users and labels row by row, there is no target, or
            `bootstrap` is negative.
    """
    _check_request(a, bootstrap)
    if not (np.array_equal(a.user, b.user) and np.array_equal(a.label, b.label)):
        raise InputError(Fault("predictions", "two different sets of targets", "the same, in the same order"))
    ranking_a, ranking_b = _rank(a.label, a.probability), _rank(b.label, b.probability)
    ones = np.ones(len(a))
    draws = [
        _ranked_auc(ranking_a, weight) - _ranked_auc(ranking_b, weight)
        for weight in _resample_users(a.user, bootstrap, seed)
    ]
    return _estimate(_ranked_auc(ranking_a, ones) - _ranked_auc(ranking_b, ones), draws)


def auc(label: Labels, probability: Probabilities, weight: Weights | None = None) -> Values:
    """Return the area under the ROC curve, exact under ties; nan if either class has no weight.

    AUC = sum over pairs (click i, no-click j) of w_i w_j [p_i > p_j] + w_i w_j [p_i = p_j] / 2, divided by
    sum w_i * sum w_j (the Mann-Whitney statistic; Hanley and McNeil, Radiology 143, 1982).
    """
    return _ranked_auc(_rank(label, probability), _weights(label, weight))


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
    return _mean_of_defined(user_auc(user, label, probability), _weights(label, weight))


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


@dataclass(frozen=True, eq=False)
class _Ranking:
    """The order of the targets by probability, made once and used by every replicate.

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


def _rank(label: Labels, probability: Probabilities) -> _Ranking:
    order = np.argsort(probability, kind="stable")
    clicks, no_clicks = order[label[order] == 1], order[label[order] == 0]
    lower = probability[no_clicks]
    below = np.searchsorted(lower, probability[clicks], side="left")
    up_to = np.searchsorted(lower, probability[clicks], side="right")
    return _Ranking(clicks, no_clicks, below, up_to)


def _ranked_auc(ranking: _Ranking, weight: Weights) -> Values:
    clicks = weight[..., ranking.clicks]
    no_clicks = np.zeros((*weight.shape[:-1], len(ranking.no_clicks) + 1))
    np.cumsum(weight[..., ranking.no_clicks], axis=-1, out=no_clicks[..., 1:])
    beaten = no_clicks[..., ranking.below] + no_clicks[..., ranking.up_to]
    in_order = np.einsum("...i,...i->...", clicks, beaten) / 2
    return _ratio(in_order, clicks.sum(-1) * no_clicks[..., -1])


def _score(of: Predictions, ranking: _Ranking, of_user: PerTarget, weight: Weights) -> dict[str, Values]:
    label, probability = of.label, of.probability
    return {
        "auc": _ranked_auc(ranking, weight),
        "log_loss": log_loss(label, probability, weight),
        "f1": f1(label, probability, weight),
        "gauc": _mean_of_defined(of_user, weight),
        "ne": normalised_entropy(label, probability, weight),
        "calibration": calibration(label, probability, weight),
        "ece": calibration_error(label, probability, weight),
    }


def _resample_users(user: Users, bootstrap: int, seed: int) -> Iterator[Weights]:
    """Yield the weights of `bootstrap` replicates in chunks; the draws do not depend on the chunk size."""
    generator = np.random.default_rng(seed)
    distinct, user_row = np.unique(user, return_inverse=True)
    chunk = max(1, CHUNK_WEIGHTS // len(user))
    for start in range(0, bootstrap, chunk):
        drawn = [
            np.bincount(generator.integers(len(distinct), size=len(distinct)), minlength=len(distinct))
            for _ in range(min(chunk, bootstrap - start))
        ]
        yield np.stack(drawn).astype(np.float64)[:, user_row]


def _estimate(value: Values, draws: Draws) -> Estimate:
    replicates = np.concatenate([[math.nan], *draws])
    defined = replicates[~np.isnan(replicates)]
    low, high = np.percentile(defined, INTERVAL_PERCENTILES) if len(defined) else (math.nan, math.nan)
    return Estimate(float(value), float(low), float(high))


def _mean_of_defined(values: PerTarget, weight: Weights) -> Values:
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


def _check_columns(user: np.ndarray, label: np.ndarray, probability: np.ndarray) -> None:
    shapes = {user.shape, label.shape, probability.shape}
    if len(shapes) > 1 or user.ndim != 1:
        raise InputError(Fault("predictions", f"shapes {sorted(shapes)}", "three columns of equal length"))
    valid = {
        "user": (np.issubdtype(user.dtype, np.integer) & (user >= 0), "whole numbers from 0"),
        "label": (np.isin(label, (0, 1)), "0 or 1"),
        "probability": ((probability >= 0) & (probability <= 1), "finite numbers in [0, 1]"),
    }
    faults = [
        Fault(f"predictions.{name}, row {int(np.argmin(rows))}", f"{np.sum(~rows)} bad rows", expected)
        for name, (rows, expected) in valid.items()
        if not rows.all()
    ]
    if faults:
        raise InputError(*faults)


def _check_request(predictions: Predictions, bootstrap: int) -> None:
    if len(predictions) == 0:
        raise InputError(Fault("predictions", "no targets", "at least one", "look at the split scored"))
    if bootstrap < 0:
        raise InputError(Fault("bootstrap", str(bootstrap), "0 or more replicates"))


def _read_field(name: str, plain: object) -> Estimate | int:
    bounds = [field.name for field in fields(Estimate)]
    if name in COUNTS and isinstance(plain, int):
        return plain
    if name not in COUNTS and isinstance(plain, dict) and plain.keys() == set(bounds):
        numbers = [math.nan if plain[bound] is None else plain[bound] for bound in bounds]
        if all(isinstance(number, float | int) for number in numbers):
            return Estimate(*map(float, numbers))
    expected = "a whole number" if name in COUNTS else f"numbers or null under {bounds}"
    raise InputError(Fault(f"metrics.{name}", repr(plain), expected))
