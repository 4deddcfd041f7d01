"""How good the rows of a study are: by themselves, against the reference row, and against the classics.

Stage: study, after its runs. In: `StudyResults`, whole or in part. Out: `Comparison`.
Invariant: every difference is paired, target by target and seed by seed, and rests on what both sides have; what has
not ended is absent, never guessed.

The reference row answers under sliding inference with the context of its own training (its shortest, where it was not
asked with that); a row's gap is the mean over the seeds that both have of (AUC of the row - AUC of the reference).

**What an interval holds.** Intervals are percentiles over draws of users: they say how far the mean of these very
models would move on other users. They do not hold what another seed would change. Three seeds are too few to be
resampled (ten different draws, which understate the variance by a third), so the standard deviation over seeds stands
beside each interval instead, and the interval for a rerun is made of it (`dti_ray.study.seeds`).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Float

from dti_ray.config.study import StudyConfig
from dti_ray.errors import Fault, InputError
from dti_ray.metrics import Estimate, Predictions, gauc, log_loss
from dti_ray.study.draws import Draws, draw_users, drawn_auc, estimate
from dti_ray.study.results import StudyResults
from dti_ray.study.seeds import deviation, pooled_deviation, rerun_interval

REPLICATES = 1000
SPLITS = ("valid", "test")
PROTOCOLS = ("sliding", "streaming")
MILLION = 10**6


class Asked(NamedTuple):
    """What was asked of a row: targets of a split, under a protocol, with n interactions of context."""

    split: str
    row: str
    protocol: str
    n: int


@dataclass(frozen=True)
class Gap:
    """A difference of two AUCs, each a mean over the seeds that both sides have.

    Attributes:
        auc: its value and 95 % interval over draws of users.
        by_seed: one difference for each of these seeds; a classic counts as the same with every seed.
        sd: standard deviation of `by_seed`; nan with one seed.
    """

    auc: Estimate
    by_seed: tuple[float, ...]
    sd: float

    @property
    def seeds(self) -> int:
        """Number of seeds that it rests on."""
        return len(self.by_seed)


@dataclass(frozen=True)
class Quality:
    """How good a row is under one protocol, with one context, on one split; means over its seeds.

    Attributes:
        k: targets of a prompt in training.
        trained_n: context in training (interactions).
        seeds: that have ended.
        auc: with a 95 % interval over draws of users.
        auc_by_seed: in the order of `seeds`.
        auc_sd: standard deviation over seeds; nan with one seed.
        log_loss: nats per target.
        gauc: AUC within users, weighted by their targets.
        gap: to the reference row; None for the reference's own answer and where no seed is shared with it.
        rerun: where the AUC of one more seed lies with 95 %; None where no row has two seeds.
        seconds_per_million: of inference, per million targets.
        tokens_per_million: read in inference, per million targets.
    """

    asked: Asked
    k: int | str
    trained_n: int
    seeds: tuple[int, ...]
    auc: Estimate
    auc_by_seed: tuple[float, ...]
    auc_sd: float
    log_loss: float
    gauc: float
    gap: Gap | None
    rerun: tuple[float, float] | None
    seconds_per_million: float
    tokens_per_million: float


@dataclass(frozen=True)
class ClassicQuality:
    """How good a baseline is on one split, and how the default row lies to it.

    Attributes:
        default: (protocol, context) -> AUC of the default row - AUC of this baseline.
    """

    name: str
    split: str
    auc: Estimate
    log_loss: float
    gauc: float
    default: Mapping[tuple[str, int], Gap]


@dataclass(frozen=True)
class Comparison:
    """All that a report says of quality.

    Attributes:
        reference: name of the row that others are compared with; None in a study without rows.
        qualities: what was asked -> how good the answers are, in the order of `study.rows`.
        streaming: under sliding inference asked -> AUC under streaming - AUC under sliding inference.
        classics: in the order of the results, validation first.
        is_against_window: whether the reference is a sliding window.
    """

    reference: str | None
    qualities: Mapping[Asked, Quality]
    streaming: Mapping[Asked, Gap]
    classics: tuple[ClassicQuality, ...]
    is_against_window: bool

    def is_window(self, row: str | None) -> bool:
        """Return whether a row's prompts have one target each."""
        return any(one.k == 1 for one in self._all_of(row))

    def of(self, row: str, split: str, protocol: str) -> list[Quality]:
        """Return a row's qualities, one for each context, the main one first."""
        found = [one for asked, one in self.qualities.items() if asked[:3] == (split, row, protocol)]
        return sorted(found, key=lambda one: (one.asked.n != self.main_context(row), one.asked.n))

    def main(self, row: str, split: str, protocol: str = "sliding") -> Quality | None:
        """Return a row's quality with its main context; None where that was not asked."""
        found = self.of(row, split, protocol)
        return found[0] if found else None

    def main_context(self, row: str) -> int | None:
        """Return the reference's context where the row was asked with it, otherwise its own, otherwise its shortest."""
        contexts = {asked.n for asked in self.qualities if asked.row == row}
        first = [one.trained_n for name in (self.reference, row) for one in self._all_of(name)]
        return next((n for n in [*first, *sorted(contexts)] if n in contexts), None)

    def _all_of(self, row: str | None) -> list[Quality]:
        return [one for asked, one in self.qualities.items() if asked.row == row]


@dataclass(frozen=True, eq=False)
class _Said:
    """What one run, or one baseline, said: AUC under each draw, and what else is told of it."""

    auc: Float[np.ndarray, " draws"]
    log_loss: float
    gauc: float
    seconds: float = 0.0
    tokens: float = 0.0


BySeed: TypeAlias = dict[int, _Said]


def compare(results: StudyResults, replicates: int = REPLICATES, seed: int = 0) -> Comparison:
    """Compare all that has ended.

    Args:
        results: a study, whole or in part.
        replicates: draws of users for the intervals; 0 for none.
        seed: of the draws.

    Raises:
        InputError: two answers of a split are not of the same targets in the same order.
    """
    draws = _draws(results, replicates, seed)
    said: dict[Asked, BySeed] = {}
    for run in results.runs:
        for answer in run.answers:
            asked = Asked(answer.split, run.row, answer.protocol, answer.n)
            of_one = _say(draws[answer.split], answer.predictions)
            per_million = MILLION / len(answer.predictions)
            of_one = replace(of_one, seconds=answer.seconds * per_million, tokens=answer.tokens * per_million)
            said.setdefault(asked, {})[run.seed] = of_one
    reference = reference_row(results.study)
    own_n = _context_of_reference(results, reference)
    trained = {run.row: (run.k, run.n) for run in results.runs}
    qualities: dict[Asked, Quality] = {}
    for asked, by_seed in said.items():
        to = None if own_n is None or reference is None else Asked(asked.split, reference, "sliding", own_n)
        gap = None if to is None or asked == to else gap_between(by_seed, said.get(to, {}))
        qualities[asked] = _quality(asked, *trained[asked.row], by_seed, gap)
    streaming = {
        asked: gap
        for asked, by_seed in said.items()
        if asked.protocol == "sliding"
        and (gap := gap_between(said.get(asked._replace(protocol="streaming"), {}), by_seed)) is not None
    }
    compared = Comparison(reference, _with_reruns(qualities), streaming, (), results.is_against_window)
    return replace(compared, classics=_classics(results, draws, said, compared))


def _context_of_reference(results: StudyResults, reference: str | None) -> int | None:
    """Return the context that the reference answers with: its own where it was asked with that, else its shortest."""
    of_reference = [run for run in results.runs if run.row == reference]
    asked = sorted({answer.n for run in of_reference for answer in run.answers})
    return next((n for n in (*(run.n for run in of_reference), *asked) if n in asked), None)


def reference_row(study: StudyConfig) -> str | None:
    """Return the name of the row that all others are compared with; None without rows."""
    return study.reference or next(iter(study.rows), None)


def gap_between(of: Mapping[int, _Said], to: Mapping[int, _Said]) -> Gap | None:
    """Return how one side's AUC lies to the other's over the seeds that both have; None where there is none."""
    shared = [seed for seed in of if seed in to]
    if not shared:
        return None
    differences = np.stack([of[seed].auc - to[seed].auc for seed in shared])
    by_seed = tuple(differences[:, 0].tolist())
    return Gap(estimate(differences.mean(axis=0)), by_seed, deviation(by_seed))


def _draws(results: StudyResults, replicates: int, seed: int) -> dict[str, Draws]:
    """Return one set of draws for each split that anyone answered."""
    firsts: dict[str, Predictions] = {}
    told = [(answer.split, answer.predictions) for run in results.runs for answer in run.answers]
    for split, predictions in [*told, *(pair for one in results.classics for pair in one.answers.items())]:
        first = firsts.setdefault(split, predictions)
        same = np.array_equal(first.user, predictions.user) and np.array_equal(first.label, predictions.label)
        if not same:
            hint = "start the study anew under another name: its data set has changed"
            raise InputError(
                Fault(f"answers of the {split} split", "different targets", "the same, in one order", hint)
            )
    return {split: draw_users(one.user, one.label, replicates, seed) for split, one in firsts.items()}


def _say(draws: Draws, of: Predictions) -> _Said:
    return _Said(
        drawn_auc(draws, of.probability),
        float(log_loss(of.label, of.probability)),
        float(gauc(of.user, of.label, of.probability)),
    )


def _quality(asked: Asked, k: int | str, trained_n: int, by_seed: BySeed, gap: Gap | None) -> Quality:
    told = list(by_seed.values())
    aucs = tuple(float(one.auc[0]) for one in told)
    return Quality(
        asked,
        k,
        trained_n,
        tuple(by_seed),
        estimate(np.mean([one.auc for one in told], axis=0)),
        aucs,
        deviation(aucs),
        statistics.fmean(one.log_loss for one in told),
        statistics.fmean(one.gauc for one in told),
        gap,
        None,
        statistics.fmean(one.seconds for one in told),
        statistics.fmean(one.tokens for one in told),
    )


def _with_reruns(qualities: Mapping[Asked, Quality]) -> dict[Asked, Quality]:
    """Add where reruns lie: by the deviation of all rows of the same split and protocol, each with one context."""
    pooled: dict[tuple[str, str], tuple[float, int]] = {}
    for split, protocol in {(asked.split, asked.protocol) for asked in qualities}:
        of_rows: dict[str, tuple[float, ...]] = {}
        for asked, one in qualities.items():
            if (asked.split, asked.protocol) == (split, protocol):
                of_rows.setdefault(asked.row, one.auc_by_seed)
        pooled[split, protocol] = pooled_deviation(of_rows.values())
    found = {}
    for asked, one in qualities.items():
        sd, freedom = pooled[asked.split, asked.protocol]
        rerun = rerun_interval(one.auc.value, len(one.seeds), sd, freedom) if freedom else None
        found[asked] = replace(one, rerun=rerun)
    return found


def _classics(
    results: StudyResults, draws: Mapping[str, Draws], said: Mapping[Asked, BySeed], compared: Comparison
) -> tuple[ClassicQuality, ...]:
    default = results.study.default
    chosen = (
        [] if default is None else [one for protocol in PROTOCOLS if (one := best_context(compared, default, protocol))]
    )
    found = []
    for split in SPLITS:
        for classic in results.classics:
            if split not in classic.answers:
                continue
            told = _say(draws[split], classic.answers[split])
            gaps: dict[tuple[str, int], Gap] = {}
            for one in chosen:
                by_seed = said.get(one._replace(split=split), {})
                gap = gap_between(by_seed, dict.fromkeys(by_seed, told))
                if gap is not None:
                    gaps[one.protocol, one.n] = gap
            found.append(ClassicQuality(classic.name, split, estimate(told.auc), told.log_loss, told.gauc, gaps))
    return tuple(found)


def best_context(compared: Comparison, row: str, protocol: str) -> Asked | None:
    """Return the question that a row answers best on the validation split; None where it was not asked there."""
    asked = [one for one in compared.of(row, "valid", protocol) if not math.isnan(one.auc.value)]
    return max(asked, key=lambda one: one.auc.value).asked if asked else None
