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
from collections.abc import Callable, Iterable, Iterator
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

Labels: TypeAlias = Int8[np.ndarray, " targets"]
Mask: TypeAlias = Bool[np.ndarray, " interactions"]
Users: TypeAlias = Integer[np.ndarray, " interactions"]
Counts: TypeAlias = Int32[np.ndarray, " targets"] | Float[np.ndarray, " targets"]

_Known: TypeAlias = tuple[Labels, dict[str, tuple[Counts, Counts]]]

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
    items = int(sequences.items.max(initial=-1)) + 1
    return stream_baselines(lambda: (sequences,), items, split, bool((sequences.splits == VALID).any()))


def stream_baselines(
    read: Callable[[], Iterable[Sequences]], items: int, split: int, has_validation: bool, min_context: int = 0
) -> dict[str, Predictions]:
    """Return what `predict_baselines` does for interactions that are read in parts, twice; one part is held at a time.

    Args:
        read: yields whole users, each time in the same order.
        items: of the catalogue.
        split: 1 validation or 2 test.
        has_validation: whether there are validation targets, in any part.
        min_context: targets with fewer interactions before them are left out.

    Raises:
        InputError: the split is train (its labels are in the means) or has no targets.
    """
    tail = split == VALID or not has_validation
    tuning_totals = totals = _Totals.none(items)
    for part in _parts(read(), split, tail, min_context):
        tuning_totals += part.totals(part.train & ~part.tuning, items)
        totals += part.totals(part.train, items)
    tuning_evidence, evidence, users = [], [], [np.zeros(0, dtype=np.int64)]
    for part in _parts(read(), split, tail, min_context):
        tuning_evidence.append(part.gather(part.train & ~part.tuning, part.tuning, tuning_totals))
        evidence.append(part.gather(part.train, part.target, totals))
        users.append(part.first_user + part.user[part.target])
    user = np.concatenate(users)
    if split not in (VALID, TEST) or not len(user):
        problem = f"code {split}, {len(user)} targets"
        raise InputError(Fault("baselines: split", problem, "validation (1) or test (2), with targets"))
    tuning, scored = _Evidence.of(tuning_evidence, tuning_totals), _Evidence.of(evidence, totals)
    predictions = {}
    for name, means in BASELINES.items():
        shrinkage = _choose_shrinkage(tuning, means)
        logger.info("baseline %s: shrinkage %s", name, shrinkage)
        predictions[name] = Predictions(user, scored.label, scored.probability(shrinkage))
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

    @classmethod
    def of(cls, parts: list[_Known], totals: _Totals) -> _Evidence:
        """Lay what is known of the targets of several parts one after the other."""
        labels, counted = zip(*parts, strict=True)
        joined = {}
        for mean in counted[0]:
            clicks, count = zip(*(known[mean] for known in counted), strict=True)
            joined[mean] = np.concatenate(clicks), np.concatenate(count)
        return cls(np.concatenate(labels), totals.click_rate, joined)


@dataclass(frozen=True, eq=False)
class _Totals:
    """What some rows of training say of each item.

    Attributes:
        clicks: of each item.
        count: rows of each item.
    """

    clicks: Float[np.ndarray, " items"]
    count: Int64[np.ndarray, " items"]

    @classmethod
    def none(cls, items: int) -> _Totals:
        return cls(np.zeros(items), np.zeros(items, dtype=np.int64))

    def __add__(self, other: _Totals) -> _Totals:
        return _Totals(self.clicks + other.clicks, self.count + other.count)

    @property
    def click_rate(self) -> float:
        return (int(self.clicks.sum()) + 1) / (int(self.count.sum()) + 2)


@dataclass(frozen=True, eq=False)
class _Part:
    """Some users, and the role of each of their interactions.

    Attributes:
        first_user: number of the first one among all users.
        user: of each interaction, from 0 in this part.
        tuning: shrinkages are chosen on these.
        target: predicted.
    """

    sequences: Sequences
    first_user: int
    user: Users
    train: Mask
    tuning: Mask
    target: Mask

    def totals(self, counted: Mask, items: int) -> _Totals:
        """Count the clicks and the rows of each item among some interactions."""
        of_item, clicked = self.sequences.items, counted & (self.sequences.labels == 1)
        count = np.bincount(of_item[counted], minlength=items)
        return _Totals(np.bincount(of_item, clicked, minlength=items), count)

    def gather(self, counted: Mask, target: Mask, totals: _Totals) -> _Known:
        """Return the labels of some targets, and clicks and feedbacks behind each mean; users' are of `counted`."""
        sequences, user, row = self.sequences, self.user, np.flatnonzero(target)
        item, own, clicked = sequences.items[row], user[row], counted & (sequences.labels == 1)
        first = np.maximum(sequences.offsets[own], row - RECENT_INTERACTIONS)
        clicks_before = _running(sequences.labels)
        known = {
            "item": (totals.clicks[item], totals.count[item]),
            "user": (np.bincount(user, clicked)[own], np.bincount(user, counted)[own]),
            "recent": (clicks_before[row] - clicks_before[first], row - first),
        }
        return sequences.labels[row], {
            mean: (clicks.astype(np.int32), count.astype(np.int32)) for mean, (clicks, count) in known.items()
        }


def _parts(parts: Iterable[Sequences], split: int, tail: bool, min_context: int) -> Iterator[_Part]:
    """Say what each interaction is for; with `tail` shrinkages are chosen on the end of training."""
    first_user = 0
    for sequences in parts:
        users = len(sequences.offsets) - 1
        user = np.repeat(np.arange(users), np.diff(sequences.offsets))
        has_context = np.arange(len(user)) - sequences.offsets[user] >= min_context
        train, target = sequences.splits == TRAIN, (sequences.splits == split) & has_context
        tuning = _tail_of_training(sequences, user) if tail else sequences.splits == VALID
        yield _Part(sequences, first_user, user, train, tuning, target)
        first_user += users


def _tail_of_training(sequences: Sequences, user: Users) -> Mask:
    train = sequences.splits == TRAIN
    through = _running(train)
    start, end = sequences.offsets[:-1][user], sequences.offsets[1:][user]
    rows = through[end] - through[start]
    return train & (through[1:] - through[start] > rows - rows // TUNING_SHARE)


def _choose_shrinkage(evidence: _Evidence, means: tuple[str, ...]) -> dict[str, float]:
    if len(evidence.label) == 0:
        logger.warning("no targets to choose shrinkages on; every mean takes %g", UNTUNED_SHRINKAGE)
        return dict.fromkeys(means, UNTUNED_SHRINKAGE)
    grid = [dict(zip(means, point, strict=True)) for point in product(SHRINKAGES, repeat=len(means))]
    return min(grid, key=lambda point: float(log_loss(evidence.label, evidence.probability(point))))


def _running(values: Integer[np.ndarray, " interactions"] | Mask) -> Int64[np.ndarray, " interactions+1"]:
    """Return the sum before each row, and the total last."""
    return np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
