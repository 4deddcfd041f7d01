"""How a study's report writes its numbers.

Stage: study, below its report. In: numbers. Out: short texts.
Invariant: what is not known is a dash, never a zero; a difference always has its sign.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from dti_ray.metrics import Estimate
from dti_ray.study.compare import Gap

DASH = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"
TIMES = "\N{MULTIPLICATION SIGN}"


def number(value: float | None, digits: int = 4) -> str:
    """Write a number with so many digits after the point."""
    return DASH if value is None or math.isnan(value) else f"{value:.{digits}f}"


def signed(value: float, digits: int = 4) -> str:
    """Write a difference, with its sign; what rounds to zero has none."""
    if math.isnan(value):
        return DASH
    text = f"{value:+.{digits}f}"
    return text.lstrip("+-") if float(text) == 0 else text.replace("-", MINUS)


def gap_text(gap: Gap | None) -> str:
    """Write a difference of AUCs with its interval."""
    if gap is None or math.isnan(gap.auc.value):
        return DASH
    return f"{signed(gap.auc.value)}{_interval(signed(gap.auc.low), signed(gap.auc.high))}"


def estimate_text(of: Estimate) -> str:
    """Write a value with its interval."""
    return f"{number(of.value)}{_interval(number(of.low), number(of.high))}"


def times(ratio: float | None) -> str:
    """Write how many times."""
    if ratio is None or math.isnan(ratio):
        return DASH
    return f"{ratio:.{2 if ratio < 10 else 1}f} {TIMES}"


def count(value: float) -> str:
    """Write a count or a long time with three digits that say something, in thousands or millions where it is large."""
    for size, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e4, " k")):
        if abs(value) >= size:
            scaled = value / (1e3 if unit == " k" else size)
            return f"{scaled:.{0 if scaled >= 100 else 1 if scaled >= 10 else 2}f}{unit}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def plural(amount: int, noun: str) -> str:
    """Write an amount with its noun."""
    return f"{amount:,} {noun}{'' if amount == 1 else 's'}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]], texts: int = 1) -> str:
    """Write a table in Markdown; the first `texts` columns are texts, the others are numbers."""
    rule = ["---"] * texts + ["---:"] * (len(header) - texts)
    lines = [header, rule, *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _interval(low: str, high: str) -> str:
    return "" if DASH in (low, high) else f" ({low} to {high})"
