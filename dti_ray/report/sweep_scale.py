"""Where the values of a sweep stand on an axis: numbers, their logarithms, and what is no number.

Stage: report of a sweep, below its plots. In: values of a configuration, or of a metric. Out: places, ticks, limits.
Invariant: every value has a place from 0 to 1, equal values the same one; numbers stand in order and before all
that is no number.

    10, 20, 50, "all"        0, 1/3, 2/3, 1          few: at equal distances
    3e-4 ... 3e-3 (many)     by their logarithm      more than a factor of ten
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.ticker import LogLocator, MaxNLocator

from dti_ray.config import Value
from dti_ray.tune.results import Cost, is_number, is_wide, value_text

FEW_VALUES = 7  # so many have a tick each
CROWDED = 0.12  # ticks that are closer than this share of an axis run into each other
SLOT = 0.14  # of the axis for each value that is no number
LONGEST_LABEL = 14
FENCE = 3.0  # interquartile ranges: a value that is worse by more is an accident, and would flatten all others
MARGIN = 0.08


@dataclass(frozen=True)
class Scale:
    """An axis for some values.

    Attributes:
        places: text of each value -> from 0 to 1.
        ticks: pairs of place and label.
        is_stepped: whether each value has its tick.
        is_log: whether numbers stand by their logarithm.
    """

    places: Mapping[str, float]
    ticks: tuple[tuple[float, str], ...]
    is_stepped: bool
    is_log: bool = False

    def place(self, value: Value) -> float:
        """Return where a value stands."""
        return self.places[value_text(value)]


def scale_of(values: Iterable[Value]) -> Scale:
    """Return an axis on which some values can be told apart."""
    texts = {value_text(value): value for value in values}
    numbers = sorted((float(value), text) for text, value in texts.items() if is_number(value))  # pyright: ignore[reportArgumentType]
    others = sorted(text for text, value in texts.items() if not is_number(value))
    known = [number for number, _ in numbers]
    is_log = _suits_logarithm(known)
    span = max(0.4, 1.0 - SLOT * len(others)) if numbers else 0.0
    placed = [span * _share(number, known, is_log) for number in known]
    distinct = sorted({round(place, 9) for place in placed})
    is_crowded = bool(np.any(np.diff(distinct) < CROWDED))
    count = len(distinct) + len(others)
    if not numbers or (count <= FEW_VALUES and (others or is_crowded or len(distinct) == 1)):
        return _stepped(numbers, others)
    slots = np.linspace(1.0, span, len(others) + 1)[:-1][::-1] if others else ()
    places = {text: place for (_, text), place in zip(numbers, placed, strict=True)} | dict(
        zip(others, map(float, slots), strict=True)
    )
    if count <= FEW_VALUES:
        ticks = {place: _label(number) for number, place in zip(known, placed, strict=True)}
        return Scale(places, tuple(ticks.items()), True, is_log)
    shown = [(span * _share(tick, known, is_log), _label(tick)) for tick in _ticks(known[0], known[-1], is_log)]
    rest = [(places[text], short_label(text)) for text in others]
    return Scale(places, (*shown, *rest), False, is_log)


def metric_scale(values: Iterable[float], more_is_better: bool) -> Scale:
    """Return a linear axis with its better end at 1; what is far worse than the others stands at 0."""
    known = sorted(set(values))
    worse, better = limits(known, (), more_is_better)
    if not more_is_better:
        worse, better = better, worse

    def place(value: float) -> float:
        return min(1.0, max(0.0, (value - worse) / (better - worse)))

    ticks = _ticks(min(worse, better), max(worse, better), False)
    return Scale({value_text(one): place(one) for one in known}, tuple((place(t), _label(t)) for t in ticks), False)


def short_label(text: str) -> str:
    """Return a text that fits below a tick."""
    return text if len(text) <= LONGEST_LABEL else text[: LONGEST_LABEL - 1] + "…"


def limits(values: Sequence[float], ends: Sequence[float], more_is_better: bool) -> tuple[float, float]:
    """Return the ends of an axis on which values of a metric can be compared.

    Values far worse than the others lie outside; intervals may reach half of the values' range beyond it.

    Args:
        values: what must be seen, at least one.
        ends: of intervals.
        more_is_better: whether the low values are the worse ones.
    """
    first, third = np.percentile(values, (25, 75))
    reach = FENCE * (third - first) if third > first else math.inf
    kept = [one for one in values if (one >= first - reach if more_is_better else one <= third + reach)]
    low, high = min(kept), max(kept)
    span = (high - low) or 0.02 * max(abs(high), 0.1)
    low, high = (
        max(low - span / 2, min([low, *ends])),
        min(high + span / 2, max([high, *ends])),
    )
    return low - MARGIN * span, high + MARGIN * span


def cost_unit(costs: Iterable[float], cost: Cost) -> tuple[float, str]:
    """Return what costs are multiplied with to be read easily, and their unit."""
    highest = max(costs, default=0.0)
    if cost == "flops_per_target":
        return next(((10.0**-power, f"{letter}FLOP") for power, letter in ((12, "T"), (9, "G"), (6, "M"))
                     if highest >= 10.0**power), (1.0, "FLOP"))  # fmt: skip
    return next(((10.0**power, unit) for power, unit in ((0, "s"), (3, "ms")) if highest * 10**power >= 1), (1e6, "µs"))


def _suits_logarithm(known: Sequence[float]) -> bool:
    """Return whether the middle one of some wide numbers stands nearer to the middle of a logarithmic axis."""
    if not is_wide(known):
        return False
    middle = known[len(known) // 2]
    return abs(_share(middle, known, True) - 0.5) < abs(_share(middle, known, False) - 0.5)


def _share(number: float, known: Sequence[float], is_log: bool) -> float:
    """Return where a number stands between the first and the last of some."""
    low, high = known[0], known[-1]
    if low == high:
        return 0.5
    return math.log(number / low) / math.log(high / low) if is_log else (number - low) / (high - low)


def _stepped(numbers: Sequence[tuple[float, str]], others: Sequence[str]) -> Scale:
    """Return an axis on which values stand at equal distances; 1 and 1.0 are one value."""
    known = sorted({number for number, _ in numbers})
    labels = [*map(_label, known), *map(short_label, others)]
    places = np.linspace(0, 1, len(labels)).tolist() if len(labels) > 1 else [0.5]
    spots = {text: places[known.index(number)] for number, text in numbers}
    spots |= dict(zip(others, places[len(known) :], strict=True))
    return Scale(spots, tuple(zip(places, labels, strict=True)), True)


def _ticks(low: float, high: float, is_log: bool) -> list[float]:
    if is_log:
        steps = (1, 2, 5) if high < 1000 * low else (1,)
        ticks = LogLocator(subs=steps, numticks=20).tick_values(low, high)
    else:
        ticks = MaxNLocator(7, steps=[1, 2, 5, 10]).tick_values(low, high)
    return [float(tick) for tick in ticks if low <= tick * (1 + 1e-9) and tick * (1 - 1e-9) <= high]


def _label(number: float) -> str:
    if number == int(number) and abs(number) < 1e5:
        return f"{int(number)}"
    return f"{number:.3g}".replace("e-0", "e-").replace("e+0", "e")
