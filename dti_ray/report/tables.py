"""Tiles and tables: the numbers of a run, written so that they can be compared.

Stage: report. In: `Artefacts`. Out: HTML fragments.
Invariant: what is not defined or not there is a dash, never a zero; the best of a column is in bold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from html import escape

import numpy as np

from dti_ray.metrics import Estimate, Metrics
from dti_ray.report.artefacts import Cost, Evaluation, TrainLog
from dti_ray.report.layout import DASH, tile
from dti_ray.report.plots import short_count

MINUS = "\N{MINUS SIGN}"
THIS_RUN = "this run"
RANGE_WIDTH, RANGE_HEIGHT = 150, 20


@dataclass(frozen=True)
class Column:
    """One metric of the table.

    Attributes:
        title: heading.
        field: its name in `Metrics`.
        cost: what is least for the best value.
        digits: decimals shown.
        has_interval: whether its bootstrap interval is shown (that of ECE leans upwards, see `Metrics`).
    """

    title: str
    field: str
    cost: Callable[[float], float]
    digits: int = 4
    has_interval: bool = True

    def read(self, metrics: Metrics) -> Estimate:
        """Take the metric from a predictor's metrics."""
        return getattr(metrics, self.field)


COLUMNS = (
    Column("AUC", "auc", lambda value: -value),
    Column("Log loss", "log_loss", lambda value: value),
    Column("GAUC", "gauc", lambda value: -value),
    Column("NE", "ne", lambda value: value),
    Column("F1", "f1", lambda value: -value),
    Column("Calibration", "calibration", lambda value: abs(value - 1), digits=3),
    Column("ECE", "ece", lambda value: value, has_interval=False),
)


def tiles(evaluation: Evaluation | None, train: TrainLog | None) -> str:
    """Return the headline numbers."""
    if evaluation is None:
        names = ("Test AUC", "Log loss", "GAUC", "Calibration")
        quality = [tile(name, None, "not evaluated yet", wide=name == "Test AUC") for name in names]
    else:
        quality = _quality_tiles(evaluation)
    return f'<div class="tiles">{"".join([*quality, *_speed_tiles(train)])}</div>'


def metrics_table(evaluation: Evaluation) -> str:
    """Return the table of the model and its baselines, best values in bold, and the note below it."""
    other = {} if evaluation.other is None else {f"{THIS_RUN}, {evaluation.other.protocol}": evaluation.other.model}
    rows = {THIS_RUN: evaluation.model, **other, **evaluation.baselines}
    scale = _range_scale([metrics.auc for metrics in rows.values()])
    first, *rest = (column.title for column in COLUMNS)
    titles = ("Predictor", first, "95% interval of AUC", *rest)
    head = "".join(f'<th scope="col">{title}</th>' for title in titles)
    best = {column.title: _best(column, rows) for column in COLUMNS}
    body = "".join(_row(name, metrics, best, scale) for name, metrics in rows.items())
    return (
        f'<div class="card"><div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f'<tbody>{body}</tbody></table></div><p class="note">{_table_note(evaluation)}</p></div>'
    )


def protocols_table(evaluation: Evaluation) -> str:
    """Return the table of what each protocol reached and cost, and how they differ; nothing where no cost is known."""
    if evaluation.cost is None:
        return ""
    other = evaluation.other
    rows = [_protocol_row(evaluation.protocol, evaluation.model, evaluation.cost)]
    note = "Sliding asks with a stand-alone prompt per target, streaming with the prompts of training. "
    note += "Speed is that of one worker."
    if other is not None:
        rows.append(_protocol_row(other.protocol, other.model, other.cost))
        cells = "".join(f"<td>{_signed_span(other.difference[name])}</td>" for name in ("auc", "log_loss"))
        name = f"{other.protocol} {MINUS} {evaluation.protocol}"
        rows.append(f'<tr><th scope="row">{escape(name)}</th>{cells}<td></td><td></td></tr>')
        note += " The difference is paired: both meet the same drawn users in each bootstrap replicate."
    titles = ("Protocol", "AUC", "Log loss", "Tokens per target", "Tokens per second")
    head = "".join(f'<th scope="col">{title}</th>' for title in titles)
    return (
        f'<div class="card"><div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f'<tbody>{"".join(rows)}</tbody></table></div><p class="note">{note}</p></div>'
    )


def pairs(values: Mapping[str, str]) -> str:
    """Return a two-column list of names and values."""
    rows = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>" for name, text in values.items())
    return f'<dl class="pairs">{rows}</dl>'


def number(value: float, digits: int) -> str:
    """Write a number with thousands marked, or a dash where it is not defined."""
    return f"{value:,.{digits}f}" if math.isfinite(value) else DASH


def best_baseline(evaluation: Evaluation) -> tuple[str, Metrics] | None:
    """Return name and metrics of the baseline with the highest AUC."""
    defined = {name: metrics for name, metrics in evaluation.baselines.items() if math.isfinite(metrics.auc.value)}
    return max(defined.items(), key=lambda pair: pair[1].auc.value) if defined else None


def _quality_tiles(evaluation: Evaluation) -> list[str]:
    model, rival = evaluation.model, best_baseline(evaluation)
    auc_notes = [f"95% interval {_span(model.auc)}"]
    loss_note = f"95% interval {_span(model.log_loss)}"
    if rival is not None:
        name, metrics = rival
        difference = model.auc.value - metrics.auc.value
        auc_notes.append(f"{_signed(difference)} against the best baseline, {name} ({number(metrics.auc.value, 4)})")
    left_out = f"per user; {evaluation.model.gauc_users_left_out:,} users with one label only left out"
    return [
        tile(f"{evaluation.split.capitalize()} AUC", number(model.auc.value, 4), *auc_notes, wide=True),
        tile("Log loss", number(model.log_loss.value, 4), loss_note),
        tile("GAUC", number(model.gauc.value, 4), left_out),
        tile("Calibration", number(model.calibration.value, 3), "clicks predicted ÷ observed; 1 is right"),
    ]


def _speed_tiles(train: TrainLog | None) -> list[str]:
    names = ("Targets per second", "Tokens per target", "Training minutes")
    if train is None:
        return [tile(name, None, "no training log yet") for name in names]
    targets, tokens = float(train.targets[-1]), float(train.tokens[-1])
    rate = float(np.median(train.targets_per_s))
    minutes = float(train.seconds[-1]) / 60
    token_rate = short_count(float(np.median(train.tokens_per_s)), 3)
    values = (
        number(rate, 0 if rate >= 100 else 1),
        number(tokens / targets if targets else math.nan, 1),
        number(minutes, 0 if minutes >= 100 else 1),
    )
    notes = (
        f"median of the log; {token_rate} tokens per second",
        f"{short_count(tokens, 3)} tokens in training",
        f"for {number(targets, 0)} targets",
    )
    return [tile(name, value, note) for name, value, note in zip(names, values, notes, strict=True)]


def _protocol_row(name: str, model: Metrics, cost: Cost) -> str:
    cells = (
        number(model.auc.value, 4),
        number(model.log_loss.value, 4),
        number(cost.tokens / model.targets, 1),
        number(cost.tokens / cost.seconds, 0),
    )
    return f'<tr><th scope="row">{escape(name)}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'


def _signed_span(difference: Estimate) -> str:
    return f"{_signed(difference.value)}<small>{_signed(difference.low)} to {_signed(difference.high)}</small>"


def _span(interval: Estimate) -> str:
    return f"{number(interval.low, 4)} to {number(interval.high, 4)}"


def _signed(value: float) -> str:
    return f"{'+' if value >= 0 else MINUS}{abs(value):.4f}" if math.isfinite(value) else DASH


def _best(column: Column, rows: Mapping[str, Metrics]) -> float:
    """Return the least cost of a column."""
    costs = [column.cost(column.read(metrics).value) for metrics in rows.values()]
    return min((cost for cost in costs if math.isfinite(cost)), default=math.nan)


def _row(name: str, metrics: Metrics, best: Mapping[str, float], scale: tuple[float, float]) -> str:
    cells = []
    for column in COLUMNS:
        estimate = column.read(metrics)
        kind = ' class="best"' if column.cost(estimate.value) == best[column.title] else ""
        text = number(estimate.value, column.digits)
        if column.has_interval and math.isfinite(estimate.low):
            low, high = number(estimate.low, column.digits), number(estimate.high, column.digits)
            text += f"<small>{low}{DASH}{high}</small>"
        cells.append(f"<td{kind}>{text}</td>")
    model = name.startswith(THIS_RUN)
    cells.insert(1, f"<td>{_range_picture(metrics.auc, scale, 'blue' if model else 'grey')}</td>")
    start = '<tr class="model">' if model else "<tr>"
    return f'{start}<th scope="row">{escape(name)}</th>{"".join(cells)}</tr>'


def _range_scale(intervals: list[Estimate]) -> tuple[float, float]:
    ends = [end for part in intervals for end in (part.low, part.value, part.high) if math.isfinite(end)]
    low, high = min(ends, default=0.0), max(ends, default=1.0)
    return (low, high) if high > low else (low - 0.01, low + 0.01)


def _range_picture(interval: Estimate, scale: tuple[float, float], colour: str) -> str:
    """Draw an interval as a bar with a dot, on a scale that all rows of the table share."""
    if not math.isfinite(interval.value):
        return DASH
    low, high = scale
    ends = (interval.low, interval.high, interval.value)
    known = [end if math.isfinite(end) else interval.value for end in ends]
    left, right, dot = (7 + (end - low) / (high - low) * (RANGE_WIDTH - 14) for end in known)
    y = RANGE_HEIGHT / 2
    return (
        f'<svg viewBox="0 0 {RANGE_WIDTH} {RANGE_HEIGHT}" aria-hidden="true">'
        f'<line x1="0" x2="{RANGE_WIDTH}" y1="{y}" y2="{y}" stroke="var(--line)"/>'
        f'<line x1="{left:.1f}" x2="{right:.1f}" y1="{y}" y2="{y}" stroke="var(--{colour})" stroke-width="5" '
        f'stroke-linecap="round" opacity=".35"/>'
        f'<circle cx="{dot:.1f}" cy="{y}" r="5" fill="var(--{colour})"/></svg>'
    )


def _table_note(evaluation: Evaluation) -> str:
    model = evaluation.model
    return (
        f"<b>{escape(evaluation.protocol.capitalize())}</b> protocol, "
        f"<b>{escape(evaluation.split)}</b> split, n = <b>{evaluation.n}</b> interactions of context, "
        f"checkpoint {escape(evaluation.checkpoint)}; {model.targets:,} targets of {model.users:,} users. "
        "Bold: best of its column. Small: 95% intervals by bootstrap over users. "
        f"GAUC leaves out {model.gauc_users_left_out:,} users whose targets all carry one label. "
        "NE is log loss ÷ entropy of the mean click rate (below 1 beats a constant); calibration is clicks "
        "predicted ÷ clicks observed (1 is right); ECE is the mean gap between the two over 15 bins."
    )
