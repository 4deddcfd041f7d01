"""What a study has found so far: its runs, what their models said, and what the classics said.

Stage: study; the type between training and the report. In: nothing. Out: `StudyResults`.
Invariant: all answers of a split hold the same targets in the same order, so that any two can be paired.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dti_ray.config.study import StudyConfig
from dti_ray.metrics import Predictions


@dataclass(frozen=True, eq=False)
class Answer:
    """What one trained model said of one split under one protocol.

    Attributes:
        split: valid or test.
        protocol: sliding or streaming.
        n: context at inference (interactions).
        predictions: one per target.
        seconds: spent on it.
        tokens: that the model read.
    """

    split: str
    protocol: str
    n: int
    predictions: Predictions
    seconds: float
    tokens: int


@dataclass(frozen=True, eq=False)
class TrainedRun:
    """One row trained with one seed.

    Attributes:
        row: its name.
        seed: `train.seed`.
        k: targets of a prompt, or "all".
        n: context in training (interactions).
        seconds: of training steps at the pace of the median line of metrics (a sliding tail at its own), packing
            included; validations and checkpoints are left out.
        elapsed_seconds: the same, as a clock has it.
        targets: trained, over all epochs.
        tokens: trained, over all epochs.
        flops: of training, forward and backward.
        best_targets: trained until the state that answers, the best one on validation.
        valid_auc: of that state while training, under sliding inference.
        answers: of that state.
    """

    row: str
    seed: int
    k: int | str
    n: int
    seconds: float
    elapsed_seconds: float
    targets: int
    tokens: int
    flops: float
    best_targets: int
    valid_auc: float
    answers: tuple[Answer, ...]


@dataclass(frozen=True, eq=False)
class Classic:
    """A baseline without a language model.

    Attributes:
        name: for people.
        answers: split -> predictions, of the same targets in the same order as the models' answers.
        seconds: of fitting, choices on validation included.
        chosen: what was chosen on validation, for people.
    """

    name: str
    answers: Mapping[str, Predictions]
    seconds: float
    chosen: str


@dataclass(frozen=True, eq=False)
class StudyResults:
    """A study, whole or in part.

    Attributes:
        study: what was asked.
        facts: data set, split, model, hardware, versions, commit, dates, hours: what a reader needs; in this order.
        command: that runs the study; with `--row NAME --seed S` it runs one row of it again.
        runs: that have ended, in the order of `study.rows`, then by seed.
        classics: baselines, the weakest idea first.
        padded_over_packed: seconds of the padded over those of the packed sliding window, measured in turns in one
            process; None where that was not measured.
        is_against_window: whether the reference's prompts have one target each.
    """

    study: StudyConfig
    facts: Mapping[str, str]
    command: str
    runs: tuple[TrainedRun, ...]
    classics: tuple[Classic, ...]
    padded_over_packed: float | None
    is_against_window: bool
