"""The JSON of a study: the same findings as on its page, for programs.

Stage: study, below its report. In: `Findings`. Out: plain values.
Invariant: what is not known is None; `headline` has the test split before the validation split, and a row's main
context before others, so that the first match is the one that the page shows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict

from dti_ray.study.compare import PROTOCOLS, SPLITS, Quality
from dti_ray.study.cost import Cost
from dti_ray.study.findings import Findings
from dti_ray.study.promises import planned_seeds

PRICES = ("seconds_per_million", "tokens_per_million", "flops_per_target")


def to_json(found: Findings) -> dict[str, object]:
    """Return plain values; what is not known is None."""
    study, compared = found.results.study, found.compared
    headline = [
        _headline_entry(one, found.costs[row])
        for split in reversed(SPLITS)
        for row in study.headline
        for protocol in PROTOCOLS
        for one in compared.of(row, split, protocol)
    ]
    document = {
        "study": study.name,
        "command": found.results.command,
        "reference": compared.reference,
        "default": study.default,
        "headline": headline,
        "promises": [asdict(one) for one in found.promises],
        "rows": [_row_entry(found, row) for row in study.rows if row in found.costs],
        "classics": _classics_entries(found),
        "best": {
            protocol: {**_place(choice.valid), "test": choice.test.auc.value if choice.test else None}
            | {name: getattr(found.costs[choice.valid.asked.row], name) for name in PRICES}
            for protocol, choice in found.choices.items()
        },
        "missing": dict(found.missing),
        "padded_over_packed": found.results.padded_over_packed,
        "facts": dict(found.results.facts),
    }
    return {name: _plain(value) for name, value in document.items()}


def _place(one: Quality) -> dict[str, object]:
    return {**one.asked._asdict(), "k": one.k, "auc": one.auc.value, "seeds": len(one.seeds)}


def _headline_entry(one: Quality, cost: Cost) -> dict[str, object]:
    gap = one.gap.auc if one.gap else None
    return {
        **_place(one),
        "auc_gap": gap.value if gap else None,
        "auc_gap_low": gap.low if gap else None,
        "auc_gap_high": gap.high if gap else None,
        "auc_gap_sd": one.gap.sd if one.gap else None,
        "speedup_packed": cost.speedup_packed,
        "speedup_elapsed": cost.speedup_elapsed,
        "speedup_padded": cost.speedup_padded,
    }


def _row_entry(found: Findings, row: str) -> dict[str, object]:
    asked = [one for key, one in found.compared.qualities.items() if key.row == row]
    streaming = {key: gap for key, gap in found.compared.streaming.items() if key.row == row}
    return {
        "row": row,
        "command": f"{found.results.command} --row {row} --seed {planned_seeds(found.results.study, row)[0]}",
        "change": dict(found.results.study.rows[row].change),
        "cost": asdict(found.costs[row]),
        "answers": [{**asdict(one), "asked": one.asked._asdict()} for one in asked],
        "streaming_minus_sliding": [{**key._asdict(), **asdict(gap)} for key, gap in streaming.items()],
    }


def _classics_entries(found: Findings) -> list[dict[str, object]]:
    known = {one.name: one for one in found.results.classics}
    entries = []
    for one in found.compared.classics:
        gaps = [{"protocol": protocol, "n": n, **asdict(gap)} for (protocol, n), gap in one.default.items()]
        fit = {"seconds": known[one.name].seconds, "chosen": known[one.name].chosen}
        entries.append({**asdict(one), "default": gaps, **fit})
    return entries


def _plain(value: object) -> object:
    """Return nan as None, everywhere below."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value
