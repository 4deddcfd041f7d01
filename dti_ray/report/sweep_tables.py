"""Tiles and tables of a sweep: what was found, all trials, the Pareto front, what failed.

Stage: report of a sweep. In: `TrialResult`s and `RunState`s. Out: HTML fragments.
Invariant: what is not known is a dash, never a zero; the best trial is the one in bold, and only a done one can be.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from html import escape

from dti_ray.config import Value
from dti_ray.report.layout import DASH, tile
from dti_ray.report.plots import short_count
from dti_ray.report.sweep_plots import METRICS
from dti_ray.report.sweep_scale import cost_unit
from dti_ray.tune.ledger import RunState, Status, SweepState
from dti_ray.tune.results import ABSENT, Cost, SeedMean, TrialResult, by_metric, is_number, value_text

SHOWN_TRIALS = 25  # the others of a large sweep are folded away
LONGEST_REASON = 600
OPEN = (Status.WAITING, Status.RUNNING)


def sweep_tiles(state: SweepState, trials: Sequence[TrialResult], chosen: TrialResult | None, metric: str) -> str:
    """Return the headline numbers."""
    counts = Counter(one.status for one in trials)
    still_open = sum(counts[status] for status in OPEN)
    rest = f"{counts[Status.STOPPED]} stopped early, {counts[Status.FAILED]} failed, {still_open} to go"
    seconds = sum(run.seconds for run in state.runs.values())
    targets = sum(run.targets for run in state.runs.values())
    runs = f"{counted(len(state.runs), 'run')}, {short_count(targets, 3)} targets"
    parts = [
        *_best_tiles(chosen, metric),
        *_price_tiles(chosen, metric),
        tile("Trials done", f"{counts[Status.DONE]} of {len(trials)}", rest),
        tile("Time trained", duration(seconds) if seconds else None, f"{runs}; trials at the same time add up"),
    ]
    return f'<div class="tiles">{"".join(parts)}</div>'


def trials_table(
    trials: Sequence[TrialResult], keys: Sequence[str], metric: str, chosen: TrialResult | None
) -> str:  # fmt: skip
    """Return the table of all trials, the best by the metric first."""
    ordered = by_metric(trials, metric)
    factor, unit = cost_unit([one.seconds_per_target or 0.0 for one in trials], "seconds_per_target")
    flops, flops_unit = cost_unit([one.flops_per_target or 0.0 for one in trials], "flops_per_target")
    titles = ("Trial", "AUC", "Log loss", *keys, "Status", "Seeds", "Targets", f"{unit} / target",
              f"{flops_unit} / target")  # fmt: skip
    rows = [
        _row(
            [
                str(one.number),
                _with_interval(one.auc),
                _with_interval(one.log_loss),
                *(escape(plain(one.params.get(key, ABSENT))) for key in keys),
                one.status.value,
                str(len(one.seeds)),
                short_count(one.targets) if one.targets else DASH,
                _scaled(one.seconds_per_target, factor),
                _scaled(one.flops_per_target, flops),
            ],
            is_best=one is chosen,
        )
        for one in ordered
    ]
    head, tail = rows[:SHOWN_TRIALS], rows[SHOWN_TRIALS:]
    folded = (
        f"<details><summary>{counted(len(tail), 'further trial')}</summary>{_table(titles, tail)}</details>"
        if tail
        else ""
    )
    return f'<div class="card">{_table(titles, head)}{folded}<p class="note">{_note(trials, metric, chosen)}</p></div>'


def front_table(front: Sequence[TrialResult], cost: Cost, keys: Sequence[str]) -> str:
    """Return the trials of the Pareto front, the cheapest first."""
    factor, unit = cost_unit([getattr(one, cost) for one in front], cost)
    titles = ("Trial", "AUC", f"{unit} per target", "Configuration")
    rows = [
        "<tr>"
        f"<td>{one.number}</td><td>{_number(one.auc)}</td><td>{_scaled(getattr(one, cost), factor)}</td>"
        f'<td class="words">{escape(configuration(one, keys))}</td></tr>'
        for one in front
    ]
    words = "Each trial of the front buys its AUC at the lowest cost that was found; the cheapest comes first."
    return f'<div class="card"><h3>The front</h3>{_table(titles, rows, titles[-1])}<p class="note">{words}</p></div>'


def failures_table(runs: Sequence[RunState]) -> str:
    """Return the runs that failed at least once, with all reasons."""
    titles = ("Run", "Status", "Starts", "Reasons, oldest first")
    rows = [
        f"<tr><td>{escape(run.name)}</td><td>{run.status.value}</td><td>{run.starts}</td>"
        f'<td class="words">{"<br>".join(escape(_cut(reason)) for reason in run.failures or (run.reason,))}</td></tr>'
        for run in runs
    ]
    return f'<div class="card">{_table(titles, rows, titles[-1])}</div>'


def configuration(trial: TrialResult, keys: Sequence[str]) -> str:
    """Return a trial's values in one line."""
    return " · ".join(f"{key} {plain(trial.params[key])}" for key in keys if key in trial.params)


def plain(value: Value) -> str:
    """Write a value so that it can be read; best.yaml has all its digits."""
    return f"{value:.4g}" if isinstance(value, float) and is_number(value) else value_text(value)


def counted(number: int, noun: str) -> str:
    """Write a number of things."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """Write 5,400 s as 1.5 h."""
    for size, unit in ((48 * 3600, "days"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / (24 * 3600 if unit == 'days' else size):.1f} {unit}"
    return f"{seconds:.0f} s"


def _best_tiles(chosen: TrialResult | None, metric: str) -> list[str]:
    name, words = f"Best validation {METRICS[metric]}", "no trial is done yet"
    if chosen is None or (mean := chosen.mean(metric)) is None:
        return [tile(name, None, words, wide=True), tile("Best configuration", None, words, wide=True)]
    note = "one seed, so how far chance goes is not known"
    if mean.low is not None and mean.high is not None:
        note = f"95% interval {mean.low:.4f} to {mean.high:.4f}, mean of {len(mean.values)} seeds"
    keys = configuration(chosen, list(chosen.params))
    return [
        tile(name, _number(mean), note, wide=True),
        tile("Best configuration", f"Trial {chosen.number}", keys, wide=True),
    ]


def _price_tiles(chosen: TrialResult | None, metric: str) -> list[str]:
    other = "log_loss" if metric == "auc" else "auc"
    names = (f"Its {METRICS[other]}", "Its cost per target")
    if chosen is None:
        return [tile(name, None, "no trial is done yet") for name in names]
    mean, price, flops = chosen.mean(other), chosen.seconds_per_target, chosen.flops_per_target
    told = "one seed"
    if mean is not None and mean.low is not None and mean.high is not None:
        told = f"95% interval {mean.low:.4f} to {mean.high:.4f}"
    return [
        tile(names[0], None if mean is None else _number(mean), told),
        tile(
            names[1],
            None if price is None else _with_unit(price, "seconds_per_target"),
            "FLOPs not known" if flops is None else f"{_with_unit(flops, 'flops_per_target')} of arithmetic",
        ),
    ]


def _with_unit(value: float, cost: Cost) -> str:
    factor, unit = cost_unit([value], cost)
    return f"{factor * value:.3g} {unit}"


def _note(trials: Sequence[TrialResult], metric: str, chosen: TrialResult | None) -> str:
    has_intervals = any(one.auc is not None and one.auc.low is not None for one in trials)
    small = "Small: 95% intervals over seeds (Student's t), wide with two or three seeds. " if has_intervals else ""
    best = "No trial is done yet, so none is best." if chosen is None else f"Bold: trial {chosen.number}, the best."
    return (
        f"{best} The best is chosen by mean {METRICS[metric]} among trials of which every seed is done; one that was "
        f"stopped early or failed is never chosen, even above it. {small}Targets: trained by each run, on average."
    )


def _row(cells: Sequence[str], is_best: bool) -> str:
    start = '<tr class="model">' if is_best else "<tr>"
    kind = ' class="best"' if is_best else ""
    return f"{start}{''.join(f'<td{kind}>{cell}</td>' for cell in cells)}</tr>"


def _table(titles: Sequence[str], rows: Sequence[str], words: str | None = None) -> str:
    """Return a table; the column with the title `words` has text that may run over several lines."""
    heads = [("<th", title) if title != words else ('<th class="words"', title) for title in titles]
    head = "".join(f'{start} scope="col">{escape(title)}</th>' for start, title in heads)
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )  # fmt: skip


def _with_interval(mean: SeedMean | None) -> str:
    if mean is None or mean.low is None or mean.high is None:
        return _number(mean)
    return f"{mean.mean:.4f}<small>{mean.low:.4f}{DASH}{mean.high:.4f}</small>"


def _number(mean: SeedMean | None) -> str:
    return DASH if mean is None else f"{mean.mean:.4f}"


def _scaled(value: float | None, factor: float) -> str:
    return DASH if value is None else f"{factor * value:.3g}"


def _cut(reason: str) -> str:
    return reason if len(reason) <= LONGEST_REASON else reason[: LONGEST_REASON - 1] + "…"
