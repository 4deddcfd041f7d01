"""How good one model's predictions are, and how much better than another's.

Stage: after any inference. In: `Predictions`, one row per target scored. Out: `Metrics`, or paired differences.
Invariant: a bootstrap replicate is nothing but another row of weights, so value, interval and paired difference come
from the same formulas.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TypeAlias

import numpy as np

from dti_ray.errors import Fault, InputError
from dti_ray.metrics.bootstrap import Estimate, user_weights
from dti_ray.metrics.formulas import (
    PerTarget,
    Ranking,
    Values,
    Weights,
    calibration,
    calibration_error,
    f1,
    log_loss,
    mean_of_defined,
    normalised_entropy,
    user_auc,
)

COUNTS = ("targets", "users", "gauc_users_left_out")

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
    ranking = Ranking.of(predictions.label, predictions.probability)
    of_user = user_auc(predictions.user, predictions.label, predictions.probability)
    value = _score(predictions, ranking, of_user, np.ones(len(predictions)))
    draws = [
        _score(predictions, ranking, of_user, weight) for weight in user_weights(predictions.user, bootstrap, seed)
    ]
    estimate = {name: Estimate.of(value[name], [draw[name] for draw in draws]) for name in value}
    users = len(np.unique(predictions.user))
    users_in_gauc = len(np.unique(predictions.user[~np.isnan(of_user)]))
    return Metrics(**estimate, targets=len(predictions), users=users, gauc_users_left_out=users - users_in_gauc)


def paired_difference(a: Predictions, b: Predictions, bootstrap: int, seed: int) -> dict[str, Estimate]:
    """Return a's `auc` and `log_loss` less b's with intervals; both models meet the same drawn users in each replicate.

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
    ranked = [(Ranking.of(one.label, one.probability), one) for one in (a, b)]

    def difference(weight: Weights) -> dict[str, Values]:
        aucs = [ranking.auc(weight) for ranking, _ in ranked]
        losses = [log_loss(one.label, one.probability, weight) for _, one in ranked]
        return {"auc": aucs[0] - aucs[1], "log_loss": losses[0] - losses[1]}

    value = difference(np.ones(len(a)))
    draws = [difference(weight) for weight in user_weights(a.user, bootstrap, seed)]
    return {name: Estimate.of(value[name], [draw[name] for draw in draws]) for name in value}


def _score(of: Predictions, ranking: Ranking, of_user: PerTarget, weight: Weights) -> dict[str, Values]:
    label, probability = of.label, of.probability
    return {
        "auc": ranking.auc(weight),
        "log_loss": log_loss(label, probability, weight),
        "f1": f1(label, probability, weight),
        "gauc": mean_of_defined(of_user, weight),
        "ne": normalised_entropy(label, probability, weight),
        "calibration": calibration(label, probability, weight),
        "ece": calibration_error(label, probability, weight),
    }


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
