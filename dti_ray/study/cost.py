"""What training the rows of a study costs, and how many times less than the reference row.

Stage: study, after its runs. In: `StudyResults`, whole or in part. Out: one `Cost` per row.
Invariant: a ratio compares sums over the seeds that both rows have; without such a seed there is none.

Ratios are of whole trainings: a row with more epochs pays for them.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from dti_ray.study.compare import MILLION, reference_row
from dti_ray.study.results import StudyResults, TrainedRun


@dataclass(frozen=True)
class Cost:
    """What it costs to train a row; means over its seeds.

    Attributes:
        seeds: number that have ended.
        seconds: of one training, at the pace of its median line of metrics, a sliding tail at its own.
        elapsed_seconds: of one training, as a clock has it.
        targets: trained in it, over all epochs.
        best_targets: trained until the state that answers.
        seconds_per_million: per million targets.
        tokens_per_million: per million targets.
        flops_per_target: forward and backward.
        speedup_packed: seconds of the reference row / those of this row.
        speedup_elapsed: the same by the clock.
        speedup_padded: `speedup_packed` against a padded sliding window; None where that was not measured.
        token_ratio: tokens of the reference row / those of this row.
        flop_ratio: FLOPs of the reference row / those of this row.
    """

    row: str
    k: int | str
    seeds: int
    seconds: float
    elapsed_seconds: float
    targets: float
    best_targets: float
    seconds_per_million: float
    tokens_per_million: float
    flops_per_target: float
    speedup_packed: float | None
    speedup_elapsed: float | None
    speedup_padded: float | None
    token_ratio: float | None
    flop_ratio: float | None


def costs(results: StudyResults) -> dict[str, Cost]:
    """Return what each row with a finished run costs, in the order of `study.rows`."""
    of_row = {name: [run for run in results.runs if run.row == name] for name in results.study.rows}
    reference = of_row.get(reference_row(results.study) or "", [])
    return {name: _cost(runs, reference, results.padded_over_packed) for name, runs in of_row.items() if runs}


def _cost(runs: Sequence[TrainedRun], reference: Sequence[TrainedRun], padded_over_packed: float | None) -> Cost:
    targets = sum(run.targets for run in runs)
    seeds = {run.seed for run in runs} & {run.seed for run in reference}
    ours, theirs = ([run for run in side if run.seed in seeds] for side in (runs, reference))
    speedup = _ratio([run.seconds for run in theirs], [run.seconds for run in ours])
    return Cost(
        runs[0].row,
        runs[0].k,
        len(runs),
        statistics.fmean(run.seconds for run in runs),
        statistics.fmean(run.elapsed_seconds for run in runs),
        targets / len(runs),
        statistics.fmean(run.best_targets for run in runs),
        MILLION * sum(run.seconds for run in runs) / targets,
        MILLION * sum(run.tokens for run in runs) / targets,
        sum(run.flops for run in runs) / targets,
        speedup,
        _ratio([run.elapsed_seconds for run in theirs], [run.elapsed_seconds for run in ours]),
        None if speedup is None or padded_over_packed is None else speedup * padded_over_packed,
        _ratio([run.tokens for run in theirs], [run.tokens for run in ours]),
        _ratio([run.flops for run in theirs], [run.flops for run in ours]),
    )


def _ratio(of: Sequence[float], to: Sequence[float]) -> float | None:
    return sum(of) / sum(to) if to and sum(to) > 0 else None
