"""What a person sees in a terminal: bars, lines of metrics, tables.

Stage: beside the command line. In: lines and results. Out: text on stderr, so that stdout is left to the one
machine-readable line.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:  # a wrong option must not wait for torch
    from dti_ray.data.interactions import Dataset
    from dti_ray.data.stats import Check, Lengths, SplitStats, Stats, TextStats, TimeBin
    from dti_ray.estimate import Cost
    from dti_ray.infer.outcome import Evaluation
    from dti_ray.metrics import Estimate, Metrics
    from dti_ray.telemetry import Line

BAR_WIDTH = 30  # characters of the longest bar in a table
PIPE_WIDTH = 130  # columns where no terminal says how wide it is

console = Console(stderr=True, highlight=False)
if not console.is_terminal:
    console.width = PIPE_WIDTH
METRICS = {
    "auc": "AUC",
    "log_loss": "log loss",
    "f1": "F1",
    "gauc": "GAUC",
    "ne": "NE",
    "calibration": "calibration",
    "ece": "ECE",
}


class Bar:
    """A progress bar with the remaining time; where there is no terminal, lines take its place.

    Args:
        what: shown in front of the bar.
        total: number of units; None where it is not known yet.
    """

    def __init__(self, what: str, total: int | None) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.progress = Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
        self.task: TaskID = self.progress.add_task(what, total=total)

    def __enter__(self) -> Bar:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def update(self, done: int, total: int | None = None) -> None:
        """Show how many units are done."""
        self.progress.update(self.task, completed=done, total=total)  # rich keeps the total where it is None

    def stage(self, what: str, done: int, total: int) -> None:
        """Show how far a stage is; another name than before starts another bar."""
        if self.progress.tasks[self.task].description != what:
            self.progress.reset(self.task, description=what)
        self.update(done, total)


class TrainingView:
    """Follows a run: one line of text per line of metrics, under a bar of targets.

    Args:
        total_targets: of the whole run.
    """

    def __init__(self, total_targets: int) -> None:
        self.total = total_targets
        self.bar = Bar("training", total_targets)

    def __enter__(self) -> TrainingView:
        self.bar.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.__exit__(kind, error, trace)

    def say(self, text: str) -> None:
        """Print a remark."""
        console.print(escape(text), soft_wrap=True)

    def show(self, kind: str, line: Line) -> None:
        """Print one line of metrics."""
        if kind == "valid":
            console.print(
                f"[bold]step {line['step']:>6}[/]  validation AUC [bold]{line['auc']:.4f}[/]  "
                f"log loss {line['log_loss']:.4f}"
            )
            return
        left_s = (self.total - line["targets"]) / line["targets_per_s"]
        console.print(
            f"step {line['step']:>6}  targets {line['targets']:>9,}/{self.total:,}  loss {line['loss']:.4f}  "
            f"{line['targets_per_s']:>6,.0f} targets/s  {line['tokens_per_s']:>7,.0f} tokens/s  "
            f"padding {line['padding']:.1%}  wait {line['data_wait']:.1%}  "
            f"{'mfu ' + format(line['mfu'], '.1%') + '  ' if 'mfu' in line else ''}{_duration(left_s)} left"
        )
        self.bar.update(int(line["targets"]))


def show_dataset(dataset: Dataset) -> None:
    """Print what was prepared, refused rows included."""
    table = Table(title=f"data set {dataset.name}", title_justify="left", show_header=False)
    table.add_row("interactions", f"{dataset.interactions:,}")
    table.add_row("users, items", f"{dataset.users:,}, {dataset.items:,}")
    table.add_row("share of clicks", f"{dataset.label_rate:.1%}")
    table.add_row("train, valid, test targets", ", ".join(f"{count:,}" for count in dataset.targets))
    refused = ", ".join(f"{reason} {count:,}" for reason, count in sorted(dataset.quarantined.items()))
    table.add_row("rows in quarantine", refused or "none")
    console.print(table)


def show_scores(folder: str, rows: int, pairs: int, counts: Mapping[str, int]) -> None:
    """Print how much was scored, and what the policies did."""
    table = Table(title=folder, title_justify="left", show_header=False)
    table.add_row("rows in, rows out", f"{rows:,}")
    table.add_row("pairs", f"{pairs:,}")
    for name, count in counts.items():
        table.add_row(name.replace("_", " "), f"{count:,}")
    console.print(table)


def show_stats(stats: Stats) -> None:
    """Print what a prepared log looks like, and whether its splits leak."""
    table = Table(title=f"data set {stats.name}", title_justify="left", show_header=False)
    table.add_row("interactions", f"{stats.interactions:,}")
    table.add_row("users", f"{stats.users:,}")
    table.add_row("items, seen of them", f"{stats.items:,}, {stats.seen_items:,}")
    table.add_row("share of clicks", f"{stats.label_rate:.1%}")
    table.add_row("interactions per user", _lengths(stats.lengths))
    table.add_row(
        "with the top 1 % of the items", f"{stats.top_share:.1%} of the interactions ({stats.top_items:,} items)"
    )
    table.add_row("in the second of the one before", f"{stats.tied_share:.1%} of the interactions")
    table.add_row("item texts", "not tokenised" if stats.text is None else _text(stats.text))
    refused = ", ".join(f"{reason} {count:,}" for reason, count in sorted(stats.quarantined.items()))
    table.add_row("rows in quarantine", refused or "none")
    console.print(table)
    _show_splits(stats.split_rule, stats.splits)
    _show_timeline(stats.timeline)
    _show_powers("interactions per user", {"users": stats.lengths.histogram})
    if stats.text is not None:
        counted = {"items": stats.text.histogram, "interactions": stats.text.histogram_shown}
        _show_powers("tokens of the item's text", counted)
    _show_checks(stats.checks)


def show_evaluation(evaluation: Evaluation) -> None:
    """Print the model under each protocol beside the baselines, with 95 % intervals, and what it cost."""
    table = Table(
        title=f"{evaluation.split} split, n = {evaluation.n}, "
        f"{evaluation.metrics.targets:,} targets of {evaluation.metrics.users:,} users",
        title_justify="left",
    )
    models = {f"model, {result.protocol}": result.metrics for result in evaluation.results}
    columns = {**models, **evaluation.baselines}
    table.add_column("metric")
    for name in columns:
        table.add_column(name, justify="right", style="bold" if name in models else None)
    for field, label in METRICS.items():
        table.add_row(label, *(_interval(metrics, field) for metrics in columns.values()))
    console.print(table)
    left_out = evaluation.metrics.gauc_users_left_out
    console.print(f"95 % intervals by a bootstrap over users; {left_out} users with one class only are not in GAUC")
    for result in evaluation.results:
        each = result.tokens / result.metrics.targets
        console.print(
            f"{result.protocol}: {result.tokens:,} tokens, {each:,.1f} per target; "
            f"{result.tokens_per_s:,.0f} tokens/s, {result.targets_per_s:,.0f} targets/s of a worker"
        )
    if evaluation.difference:
        names = " - ".join(result.protocol for result in reversed(evaluation.results))
        parts = (f"{METRICS[name]} {_signed(estimate)}" for name, estimate in evaluation.difference.items())
        console.print(f"{names}, paired: {', '.join(parts)}")


def show_bench(what: str, rows: Sequence[Mapping[str, object]], facts: Mapping[str, object]) -> None:
    """Print one line per case, and what all cases share."""
    table = Table(
        title=f"{what}: " + ", ".join(f"{name} {value}" for name, value in facts.items()), title_justify="left"
    )
    for name, value in rows[0].items():
        table.add_column(name.replace("_", " "), justify="right", no_wrap=isinstance(value, str))
    for row in rows:
        table.add_row(*(_figure(name, value) for name, value in row.items()))
    console.print(table)


def show_costs(costs: Sequence[Cost], gpu: str, memory_gb: int, mfu: float) -> None:
    """Print the sliding window beside the configuration's k, parts of the memory included."""
    table = Table(title=f"{gpu} of {memory_gb} GB, MFU {mfu:.0%} (assumed)", title_justify="left")
    table.add_column("")
    for cost in costs:
        k = f"k = {cost.k}" if cost.k_min is None else f"k = {cost.k_min} to {cost.k}"
        table.add_column("sliding window" if cost.k == 1 else k, justify="right")
    lines: dict[str, Callable[[Cost], str]] = {
        "tokens (M)": lambda cost: f"{cost.tokens / 1e6:,.1f}",
        "FLOPs (P)": lambda cost: f"{cost.flops / 1e15:,.3g}",
        "GPU-hours": lambda cost: f"{cost.device_hours:,.3g}",
        "tokens of a pass": lambda cost: f"{cost.pass_tokens:,}",
        **{f"{part} (GB)": _gigabytes(part) for part in ("weights", "gradients", "optimizer", "activations", "logits")},
        "sum (GB)": _gigabytes("total"),
        "fits": lambda cost: "yes" if cost.memory.total <= memory_gb * 1e9 else "no",
    }
    for name, cell in lines.items():
        table.add_row(name, *(cell(cost) for cost in costs))
    console.print(table)


def _lengths(lengths: Lengths) -> str:
    return (
        f"{lengths.shortest:,} to {lengths.longest:,}, mean {lengths.mean:,.1f}, median {lengths.median:,}, "
        f"90 % up to {lengths.p90:,}, 99 % up to {lengths.p99:,}"
    )


def _text(text: TextStats) -> str:
    cut = f", {text.cut_items:,} cut" if text.cut_items else ", none cut"
    return (
        f"up to {text.longest} tokens, mean {text.mean:.1f} of an item and {text.mean_shown:.1f} of an interaction{cut}"
    )


def _show_splits(rule: str, splits: Sequence[SplitStats]) -> None:
    table = Table(title=f"split {rule}; cold is what has no interaction of training", title_justify="left")
    table.add_column("split")
    table.add_column("from")
    table.add_column("to")
    for name in ("interactions", "clicks", "users", "cold", "their targets", "items", "cold", "their targets"):
        table.add_column(name, justify="right")
    for split in splits:
        table.add_row(
            split.split, _moment(split.first_s), _moment(split.last_s), f"{split.interactions:,}",
            _share(split.clicks, split.interactions),
            f"{split.users:,}", _share(split.cold_users, split.users),
            _share(split.cold_user_targets, split.interactions),
            f"{split.items:,}", _share(split.cold_items, split.items),
            _share(split.cold_item_targets, split.interactions),
        )  # fmt: skip
    console.print(table)


def _show_timeline(timeline: Sequence[TimeBin]) -> None:
    table = Table(title="share of clicks over time", title_justify="left")
    for name in ("from", "train", "valid", "test", "all", "interactions"):
        table.add_column(name, justify="left" if name == "from" else "right")
    table.add_column("")
    most = max(sum(part.interactions) for part in timeline)
    for part in timeline:
        shares = map(_share, part.clicks, part.interactions)
        total = sum(part.interactions)
        table.add_row(_moment(part.start_s), *shares, _share(sum(part.clicks), total), f"{total:,}", _bar(total, most))
    console.print(table)


def _show_powers(what: str, counted: Mapping[str, Sequence[int]]) -> None:
    """Print counts by powers of two, with a bar for the first of them."""
    names, columns = list(counted), list(counted.values())
    table = Table(title=what, title_justify="left")
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right")
    table.add_column("")
    for power, counts in enumerate(zip(*columns, strict=True)):
        if not any(columns[0][: power + 1]):
            continue  # nothing is that small
        low, high = 2**power, 2 ** (power + 1) - 1
        span = f"{low:,} – {high:,}" if power else "1"
        table.add_row(span, *(f"{count:,}" for count in counts), _bar(counts[0], max(columns[0])))
    console.print(table)


def _show_checks(checks: Sequence[Check]) -> None:
    for check in checks:
        verdict = "[green]pass[/]" if check.passed else f"[red]fail[/]: violated {check.violations:,} times"
        console.print(f"{check.name}: {verdict}")


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "–"


def _moment(seconds: int | None) -> str:
    """Write a second as UTC, to the minute; numpy knows the years beyond 9999 too."""
    return "–" if seconds is None else str(np.datetime64(seconds, "s").astype("datetime64[m]")).replace("T", " ")


def _bar(count: int, most: int) -> str:
    return "█" * -(-count * BAR_WIDTH // max(most, 1))


def _gigabytes(part: str) -> Callable[[Cost], str]:
    return lambda cost: f"{getattr(cost.memory, part) / 1e9:,.3f}"


def _figure(name: str, value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    if name in ("padding", "spread"):
        return f"{value:.1%}"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.2f}" if value >= 1 else f"{value:.3g}"


def _interval(metrics: Metrics, field: str) -> str:
    estimate: Estimate = getattr(metrics, field)
    return f"{estimate.value:.4f} [dim]{estimate.low:.3f} – {estimate.high:.3f}[/]"


def _signed(estimate: Estimate) -> str:
    return f"{estimate.value:+.4f} [dim]{estimate.low:+.4f} to {estimate.high:+.4f}[/]"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
