"""How good predicted click probabilities are, with 95 % intervals by a bootstrap over users.

formulas.py    each metric, of labels, probabilities and one weight per target
bootstrap.py   rows of weights that stand for drawn users, and intervals of what they give
evaluation.py  all metrics of one model with intervals, and the differences of two models
"""

from dti_ray.metrics.bootstrap import Estimate, draw_counts, user_weights
from dti_ray.metrics.evaluation import COUNTS, Metrics, Predictions, evaluate, paired_difference
from dti_ray.metrics.formulas import (
    Ranking,
    auc,
    calibration,
    calibration_error,
    f1,
    gauc,
    log_loss,
    normalised_entropy,
    user_auc,
)

__all__ = [
    "COUNTS",
    "Estimate",
    "Metrics",
    "Predictions",
    "Ranking",
    "auc",
    "calibration",
    "calibration_error",
    "draw_counts",
    "evaluate",
    "f1",
    "gauc",
    "log_loss",
    "normalised_entropy",
    "paired_difference",
    "user_auc",
    "user_weights",
]
