"""What counting alone can do: three baselines that a model must beat to be worth its electricity.

Stage: beside the model's inference, on the same targets. In: users' time-ordered sequences with splits.
Out: `Predictions` of each baseline for one split. Invariant: a target's prediction reads train labels (for
the means of items and users) and the user's own earlier feedback, never its own label or a later one of a
scored split; shrinkage is chosen on targets before the scored split, never on it.

Each mean is shrunk towards the train rows' click rate g = (clicks + 1) / (rows + 2), and means are joined
as logits:

    mean = (clicks + a g) / (count + a)
    logit P(click) = logit g + sum over the baseline's means of (logit mean - logit g)

Example: g = 1/2; the item has 3 clicks of 4, the user 0 clicks in the last 2 feedbacks, a = 2 for both:
means 4/6 and 1/4, odds 2 and 1/3, so P(click) = 2/3 / (1 + 2/3) = 0.4.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from itertools import product
from typing import Protocol, TypeAlias, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int8, Int32, Int64, Integer

from dti_ray.errors import Fault, InputError
from dti_ray.metrics import Predictions, log_loss

BASELINES = {
    "item mean": ("item",),
    "item + user mean": ("item", "user"),
    "item mean + last 10 feedbacks": ("item", "recent"),
}
"""Name of a baseline, and the means that it adds up."""
RECENT_INTERACTIONS = 10
SHRINKAGES = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0)
"""The grid, in pseudo-interactions at the global click rate."""
UNTUNED_SHRINKAGE = 5.0
TUNING_SHARE = 8
"""Where no validation targets lie before the split, the latest 1/8 of each user's train rows stand in."""
# The codes of `data.interactions.SPLITS`, a layer above this one.
TRAIN, VALID, TEST = range(3)

Mask: TypeAlias = Bool[np.ndarray, " interactions"]
Users: TypeAlias = Integer[np.ndarray, " interactions"]
Counts: TypeAlias = Float[np.ndarray, " targets"]

logger = logging.getLogger(__name__)


@runtime_checkable  # beartype holds it in tests
class Sequences(Protocol):
    """What is read of `dti_ray.data.interactions.UserSequences`: user u is at offsets[u]:offsets[u + 1]."""

    @property
    def offsets(self) -> Int64[np.ndarray, " users+1"]:
        """Start of each user, and the end of the last."""
        ...

    @property
    def items(self) -> Int32[np.ndarray, " interactions"]:
        """Dense item index."""
        ...

    @property
    def labels(self) -> Int8[np.ndarray, " interactions"]:
        """1 click, 0 no click."""
        ...

    @property
    def splits(self) -> Int8[np.ndarray, " interactions"]:
        """0 train, 1 validation, 2 test."""
        ...


def predict_baselines(sequences: Sequences, split: int) -> dict[str, Predictions]:
    """Return each baseline's predictions for all targets of a split, in the order of the sequences.

    Shrinkages minimise the log loss over a small grid: for the test split on the validation targets, for
    the validation split on the latest eighth of each user's train rows, whose labels are then left out of
    the means. The means themselves are of all train rows either way.

    Args:
        sequences: users' time-ordered interactions; `Predictions.user` is the index of the user here.
        split: 1 validation or 2 test.

    Raises:
        InputError: the split is train (its labels are in the means) or has no targets.
    """
    target = sequences.splits == split
    if split not in (VALID, TEST) or not target.any():
        problem = f"code {split}, {int(target.sum())} targets"
        raise InputError(Fault("baselines: split", problem, "validation (1) or test (2), with targets"))
    user = np.repeat(np.arange(len(sequences.offsets) - 1), np.diff(sequences.offsets))
    train = sequences.splits == TRAIN
    tuning = _tuning_targets(sequences, user, split)
    tuning_evidence = _gather(sequences, user, counted=train & ~tuning, target=tuning)
    evidence = _gather(sequences, user, counted=train, target=target)
    predictions = {}
    for name, means in BASELINES.items():
        shrinkage = _choose_shrinkage(tuning_evidence, means)
        logger.info("baseline %s: shrinkage %s", name, shrinkage)
        predictions[name] = Predictions(user[target], evidence.label, evidence.probability(shrinkage))
    return predictions


@dataclass(frozen=True, eq=False)
class _Evidence:
    """What is known of some targets before they happen.

    Attributes:
        label: the targets' own labels; only for choosing shrinkages and for scoring.
        click_rate: g, with one pseudo-click and one pseudo-no-click, so that its logit is finite.
        counted: (clicks, count) per target behind the means "item", "user" and "recent".
    """

    label: Int8[np.ndarray, " targets"]
    click_rate: float
    counted: dict[str, tuple[Counts, Counts]]

    def probability(self, shrinkage: dict[str, float]) -> Counts:
        """Return P(click) from the means named in `shrinkage`."""
        prior = np.log(self.click_rate / (1 - self.click_rate))
        logit = np.full(len(self.label), prior)
        for mean, strength in shrinkage.items():
            clicks, count = self.counted[mean]
            pseudo_clicks, pseudo_others = strength * self.click_rate, strength * (1 - self.click_rate)
            logit += np.log((clicks + pseudo_clicks) / (count - clicks + pseudo_others)) - prior
        return 1 / (1 + np.exp(-logit))


def _tuning_targets(sequences: Sequences, user: Users, split: int) -> Mask:
    validation = sequences.splits == VALID
    if split == TEST and validation.any():
        return validation
    train = sequences.splits == TRAIN
    through = _running(train)
    start, end = sequences.offsets[:-1][user], sequences.offsets[1:][user]
    rows = through[end] - through[start]
    return train & (through[1:] - through[start] > rows - rows // TUNING_SHARE)


def _gather(sequences: Sequences, user: Users, counted: Mask, target: Mask) -> _Evidence:
    """Count clicks and feedbacks for the targets; `counted` are the rows behind item and user means."""
    labels, items = sequences.labels, sequences.items
    clicked = counted & (labels == 1)
    by = {"item": items, "user": user}
    totals = {
        mean: (
            np.bincount(key, clicked)[key[target]],
            np.bincount(key, counted)[key[target]],
        )
        for mean, key in by.items()
    }
    row = np.flatnonzero(target)
    first = np.maximum(sequences.offsets[:-1][user[row]], row - RECENT_INTERACTIONS)
    clicks_before = _running(labels)
    recent = (clicks_before[row] - clicks_before[first]).astype(np.float64)
    click_rate = (int(clicked.sum()) + 1) / (int(counted.sum()) + 2)
    return _Evidence(labels[row], click_rate, totals | {"recent": (recent, (row - first).astype(np.float64))})


def _choose_shrinkage(evidence: _Evidence, means: tuple[str, ...]) -> dict[str, float]:
    if len(evidence.label) == 0:
        logger.warning("no targets to choose shrinkages on; every mean takes %g", UNTUNED_SHRINKAGE)
        return dict.fromkeys(means, UNTUNED_SHRINKAGE)
    grid = [dict(zip(means, point, strict=True)) for point in product(SHRINKAGES, repeat=len(means))]
    return min(grid, key=lambda point: float(log_loss(evidence.label, evidence.probability(point))))


def _running(values: Integer[np.ndarray, " interactions"] | Mask) -> Int64[np.ndarray, " interactions+1"]:
    """Return the sum before each row, and the total last."""
    return np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
