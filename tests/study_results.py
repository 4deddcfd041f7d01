"""Studies made by hand, without a model: what runs and baselines said is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from dti_ray.config.study import StudyConfig
from dti_ray.metrics import Predictions
from dti_ray.study.results import Answer, Classic, StudyResults, TrainedRun

TARGETS = 200
USERS = 20
REFERENCE_SECONDS = 1000.0
FACTS = {"machine": "two cores", "commit": "abc123"}


def said(noise: float, seed: int = 0, targets: int = TARGETS) -> Predictions:
    """Return what a model says that knows a click but for noise; all of them of the same targets."""
    shared, own = np.random.default_rng(1), np.random.default_rng([seed, 2])
    user, label = shared.integers(0, USERS, targets), shared.integers(0, 2, targets)
    score = label + noise * own.normal(size=targets)
    return Predictions(user, label, 1 / (1 + np.exp(-score)))


def answer(of: Predictions, split: str = "valid", protocol: str = "sliding", n: int = 20) -> Answer:
    return Answer(split, protocol, n, of, seconds=2.0, tokens=400)


def run(
    row: str, seed: int, answers: Sequence[Answer], k: int | str = 1, seconds: float = REFERENCE_SECONDS, n: int = 20
) -> TrainedRun:
    """Return a run of 1,000 targets; tokens and FLOPs grow with its seconds."""
    return TrainedRun(
        row, seed, k, n, seconds, 2 * seconds, 1000, int(50 * seconds), 1e9 * seconds, best_targets=800,
        valid_auc=0.7, answers=tuple(answers),
    )  # fmt: skip


def results(
    rows: Mapping[str, Mapping[str, object]],
    runs: Sequence[TrainedRun],
    classics: Sequence[Classic] = (),
    padded_over_packed: float | None = None,
    **study: object,
) -> StudyResults:
    asked = StudyConfig.model_validate({"name": "made", "rows": rows, "seeds": (0, 1, 2), **study})
    reference = asked.reference or next(iter(rows), None)
    return StudyResults(
        asked,
        FACTS,
        "dti-ray bench quality -c a.yaml",
        tuple(runs),
        tuple(classics),
        padded_over_packed,
        is_against_window=reference is None or asked.rows[reference].change.get("packing.k", 1) == 1,
    )
