"""All that is computed from the results of a study, before a word of it is written.

Stage: study, between its comparison and its report. In: `StudyResults`, whole or in part. Out: `Findings`.
Invariant: page and JSON are made of the same findings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dti_ray.study.compare import PROTOCOLS, Comparison, compare
from dti_ray.study.cost import Cost, costs
from dti_ray.study.promises import Choice, Promise, choose, missing_runs, promises
from dti_ray.study.results import StudyResults


@dataclass(frozen=True, eq=False)
class Findings:
    """A study and all that was computed from it."""

    results: StudyResults
    compared: Comparison
    costs: Mapping[str, Cost]
    choices: Mapping[str, Choice]
    promises: tuple[Promise, ...]
    missing: Mapping[str, list[int]]


def find(results: StudyResults) -> Findings:
    """Compute all that a report says."""
    compared, price = compare(results), costs(results)
    chosen = {protocol: choice for protocol in PROTOCOLS if (choice := choose(compared, protocol)) is not None}
    kept = tuple(promises(results, compared, price))
    return Findings(results, compared, price, chosen, kept, missing_runs(results))
