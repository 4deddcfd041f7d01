"""The pictures of a study: AUC against training time, the gap against k, AUC against context at inference.

Stage: study, below its report. In: `Comparison` and `Cost`s. Out: one `Picture` each, None if there is nothing to draw.
Invariant: intervals are those of the tables; the reference is green, the default orange, in every picture.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from dti_ray.config.study import StudyConfig
from dti_ray.report.plots import COUNTS
from dti_ray.report.theme import LIGHT, draw_png
from dti_ray.study.compare import PROTOCOLS, Comparison, Quality
from dti_ray.study.cost import Cost
from dti_ray.study.labels import Label, place_labels
from dti_ray.study.promises import LARGEST_LOSS
from dti_ray.study.tables import contexts_rows, split_of

WIDTH_UNITS = 640
HEIGHT_UNITS = 400
ALL_NAMED = 16  # rows; of more than these only the important ones are named
SPLIT_WORDS = {"valid": "validation split", "test": "test split"}
WINDOWS = {
    "interactions": ("naive (window by interactions)", "blue"),
    "off": ("anchored (no window)", "orange"),
    "tokens": ("window by tokens", "green"),
    "": ("the base's window", "grey"),
}
MARKS = "osD^vPX"


@dataclass(frozen=True)
class Picture:
    """A picture in a file of its own.

    Attributes:
        name: part of the file's name.
        title: for who does not see it too.
        words: how to read it.
    """

    name: str
    title: str
    words: str
    png: bytes


def pictures(study: StudyConfig, compared: Comparison, costs: Mapping[str, Cost]) -> list[Picture]:
    """Return all pictures that can be drawn."""
    drawn = [
        plot_seconds(study, compared, costs),
        plot_gaps(study, compared),
        plot_contexts(study, compared),
    ]
    return [one for one in drawn if one is not None]


def plot_seconds(study: StudyConfig, compared: Comparison, costs: Mapping[str, Cost]) -> Picture | None:
    """AUC of each row under sliding inference against the seconds of its training."""
    split = split_of(study, compared, list(study.rows))
    shown = [(costs[row].seconds, one) for row in study.rows if (one := compared.main(row, split)) and _is_drawn(one)]
    if not shown:
        return None
    front = _front(shown)
    named = {compared.reference, study.default, *study.headline, *front} if len(shown) > ALL_NAMED else set(study.rows)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.set_xscale("log")
        axes.margins(x=0.16, y=0.14)
        labels = []
        for seconds, one in shown:
            row = one.asked.row
            colour = LIGHT[_colour(row, study, compared)]
            _whisker(axes, seconds, one, colour)
            axes.plot(seconds, one.auc.value, "o", color=colour, markersize=6, zorder=3)
            if row in named:
                labels.append(Label(seconds, one.auc.value, row, colour if colour != LIGHT["grey"] else LIGHT["muted"]))
        labels.sort(key=lambda label: label.colour == LIGHT["muted"])  # the important ones choose first
        _seconds_axis(axes, [seconds for seconds, _ in shown])
        axes.set(xlabel="seconds of one training (log scale)", ylabel=f"AUC, sliding inference, {SPLIT_WORDS[split]}")
        place_labels(figure, axes, labels)

    words = (
        "Up and left is better. Green: the reference row; orange: the default; blue: other headline rows; upright "
        "lines: from the lowest to the highest seed."
    )
    title = f"AUC under sliding inference against the seconds of one training, {SPLIT_WORDS[split]}."
    return Picture("seconds", title, words, draw_png(WIDTH_UNITS, HEIGHT_UNITS, draw))


def plot_gaps(study: StudyConfig, compared: Comparison) -> Picture | None:
    """Gap to the reference row against k, for rows that differ from it in k and window only."""
    series = _gap_series(study, compared)
    rows = [row for found in series.values() for row in found]
    split = split_of(study, compared, rows)
    told = {
        (window, protocol): [
            one for row in found if (one := compared.main(row, split, protocol)) and one.gap and _is_drawn(one)
        ]
        for window, found in series.items()
        for protocol in PROTOCOLS
    }
    told = {key: found for key, found in told.items() if found}
    values = {one.k for found in told.values() for one in found}
    if len(values) < 2:
        return None
    ticks = sorted(values, key=lambda k: (not isinstance(k, int), k if isinstance(k, int) else 0, str(k)))

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        if compared.is_against_window:
            axes.axhspan(-LARGEST_LOSS, LARGEST_LOSS, color=LIGHT["soft"], zorder=0)
        axes.axhline(0, color=LIGHT["green"], linewidth=1.4)
        for index, ((window, protocol), found) in enumerate(told.items()):
            shift = 0.09 * (index - (len(told) - 1) / 2)
            _gap_line(axes, window, protocol, {ticks.index(one.k) + shift: one for one in found})
        axes.set_xticks(range(len(ticks)), [str(k) for k in ticks])
        axes.set(xlabel="k, targets of a prompt in training", ylabel=f"gap in AUC, {SPLIT_WORDS[split]}")
        figure.legend(loc="outside upper left", ncols=2, frameon=False)

    band = ", the grey band what was promised" if compared.is_against_window else ""
    words = (
        f"The green line is the reference{band}; filled dots: sliding inference; open "
        "squares: streaming inference; upright lines: 95 % intervals. Shown are rows that differ from the reference in "
        "k and window only."
    )
    title = f"AUC less that of the reference row against k, {SPLIT_WORDS[split]}."
    return Picture("gaps", title, words, draw_png(WIDTH_UNITS, HEIGHT_UNITS, draw))


def plot_contexts(study: StudyConfig, compared: Comparison) -> Picture | None:
    """AUC under sliding inference against the context at inference; sliding windows of any context beside it."""
    several = contexts_rows(compared)
    alone = [row for row in study.rows if row not in several and compared.is_window(row)]
    split = split_of(study, compared, [*several, *alone])
    told = {row: [one for one in compared.of(row, split, "sliding") if _is_drawn(one)] for row in [*several, *alone]}
    told = {row: sorted(found, key=lambda one: one.asked.n) for row, found in told.items() if found}
    if not any(len(found) > 1 for found in told.values()):
        return None

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.margins(x=0.2, y=0.14)
        labels = []
        for index, (row, found) in enumerate(told.items()):
            colour = LIGHT[_colour(row, study, compared)]
            x, y = [one.asked.n for one in found], [one.auc.value for one in found]
            axes.plot(x, y, f"{MARKS[index % len(MARKS)]}-", color=colour, markersize=6, linewidth=1.6)
            labels.append(Label(x[-1], y[-1], row, colour if colour != LIGHT["grey"] else LIGHT["muted"]))
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.set(
            xlabel="n, context at inference (interactions)", ylabel=f"AUC, sliding inference, {SPLIT_WORDS[split]}"
        )
        place_labels(figure, axes, labels)

    words = (
        "A single mark is a sliding window that was trained with the context at which it stands: the fair rival of a "
        "longer context."
    )
    title = f"AUC under sliding inference against the context at inference, {SPLIT_WORDS[split]}."
    return Picture("contexts", title, words, draw_png(WIDTH_UNITS, HEIGHT_UNITS, draw))


def _gap_line(axes: Axes, window: str, protocol: str, placed: Mapping[float, Quality]) -> None:
    """Draw the gaps of one series with their intervals, by the place on the axis at which each stands."""
    meaning, colour = WINDOWS[window]
    x = sorted(placed)
    gaps = [gap.auc for place in x if (gap := placed[place].gap) is not None]
    axes.vlines(x, [gap.low for gap in gaps], [gap.high for gap in gaps], color=LIGHT[colour], linewidth=1.5, alpha=0.5)
    is_sliding = protocol == "sliding"
    axes.plot(
        x,
        [gap.value for gap in gaps],
        "o-" if is_sliding else "s--",
        color=LIGHT[colour],
        markersize=6,
        markerfacecolor=LIGHT[colour] if is_sliding else LIGHT["card"],
        linewidth=1.4,
        label=f"{meaning}, {protocol}",
    )


def _gap_series(study: StudyConfig, compared: Comparison) -> dict[str, list[str]]:
    """Return window -> rows that differ from the reference row in k and window only."""
    if compared.reference is None:
        return {}
    base = study.rows[compared.reference].change
    series: dict[str, list[str]] = {}
    for name, row in study.rows.items():
        keys = base.keys() | row.change.keys()
        differ = {key for key in keys if base.get(key) != row.change.get(key)}
        if name != compared.reference and differ <= {"packing.k", "packing.window"}:
            series.setdefault(str(row.change.get("packing.window", "")), []).append(name)
    return series


def _is_drawn(one: Quality) -> bool:
    return math.isfinite(one.auc.value) and (one.gap is None or math.isfinite(one.gap.auc.value))


def _colour(row: str, study: StudyConfig, compared: Comparison) -> str:
    if row == compared.reference:
        return "green"
    if row == study.default:
        return "orange"
    return "blue" if row in study.headline else "grey"


def _front(shown: Sequence[tuple[float, Quality]]) -> set[str]:
    """Return the rows that no other one beats in both seconds and AUC."""
    found, best = set(), -math.inf
    for _, one in sorted(shown, key=lambda pair: (pair[0], -pair[1].auc.value)):
        if one.auc.value > best:
            found.add(one.asked.row)
            best = one.auc.value
    return found


def _whisker(axes: Axes, x: float, one: Quality, colour: str) -> None:
    """Draw from the lowest to the highest seed."""
    if len(one.auc_by_seed) > 1:
        axes.vlines(x, min(one.auc_by_seed), max(one.auc_by_seed), color=colour, linewidth=1.6, alpha=0.45)


def _seconds_axis(axes: Axes, seconds: Sequence[float]) -> None:
    """Write times as people do, with few ticks."""
    if min(seconds) == max(seconds):  # a logarithmic axis finds no width of its own for one point
        axes.set_autoscalex_on(False)
        axes.set_xlim(seconds[0] / 2, seconds[0] * 2)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(seconds) < 1000 * min(seconds) else (1,)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(COUNTS)
