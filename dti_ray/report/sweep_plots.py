"""The pictures of a sweep: quality against a key and against cost, configurations, learning, importance.

Stage: report of a sweep. In: `TrialResult`s, and a `SweepState` for the curves. Out: one `Plot` each.
Invariant: blue is a trial that is done, grey one that is not, orange the best; nothing that was reported is left out
without a word.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from dti_ray.report.plots import COUNTS, HEIGHT_UNITS, TALL_UNITS, WIDTH_UNITS
from dti_ray.report.sweep_scale import MARGIN, Scale, cost_unit, limits, metric_scale, scale_of
from dti_ray.report.theme import LIGHT, Plot, draw_svg
from dti_ray.tune.ledger import RunState, Status, SweepState
from dti_ray.tune.results import ABSENT, Cost, SeedMean, TrialResult, varied_keys

METRICS = {"auc": "AUC", "log_loss": "log loss"}
OTHERS = "stopped, failed or not finished"
BROAD_UNITS = 930
NARROW_NAMES = 7  # names of more axes are shortened and stand in two lines
LABEL_GROUND = {"facecolor": LIGHT["card"], "edgecolor": "none", "alpha": 0.85, "pad": 1.0}  # above lines
LONGEST_STEP = 0.022  # between trials that stand at the same value


def plot_against(trials: Sequence[TrialResult], key: str, metric: str, chosen: int | None) -> Plot:
    """One metric of each trial against one key.

    Args:
        trials: at least one has reported.
        key: it is on the axis.
        metric: `auc` or `log_loss`.
        chosen: number of the best trial.
    """
    shown = [(one, mean) for one in trials if (mean := one.mean(metric)) is not None]
    scale = scale_of(one.params.get(key, ABSENT) for one, _ in shown)
    places = _side_by_side([scale.place(one.params.get(key, ABSENT)) for one, _ in shown])
    low, high = _limits([mean for _, mean in shown], metric)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        if scale.is_stepped and len(scale.ticks) > 1:
            axes.plot(*_best_of_each(shown, scale, key, metric), color=LIGHT["grey"], linewidth=1, dashes=(4, 3))
        for place, (one, mean) in zip(places, shown, strict=True):
            _dot(axes, place, mean, one.status is Status.DONE, one.number == chosen)
        axes.set_xticks([place for place, _ in scale.ticks], [label for _, label in scale.ticks])
        axes.set(xlabel=_axis_name(key, scale), ylabel=f"{METRICS[metric]} on validation")
        axes.set(xlim=(-0.07, 1.07), ylim=(low, high))

    caption = "All keys vary at once: compare the best of each value rather than its average."
    if scale.is_stepped and len(scale.ticks) > 1:
        caption = "All keys vary at once: the dashed line joins the best done trial of each value."
    svg = draw_svg(f"sweep_{metric}", WIDTH_UNITS, TALL_UNITS, draw)
    title = f"{_capital(METRICS[metric])} against {key}"
    return Plot(title, caption + _outside(shown, low, high), svg, _dots_legend(shown, chosen))


def plot_cost(trials: Sequence[TrialResult], front: Sequence[TrialResult], cost: Cost, chosen: int | None) -> Plot:
    """AUC against the cost of a target, with the front of what no trial beats in both."""
    shown = [(one, one.auc) for one in trials if one.auc is not None and getattr(one, cost) is not None]
    factor, unit = cost_unit([getattr(one, cost) for one, _ in shown], cost)
    low, high = _limits([mean for _, mean in shown], "auc")
    names = {one.number for one in front}

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        prices = [factor * getattr(one, cost) for one, _ in shown]
        if min(prices) > 0 and max(prices) > 10 * min(prices):
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter(COUNTS)
        axes.margins(x=0.09)
        axes.plot(prices, [min(max(mean.mean, low), high) for _, mean in shown], alpha=0)  # it sets the limits
        right = axes.get_xlim()[1]
        steps = [(factor * getattr(one, cost), one.auc.mean) for one in front if one.auc is not None]
        if steps:
            x, y = zip(*steps, (right, steps[-1][1]), strict=True)
            axes.plot(x, y, color=LIGHT["green"], drawstyle="steps-post", linewidth=1.6)
        for price, (one, mean) in zip(prices, shown, strict=True):
            _dot(axes, price, mean, one.status is Status.DONE, one.number == chosen, has_interval=False)
            if one.number in names:
                axes.annotate(f"{one.number}", (price, mean.mean), (-6, 5), textcoords="offset points",
                              ha="right", va="bottom", fontweight="bold")  # fmt: skip
        axes.set(xlabel=f"{unit} per target", ylabel="AUC on validation", ylim=(low, high))
        axes.set_xlim(right=right)

    what = "training and validation time" if cost == "seconds_per_target" else "arithmetic of training"
    caption = f"Numbers name the trials of the front; cost is {what}. Below and right of the line, another is better."
    legend = (("green", "Pareto front"), *_dots_legend(shown, chosen, has_interval=False))
    svg = draw_svg("sweep_cost", WIDTH_UNITS, TALL_UNITS, draw)
    return Plot("AUC against cost", caption + _outside(shown, low, high, has_intervals=False), svg, legend)


def plot_configurations(trials: Sequence[TrialResult], metric: str) -> Plot:
    """Each trial as a line through the values of its keys, to its metric: parallel coordinates."""
    shown = sorted(
        ((one, value) for one in trials if (value := one.value(metric)) is not None), key=lambda pair: pair[1]
    )
    keys = varied_keys(one.params for one, _ in shown)
    scales = [scale_of(one.params.get(key, ABSENT) for one, _ in shown) for key in keys]
    means = [abs(value) for _, value in shown]
    scales.append(metric_scale(means, metric == "auc"))

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for rank, ((one, _), mean) in enumerate(zip(shown, means, strict=True)):
            values = [*(one.params.get(key, ABSENT) for key in keys), mean]
            y = [scale.place(value) for scale, value in zip(scales, values, strict=True)]
            axes.plot(y, color=LIGHT["grey"], linewidth=1.6, alpha=0.75)
            axes.plot(y, color=LIGHT["blue"], linewidth=1.6, alpha=rank / max(1, len(shown) - 1))
        _upright_axes(axes, [*keys, METRICS[metric]], scales)

    caption = (
        "Where the blue lines pass close to each other, a value helps whatever the others are; where they spread, "
        "the key hardly matters. The last axis has its better end at the top."
    )
    legend = (("blue", "best trials"), ("grey", "worst trials (shaded by rank)"))
    return Plot("All configurations", caption, draw_svg("sweep_lines", BROAD_UNITS, TALL_UNITS, draw), legend)


def plot_importance(shares: Mapping[str, float], metric: str) -> Plot:
    """How much each key explains of the metric, as bars."""
    names = list(shares)[::-1]
    widths = [100 * shares[name] for name in names]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        bars = axes.barh(names, widths, 0.62, color=LIGHT["blue"])
        axes.bar_label(bars, [f"{width:.0f}%" for width in widths], padding=6, color=LIGHT["ink"])
        axes.set(xlabel="share of what the forest explains (%)", xlim=(0, 1.1 * max(*widths, 1)))
        axes.grid(axis="y", visible=False)

    caption = (
        "Mean decrease in impurity of a random forest over done and stopped trials, each with its best value. With few "
        "trials this is a hint at what to search next, no measurement: it favours keys with many values, says "
        "nothing of the direction, and a key that was searched in a narrow range looks unimportant."
    )
    svg = draw_svg("sweep_importance", BROAD_UNITS, 62 + 34 * len(names), draw)
    return Plot(f"What moved the {METRICS[metric]}", caption, svg)


def plot_learning(state: SweepState, metric: str, chosen: TrialResult | None) -> Plot:
    """One metric of each run over targets seen."""
    runs = [run for run in state.runs.values() if any(math.isfinite(_read(run, metric, i)) for i in _all(run))]
    low, high = _learning_limits(runs, metric)
    count = sum(not low <= _read(run, metric, i) <= high for run in runs for i in _all(run))
    best_runs = () if chosen is None else chosen.runs

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for run in sorted(runs, key=lambda run: (run.name in best_runs, run.status is Status.DONE)):
            x, y = [report.targets for report in run.reports], [_read(run, metric, i) for i in _all(run)]
            is_done, is_best = run.status is Status.DONE, run.name in best_runs
            colour = LIGHT["orange" if is_best else "blue" if is_done else "grey"]
            axes.plot(x, y, "-" if len(x) > 1 else "o", color=colour, linewidth=2 if is_best else 1.1,
                      alpha=1 if is_best else 0.6, markersize=4)  # fmt: skip
            if run.status in (Status.STOPPED, Status.FAILED):
                mark = "x" if run.status is Status.STOPPED else "v"
                axes.plot(x[-1], y[-1], mark, color=LIGHT["grey"], markersize=6, markeredgewidth=1.6)
        axes.set(xlabel="targets seen in training", ylabel=f"{METRICS[metric]} on validation", ylim=(low, high))
        axes.set_xlim(0, 1.04 * max(run.reports[-1].targets for run in runs))
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.xaxis.set_major_formatter(COUNTS)

    legend = [
        ("blue", "done"),
        ("orange", "best configuration"),
        ("grey", "stopped (cross), failed (triangle), not finished"),
    ]
    caption = "One line for each run, that is for each seed of a trial, with every validation."
    caption += f" {count} validations lie outside the picture." if count else ""
    svg = draw_svg(f"sweep_learning_{metric}", WIDTH_UNITS, HEIGHT_UNITS, draw)
    return Plot(f"{_capital(METRICS[metric])} over targets seen", caption, svg, tuple(legend))


def _all(run: RunState) -> range:
    return range(len(run.reports))


def _read(run: RunState, metric: str, index: int) -> float:
    return getattr(run.reports[index], metric)


def _learning_limits(runs: Sequence[RunState], metric: str) -> tuple[float, float]:
    """Return limits within which whole curves are seen, but for runs that are far worse than the others."""
    choose = max if metric == "auc" else min
    curves = [[value for i in _all(run) if math.isfinite(value := _read(run, metric, i))] for run in runs]
    low, high = limits([choose(curve) for curve in curves], (), metric == "auc")
    kept = [value for curve in curves if low <= choose(curve) <= high for value in curve]
    margin = MARGIN * (max(kept) - min(kept))
    return min(low, min(kept) - margin), max(high, max(kept) + margin)


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _axis_name(key: str, scale: Scale) -> str:
    return f"{key} (log scale)" if scale.is_log else key


def _limits(means: Sequence[SeedMean], metric: str) -> tuple[float, float]:
    ends = [end for mean in means for end in (mean.low, mean.high) if end is not None]
    return limits([mean.mean for mean in means], ends, metric == "auc")


def _outside(shown: Sequence[tuple[TrialResult, SeedMean]], low: float, high: float, has_intervals: bool = True) -> str:
    """Say which trials a picture does not show, and that intervals go on beyond it."""
    names = [str(one.number) for one, mean in shown if not low <= mean.mean <= high]
    words = f" Far worse, so outside the picture: trial {', '.join(names)}." if names else ""
    inside = [mean for one, mean in shown if has_intervals and str(one.number) not in names]
    ends = [end for mean in inside for end in (mean.low, mean.high) if end is not None]
    return words + (" A bar that reaches the edge goes on." if any(not low <= end <= high for end in ends) else "")


def _side_by_side(places: Sequence[float]) -> list[float]:
    """Shift what stands at the same place a little, so that all of it is seen."""
    counts, seen = Counter(places), Counter[float]()
    shifted = []
    for place in places:
        step = min(LONGEST_STEP, 0.14 / counts[place])
        shifted.append(place + step * (seen[place] - (counts[place] - 1) / 2))
        seen[place] += 1
    return shifted


def _best_of_each(
    shown: Sequence[tuple[TrialResult, SeedMean]], scale: Scale, key: str, metric: str
) -> tuple[list[float], list[float]]:
    """Return places and values of the best done trial at each of a key's values."""
    found: dict[float, float] = {}
    choose = max if metric == "auc" else min
    for one, mean in shown:
        if one.status is Status.DONE:
            place = scale.place(one.params.get(key, ABSENT))
            found[place] = choose(found.get(place, mean.mean), mean.mean)
    ordered = sorted(found.items())
    return [place for place, _ in ordered], [value for _, value in ordered]


def _dot(axes: Axes, x: float, mean: SeedMean, is_done: bool, is_best: bool, has_interval: bool = True) -> None:
    """Draw a trial: mean, interval, seeds."""
    colour = LIGHT["orange" if is_best else "blue" if is_done else "grey"]
    if has_interval and mean.low is not None and mean.high is not None:
        axes.vlines(x, mean.low, mean.high, color=colour, linewidth=1.6, alpha=0.5)
        axes.plot([x] * len(mean.values), mean.values, "o", color=colour, markersize=2.4, alpha=0.8)
    face = colour if is_done else "none"
    axes.plot(x, mean.mean, "o", color=colour, markersize=7 if is_best else 5.5, markerfacecolor=face, zorder=3)


def _dots_legend(
    shown: Sequence[tuple[TrialResult, SeedMean]], chosen: int | None, has_interval: bool = True
) -> tuple[tuple[str, str], ...]:
    repeats = has_interval and any(mean.low is not None for _, mean in shown)
    done = "done (bar: 95% interval, small dots: seeds)" if repeats else "done"
    entries = [("blue", done)]
    if chosen is not None:
        entries.append(("orange", "best"))
    if any(one.status is not Status.DONE for one, _ in shown):
        entries.append(("grey", OTHERS))
    return tuple(entries)


def _upright_axes(axes: Axes, names: Sequence[str], scales: Sequence[Scale]) -> None:
    """Draw the axes of parallel coordinates, each with its ticks at its left."""
    has_many = len(names) > NARROW_NAMES
    for index, (name, scale) in enumerate(zip(names, scales, strict=True)):
        axes.plot([index, index], [0, 1], color=LIGHT["muted"], linewidth=1, zorder=1)
        for place, label in scale.ticks:
            axes.plot([index - 0.012, index], [place, place], color=LIGHT["muted"], linewidth=1)
            axes.annotate(label, (index, place), (-8, 0), textcoords="offset points", ha="right", va="center",
                          color=LIGHT["muted"], bbox=LABEL_GROUND)  # fmt: skip
        words = name.rpartition(".")[2] if has_many else _axis_name(name, scale)
        axes.annotate(words, (index, 1), (0, 26 if has_many and index % 2 else 12), textcoords="offset points",
                      ha="center", fontweight="bold")  # fmt: skip
    axes.set(xlim=(-0.28, len(names) - 0.85), ylim=(-0.05, 1.05), xticks=[], yticks=[])
    axes.grid(visible=False)
    axes.spines["bottom"].set_visible(False)
