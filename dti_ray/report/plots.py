"""The curves of the report: learning, probabilities, speed.

Stage: report. In: columns of a run's logs, and its predictions. Out: one `Plot` each.
Invariant: raw values are drawn, smoothing is only ever a second line on top of them; axes carry their units.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from dti_ray.report.artefacts import Predictions, TrainLog, ValidLog
from dti_ray.report.theme import LIGHT, Plot, draw_svg

WIDTH_UNITS = 440
HEIGHT_UNITS = 270
TALL_UNITS = 330
DRAWN_LINES = 800  # a longer log is averaged down to so many points: more than a screen has pixels for
SMOOTHED_SHARE = 15  # the strong line averages over a 15th of the log
CALIBRATION_BINS = 15
SCORE_BINS = 30
NORMAL_95 = 1.96

Values: TypeAlias = Float[np.ndarray, " values"]


@dataclass(frozen=True)
class CalibrationBins:
    """Predictions in bins of equal width, empty ones left out.

    Attributes:
        predicted: mean probability of a bin.
        clicked: share of its targets that were clicked.
        low: lower end of `clicked`'s 95 % Wilson interval; `high` the upper one.
        centre: middle of the bin.
        width: width of all bins.
        targets: targets per bin.
    """

    predicted: Values
    clicked: Values
    low: Values
    high: Values
    centre: Values
    width: float
    targets: Int[np.ndarray, " values"]


def plot_loss(train: TrainLog, valid: ValidLog | None) -> Plot:
    """Training loss over targets seen, raw and smoothed, and the validation log loss beside it."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        _curve(axes, train.targets, train.loss, "blue")
        if valid is not None:
            axes.plot(valid.targets, valid.log_loss, "o-", color=LIGHT["orange"], markersize=5, linewidth=1)
        axes.set(xlabel="targets seen in training", ylabel="loss (nats per target)")
        _seen_axis(axes, train.targets)

    legend = [("blue", "training (faint: each log line)")]
    caption = "Both should fall together"
    if valid is not None:
        legend.append(("orange", "validation"))
        caption += "; dots that rise while the line still falls mean that the model learns its users by heart."
    else:
        caption = "The strong line should fall and flatten; one that still falls at the end asks for more targets."
    svg = draw_svg("loss", WIDTH_UNITS, HEIGHT_UNITS, draw)
    return Plot("Loss over targets seen", caption, svg, tuple(legend))


def plot_validation(valid: ValidLog) -> Plot:
    """Validation AUC over targets seen, the best one marked."""
    best = int(np.nanargmax(valid.auc)) if np.isfinite(valid.auc).any() else None

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.plot(valid.targets, valid.auc, "o-", color=LIGHT["blue"], markersize=4.5)
        axes.set(xlabel="targets seen in training", ylabel="AUC on the validation split")
        axes.margins(y=0.16)
        _seen_axis(axes, valid.targets)
        if best is not None:
            x, y = valid.targets[best], valid.auc[best]
            axes.plot(x, y, "o", markersize=11, markerfacecolor="none", color=LIGHT["orange"], markeredgewidth=2)
            right = best > len(valid.auc) / 2
            axes.annotate(
                f"{y:.4f}", (x, y), (-11 if right else 11, 5), textcoords="offset points",
                ha="right" if right else "left", va="bottom", fontweight="bold",
            )  # fmt: skip

    caption = "A curve that still climbs at its end asks for more training; one that falls has overfitted."
    svg = draw_svg("validation", WIDTH_UNITS, HEIGHT_UNITS, draw)
    legend = (("blue", "validation AUC"), ("orange", "best"))
    return Plot("Validation AUC over targets seen", caption, svg, legend)


def plot_calibration(predictions: Predictions) -> Plot:
    """Predicted against observed click share, with the number of targets in each bin below."""
    bins = calibration_bins(predictions)
    edge = _upper_edge(predictions.probability)

    def draw(figure: Figure) -> None:
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3.4, 1))
        upper.plot([0, edge], [0, edge], color=LIGHT["grey"], linewidth=1.3, linestyle=(0, (4, 3)))
        upper.vlines(bins.predicted, bins.low, bins.high, color=LIGHT["blue"], linewidth=1.6, alpha=0.45)
        upper.plot(bins.predicted, bins.clicked, "o-", color=LIGHT["blue"], markersize=4.5)
        upper.set(ylabel="share that clicked")
        upper.spines["bottom"].set_visible(False)
        upper.tick_params(bottom=False)
        lower.bar(bins.centre, bins.targets, 0.86 * bins.width, color=LIGHT["grey"])
        lower.set(xlabel="predicted probability of a click", ylabel="targets", xlim=(0, edge))
        lower.yaxis.set_major_locator(MaxNLocator(2, integer=True))
        lower.yaxis.set_major_formatter(COUNTS)
        figure.align_ylabels()

    caption = (
        "On the dashed line, 30% means 30%: a curve below it promises too many clicks, one above "
        "it too few. Upright lines are 95% intervals; bins with few targets wander."
    )
    legend = (("blue", "clicks observed"), ("grey", "perfect (dashed), targets in each bin (bars)"))
    svg = draw_svg("calibration", WIDTH_UNITS, TALL_UNITS, draw)
    return Plot("Do the probabilities come true?", caption, svg, legend)


def plot_scores(predictions: Predictions) -> Plot:
    """Histogram of the predicted probability, clicked and not clicked targets apart."""
    edges = np.linspace(0, _upper_edge(predictions.probability), SCORE_BINS + 1)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for label, colour in ((0, "blue"), (1, "orange")):
            counts, _ = np.histogram(predictions.probability[predictions.label == label], edges)
            share = 100 * counts / max(1, counts.sum())
            axes.stairs(share, edges, fill=True, color=LIGHT[colour], alpha=0.22)
            axes.stairs(share, edges, color=LIGHT[colour], linewidth=1.7)
        axes.set(xlabel="predicted probability of a click", ylabel="share of targets (%)", xlim=edges[[0, -1]])
        axes.set_ylim(bottom=0)

    clicks = int(np.count_nonzero(predictions.label == 1))
    total = len(predictions.label)
    legend = (("orange", f"clicked ({clicks:,} targets)"), ("blue", f"not clicked ({total - clicks:,})"))
    caption = "The farther the two shapes stand apart, the better the model tells clicks from the rest."
    svg = draw_svg("scores", WIDTH_UNITS, TALL_UNITS, draw)
    return Plot("Scores of clicked and not clicked targets", caption, svg, legend)


def plot_speed(train: TrainLog) -> Plot:
    """Targets per second over time."""
    time, unit = _time(train.seconds)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        _curve(axes, time, train.targets_per_s, "blue")
        axes.set(xlabel=f"time since the start ({unit})", ylabel="targets per second")
        axes.yaxis.set_major_formatter(COUNTS)
        axes.set_ylim(0, 1.1 * _highest(train.targets_per_s, least=1e-9))

    caption = "A flat line is healthy; a dip is a pause, a steady slope is a resource that runs out."
    legend = (("blue", "targets per second (faint: each log line)"),)
    return Plot("Throughput over time", caption, draw_svg("speed", WIDTH_UNITS, HEIGHT_UNITS, draw), legend)


def plot_waste(train: TrainLog) -> Plot:
    """Share of row tokens that are padding, and share of time spent waiting for data."""
    time, unit = _time(train.seconds)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        _curve(axes, time, 100 * train.padding, "orange")
        _curve(axes, time, 100 * train.data_wait, "green")
        axes.set(xlabel=f"time since the start ({unit})", ylabel="share (%)")
        axes.set_ylim(0, 115 * _highest(np.concatenate([train.padding, train.data_wait]), least=0.043))

    caption = "Both should hug zero: waiting asks for faster packing, padding for longer or fuller rows."
    legend = (("orange", "padding (of row tokens)"), ("green", "waiting for data (of time)"))
    svg = draw_svg("waste", WIDTH_UNITS, HEIGHT_UNITS, draw)
    return Plot("Where throughput is lost", caption, svg, legend)


def calibration_bins(predictions: Predictions) -> CalibrationBins:
    """Bin predictions by probability and count what was clicked.

    The interval is Wilson's (1927), which stays within 0 and 1 for small bins; it takes targets as
    independent.
    """
    edge = _upper_edge(predictions.probability)
    width = edge / CALIBRATION_BINS
    place = np.clip((predictions.probability / width).astype(np.int64), 0, CALIBRATION_BINS - 1)
    targets = np.bincount(place, minlength=CALIBRATION_BINS)
    filled = targets > 0
    count = targets[filled]
    predicted = np.bincount(place, predictions.probability, CALIBRATION_BINS)[filled] / count
    clicked = np.bincount(place, predictions.label, CALIBRATION_BINS)[filled] / count
    scale = 1 + NORMAL_95**2 / count
    middle = (clicked + NORMAL_95**2 / (2 * count)) / scale
    half = NORMAL_95 / scale * np.sqrt(clicked * (1 - clicked) / count + NORMAL_95**2 / (4 * count**2))
    centre = (np.flatnonzero(filled) + 0.5) * width
    return CalibrationBins(predicted, clicked, middle - half, middle + half, centre, width, count)


def smooth(values: Values, window: int) -> Values:
    """Return the centred mean over `window` neighbours, over fewer at both ends."""
    ones = np.ones(min(window, len(values)))
    return np.convolve(values, ones, "same") / np.convolve(np.ones(len(values)), ones, "same")


def short_count(value: float, digits: int = 4) -> str:
    """Write 12,500 as 12.5k and 3,000,000 as 3M, and a dash for what is not defined."""
    if not math.isfinite(value):
        return "\N{EN DASH}"
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.{digits}g}{suffix}"
    return f"{value:.{digits}g}"


COUNTS = FuncFormatter(lambda value, _: short_count(value))


def _curve(axes: Axes, x: Values, y: Values, colour: str) -> None:
    """Draw a faint raw line and a strong smoothed one; a dot where there is one value only."""
    if len(x) == 1:
        axes.plot(x, y, "o", color=LIGHT[colour], markersize=6)
        return
    thin_x, thin_y = _thin(x), _thin(y)
    axes.plot(thin_x, thin_y, color=LIGHT[colour], linewidth=1, alpha=0.42)
    window = max(1, len(thin_y) // SMOOTHED_SHARE) | 1
    axes.plot(thin_x, smooth(thin_y, window), color=LIGHT[colour])


def _seen_axis(axes: Axes, targets: Values) -> None:
    """Let the axis of targets seen begin at 0, with few and short numbers."""
    axes.set_xlim(0, 1.04 * float(targets[-1]))
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(COUNTS)
    axes.yaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))


def _thin(values: Values) -> Values:
    """Average neighbours until at most `DRAWN_LINES` are left."""
    if len(values) <= DRAWN_LINES:
        return values
    parts: Sequence[Values] = np.array_split(values, DRAWN_LINES)
    return np.array([part.mean() for part in parts])


def _highest(values: Values, least: float) -> float:
    """Return the highest of the values that are defined, `least` if none is higher."""
    return float(values[np.isfinite(values)].max(initial=least))


def _upper_edge(probability: Values) -> float:
    """Return 1, or for rare clicks the next twentieth above the highest probability."""
    highest = float(probability.max())
    return 1.0 if highest > 0.5 else max(1, int(np.ceil(20 * highest))) / 20


def _time(seconds: Values) -> tuple[Values, str]:
    """Return times in the unit that reads best."""
    last = float(seconds[-1])
    if last > 3 * 3600:
        return seconds / 3600, "hours"
    return (seconds / 60, "minutes") if last > 180 else (seconds, "seconds")
