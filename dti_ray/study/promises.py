"""What a study chooses, what it was to show, and whether it does.

Stage: study, after its comparison. In: `Comparison` and `Cost`s. Out: `Choice`s and `Promise`s.
Invariant: choices are made on the validation split alone; a verdict is computed from numbers that stand beside it, and
says on which split it rests.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from dti_ray.config.study import StudyConfig
from dti_ray.study.compare import PROTOCOLS, Comparison, Gap, Quality, best_context
from dti_ray.study.cost import Cost
from dti_ray.study.results import StudyResults
from dti_ray.study.words import TIMES, gap_text, plural, times

LARGEST_LOSS = 0.002  # of AUC against the sliding window; more AUC is welcome
WANTED_SPEEDUP: Mapping[int | str, float] = {50: 10.0, "all": 13.0}
WANTED_OVER_CLASSICS = 0.01
Verdict = Literal["reached", "not reached", "not measured yet"]


@dataclass(frozen=True)
class Choice:
    """The best configuration under one protocol.

    Attributes:
        valid: the quality that it was chosen by.
        test: of the same question on the test split; None where the row was not evaluated there.
        rivals: number of configurations that it was chosen from.
    """

    valid: Quality
    test: Quality | None
    rivals: int


@dataclass(frozen=True)
class Promise:
    """Something that the study was to show.

    Attributes:
        what: in plain words.
        verdict: whether it does.
        numbers: what the verdict rests on, one line each.
    """

    what: str
    verdict: Verdict
    numbers: tuple[str, ...]


def choose(compared: Comparison, protocol: str) -> Choice | None:
    """Return the best configuration (row and context at inference) under a protocol, by its validation AUC.

    Only rows with the most seeds compete: one lucky seed is no quality.
    """
    told = [
        one
        for asked, one in compared.qualities.items()
        if (asked.split, asked.protocol) == ("valid", protocol) and not math.isnan(one.auc.value)
    ]
    most = max((len(one.seeds) for one in told), default=0)
    rivals = [one for one in told if len(one.seeds) == most]
    if not rivals:
        return None
    best = max(rivals, key=lambda one: one.auc.value)
    return Choice(best, compared.qualities.get(best.asked._replace(split="test")), len(rivals))


def missing_runs(results: StudyResults) -> dict[str, list[int]]:
    """Return the seeds that have not ended yet, for each row that lacks some."""
    ended = {(run.row, run.seed) for run in results.runs}
    lacking = {
        name: [seed for seed in planned_seeds(results.study, name) if (name, seed) not in ended]
        for name in results.study.rows
    }
    return {name: seeds for name, seeds in lacking.items() if seeds}


def planned_seeds(study: StudyConfig, row: str) -> tuple[int, ...]:
    """Return the seeds that a row is to be trained with."""
    return study.rows[row].seeds or study.seeds


def promises(results: StudyResults, compared: Comparison, costs: Mapping[str, Cost]) -> list[Promise]:
    """Return all promises with their verdicts; those on a sliding window only where it is the reference."""
    kept = [_same_quality(results, compared, costs, k, speedup) for k, speedup in WANTED_SPEEDUP.items()]
    return [*(kept if compared.is_against_window else ()), _better_than_classics(results, compared)]


def _same_quality(
    results: StudyResults, compared: Comparison, costs: Mapping[str, Cost], k: int | str, wanted: float
) -> Promise:
    """Judge every headline row with this k; one that keeps both halves of the promise is enough."""
    what = (
        f"k = {k}: AUC not more than {LARGEST_LOSS} below the packed sliding window under sliding inference, "
        f"in at least {wanted:g} {TIMES} less training time"
    )
    verdicts: list[tuple[bool, str]] = []
    for row in results.study.headline:
        one = compared.main(row, "test") or compared.main(row, "valid")
        cost = costs.get(row)
        if one is None or cost is None or one.k != k or one.gap is None or cost.speedup_packed is None:
            continue
        is_near = one.gap.auc.value >= -LARGEST_LOSS
        is_fast = cost.speedup_packed >= wanted
        near = "near enough, and so is the whole interval"
        if one.gap.auc.low < -LARGEST_LOSS:
            near = "near enough, though the interval reaches lower"
        words = (
            f"`{row}`: AUC {gap_text(one.gap)}, {near if is_near else 'too low'}; {times(cost.speedup_packed)} less "
            f"training time, {'enough' if is_fast else 'too little'}; {_basis(one, one.gap, results)}"
        )
        verdicts.append((is_near and is_fast, words))
    return Promise(what, _verdict([is_kept for is_kept, _ in verdicts]), tuple(words for _, words in verdicts))


def _better_than_classics(results: StudyResults, compared: Comparison) -> Promise:
    """Judge the default row under each protocol against every baseline; one protocol is enough."""
    default = results.study.default
    what = (
        f"The default beats every classical baseline by at least {WANTED_OVER_CLASSICS} AUC under at least one "
        "protocol, with an interval that excludes 0"
    )
    if default is None:
        return Promise(what, "not measured yet", ("`study.default` names no row",))
    verdicts: list[tuple[bool, str]] = []
    for protocol in PROTOCOLS:
        asked = best_context(compared, default, protocol)
        if asked is None:
            continue
        split = "test" if asked._replace(split="test") in compared.qualities else "valid"
        gaps: dict[str, Gap] = {
            one.name: gap
            for one in compared.classics
            if one.split == split and (gap := one.default.get((protocol, asked.n))) is not None
        }
        if not gaps:
            continue
        hardest = min(gaps, key=lambda name: gaps[name].auc.value)
        is_kept = all(gap.auc.value >= WANTED_OVER_CLASSICS and gap.auc.low > 0 for gap in gaps.values())
        words = (
            f"`{default}`, {protocol} inference, n = {asked.n}: {gap_text(gaps[hardest])} against the best of "
            f"{plural(len(gaps), 'baseline')}, {hardest}; "
            f"{_basis(compared.qualities[asked._replace(split=split)], gaps[hardest], results)}"
        )
        verdicts.append((is_kept, words))
    return Promise(what, _verdict([is_kept for is_kept, _ in verdicts]), tuple(words for _, words in verdicts))


def _verdict(kept: list[bool]) -> Verdict:
    if not kept:
        return "not measured yet"
    return "reached" if any(kept) else "not reached"


def _basis(one: Quality, gap: Gap, results: StudyResults) -> str:
    """Say on what a verdict rests."""
    planned = len(planned_seeds(results.study, one.asked.row))
    seeds = plural(planned, "seed") if gap.seeds >= planned else f"{gap.seeds} of {plural(planned, 'seed')}"
    split = "test split" if one.asked.split == "test" else "validation split, the test split is not touched yet"
    return f"{seeds}, {split}"
