"""Log-odds made honest: a temperature and a bias, fitted on validation.

Stage: after training. In: log-odds and labels of validation targets. Out: a `Calibration`.
Invariant: log loss on these targets never rises; a temperature is positive, so no ranking changes.

    temperature 1.25 (too sure), bias -0.7 (half as many clicks)      log-odds 2.0 -> 2.0 / 1.25 - 0.7 = 0.9
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit

from dti_ray.errors import Fault, InputError

LARGEST = 10.0  # temperature, or its inverse: a validation split in perfect order would ask for infinite certainty


@dataclass(frozen=True)
class Calibration:
    """What is done to log-odds: x / temperature + bias. Without arguments: nothing.

    Attributes:
        temperature: positive; above 1 where the model is too sure.
        bias: added behind it (log-odds).
    """

    temperature: float = 1.0
    bias: float = 0.0

    def __call__(self, log_odds: np.ndarray) -> np.ndarray:
        """Return calibrated log-odds."""
        return log_odds / self.temperature + self.bias

    def probabilities(self, log_odds: np.ndarray) -> np.ndarray:
        """Return calibrated probabilities."""
        return expit(self(log_odds))


IDENTITY = Calibration()


def fit_calibration(log_odds: np.ndarray, label: np.ndarray) -> Calibration:
    """Return the calibration with the least log loss; none where the labels are of one class.

    Source: Platt, "Probabilistic Outputs for Support Vector Machines", 1999, here with the slope held positive. In
    slope (1 / temperature) and bias the loss is convex.

    Args:
        log_odds: float64 [N].
        label: [N], 0 or 1.

    Raises:
        InputError: a log-odds is not finite.
    """
    if not np.isfinite(log_odds).all():
        problem = f"{int((~np.isfinite(log_odds)).sum())} of {len(log_odds)} log-odds are not finite"
        raise InputError(Fault("calibration", problem, "a model that scores its validation split"))
    if len(np.unique(label)) < 2:
        return IDENTITY
    start = np.array([1.0, 0.0])
    bounds = [(1 / LARGEST, LARGEST), (None, None)]
    tight = {"ftol": 1e-14, "gtol": 1e-9}
    found = minimize(_loss, start, (log_odds, label), "L-BFGS-B", jac=True, bounds=bounds, options=tight)
    slope, bias = found.x if found.fun < _loss(start, log_odds, label)[0] else start
    return Calibration(float(1 / slope), float(bias))


def mean_log_loss(log_odds: np.ndarray, label: np.ndarray) -> float:
    """Return the mean negative log-likelihood (nats), exact for log-odds of any size."""
    return float(np.mean(np.logaddexp(0.0, log_odds) - label * log_odds))


def _loss(parameters: np.ndarray, log_odds: np.ndarray, label: np.ndarray) -> tuple[float, np.ndarray]:
    """Return the log loss and its gradient in (slope, bias)."""
    slope, bias = parameters
    calibrated = slope * log_odds + bias
    residual = expit(calibrated) - label
    return mean_log_loss(calibrated, label), np.array([np.mean(residual * log_odds), np.mean(residual)])
