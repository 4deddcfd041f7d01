"""Baselines without a language model, on the very targets that models are measured on.

Stage: study, beside its runs. In: a data set. Out: one `Classic` per baseline, the weakest idea first.
Invariant: targets, their order and their users are those of an evaluation; what is chosen is chosen on validation by
log loss, and targets of the test split are predicted once, by what was chosen.

What a baseline may know of a target, beside the catalogue:

    item mean, item + user mean,                       labels of training
    logistic regression, factorisation machine
    item mean + last 10 feedbacks, and all others      the same, and the user's own feedback before the target, of
    with "history" or "counts"                         whatever split, as a model's context has it
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from dti_ray.data.interactions import SPLITS, VALID, Dataset, read_all, read_items
from dti_ray.data.plan import derive_seed
from dti_ray.data.stats import read_blocks
from dti_ray.errors import Fault, InputError
from dti_ray.infer.baselines import BASELINES, stream_baselines
from dti_ray.metrics import Predictions
from dti_ray.study import rivals
from dti_ray.study.known import Log, category_words, counts, history, one_hots
from dti_ray.study.results import Classic
from dti_ray.study.rivals import Fitted, Learning, check_installed

WITHOUT = "another `data.split` or `data.label`, or study.classical=false"

OnProgress = Callable[[int, int], None]


def fit_classics(
    dataset: Dataset, splits: Sequence[str], min_context: int, seed: int, on_progress: OnProgress
) -> tuple[Classic, ...]:
    """Fit every baseline on training, choose on validation, and predict.

    For each 100,000 interactions this takes about two minutes of one core and 100 MB of memory, and the samples of a
    factorisation machine 8 kB for each user and item.

    Args:
        dataset: with targets of training, of validation and of each split.
        splits: valid or test, or both.
        min_context: targets with fewer interactions before them are left out; in training they stay, as context does.
        seed: the same one gives the same predictions.
        on_progress: called with (models fitted, models in all).

    Raises:
        ConfigError: a package of the extra `study` is not installed.
        InputError: training has labels of one class only, or validation or a split has no targets.
    """
    check_installed()
    log = Log(read_all(dataset), category_words(read_items(dataset)))
    rows = {split: _targets(dataset, log, split, min_context) for split in dict.fromkeys(["valid", *splits])}
    train = np.flatnonzero(log.is_train)
    if len(np.unique(log.users.labels[train])) < 2:
        problem = "has labels of one class only in its train split"
        raise InputError(Fault(f"data set {dataset.name}", problem, "clicks and no-clicks", WITHOUT))
    learning = Learning(log.users.labels, train, rows["valid"], derive_seed(seed, "classics"))
    classics = _counted(dataset, splits, min_context)
    done, total = 0, sum(models for _, models in RIVALS.values())
    for name, (fit, _) in RIVALS.items():
        started, best = time.monotonic(), None
        for fitted in fit(log, learning):
            best = fitted if best is None or fitted.loss < best.loss else best
            on_progress(done := done + 1, total)
        assert best is not None, "every grid has a model"
        answers = {split: _predictions(log, rows[split], best) for split in splits}
        classics.append(Classic(name, answers, time.monotonic() - started, best.choice))
    return tuple(classics)


def _logistic(log: Log, learning: Learning) -> Iterator[Fitted]:
    return rivals.logistic_regression(one_hots(log), learning)


def _logistic_history(log: Log, learning: Learning) -> Iterator[Fitted]:
    return rivals.logistic_regression([*one_hots(log), sparse.csr_matrix(history(log))], learning)


def _trees(log: Log, learning: Learning) -> Iterator[Fitted]:
    return rivals.gradient_boosting(counts(log), learning)


def _factors(log: Log, learning: Learning) -> Iterator[Fitted]:
    return rivals.factorisation_machine(one_hots(log), learning)


def _factors_history(log: Log, learning: Learning) -> Iterator[Fitted]:
    return rivals.factorisation_machine([*one_hots(log), sparse.csr_matrix(history(log))], learning)


RIVALS: dict[str, tuple[Callable[[Log, Learning], Iterator[Fitted]], int]] = {
    "logistic regression": (_logistic, len(rivals.PENALTIES)),
    "logistic regression + history": (_logistic_history, len(rivals.PENALTIES)),
    "gradient boosting on counts": (_trees, len(rivals.LEAVES)),
    "factorisation machine": (_factors, len(rivals.RANKS)),
    "factorisation machine + history": (_factors_history, len(rivals.RANKS)),
}
"""Name of a baseline, and how it is fitted, with how many models to choose from."""


def _targets(dataset: Dataset, log: Log, split: str, min_context: int) -> NDArray[np.int64]:
    """Return the rows of a split's targets, in order."""
    rows = np.flatnonzero((log.users.splits == SPLITS.index(split)) & (log.position >= min_context))
    if not len(rows):
        problem = f"has no target in its {split} split" + (f" after {min_context} others" if min_context else "")
        raise InputError(Fault(f"data set {dataset.name}", problem, hint=WITHOUT))
    return rows


def _counted(dataset: Dataset, splits: Sequence[str], min_context: int) -> list[Classic]:
    """Return the baselines that every evaluation has; they are counted together, so each takes a part of the time."""
    started = time.monotonic()
    has_valid = dataset.targets[VALID] > 0
    found = {
        split: stream_baselines(
            lambda: read_blocks(dataset), dataset.items, SPLITS.index(split), has_valid, min_context
        )
        for split in splits
    }
    seconds, chosen = (time.monotonic() - started) / len(BASELINES), "shrinkage of each mean"
    return [
        Classic(name, {split: of_split[name] for split, of_split in found.items()}, seconds, chosen)
        for name in BASELINES
    ]


def _predictions(log: Log, rows: NDArray[np.int64], fitted: Fitted) -> Predictions:
    return Predictions(log.user[rows], log.users.labels[rows], np.clip(fitted.predict(rows), 0.0, 1.0))
