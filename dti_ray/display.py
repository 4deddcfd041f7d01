"""What a person sees in a terminal: bars, lines of metrics, tables.

Stage: beside the command line. In: lines and results. Out: text on stderr, so that stdout is left to the one
machine-readable line.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:  # a wrong option must not wait for torch
    from dti_ray.data.interactions import Dataset
    from dti_ray.estimate import Cost
    from dti_ray.infer.evaluate import Evaluation
    from dti_ray.metrics import Estimate, Metrics
    from dti_ray.telemetry import Line

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


def show_evaluation(evaluation: Evaluation) -> None:
    """Print the model beside the baselines, with 95 % intervals."""
    table = Table(
        title=f"{evaluation.split} split, {evaluation.protocol} inference, n = {evaluation.n}, "
        f"{evaluation.metrics.targets:,} targets of {evaluation.metrics.users:,} users",
        title_justify="left",
    )
    columns = {"model": evaluation.metrics, **evaluation.baselines}
    table.add_column("metric")
    for name in columns:
        table.add_column(name, justify="right", style="bold" if name == "model" else None)
    for field, label in METRICS.items():
        table.add_row(label, *(_interval(metrics, field) for metrics in columns.values()))
    console.print(table)
    left_out = evaluation.metrics.gauc_users_left_out
    console.print(f"95 % intervals by a bootstrap over users; {left_out} users with one class only are not in GAUC")


def show_bench(what: str, rows: Sequence[Mapping[str, object]], facts: Mapping[str, object]) -> None:
    """Print one line per case, and what all cases share."""
    table = Table(
        title=f"{what}: " + ", ".join(f"{name} {value}" for name, value in facts.items()), title_justify="left"
    )
    for name in rows[0]:
        table.add_column(name.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*(_figure(name, value) for name, value in row.items()))
    console.print(table)


def show_costs(costs: Sequence[Cost], gpu: str, memory_gb: int, mfu: float) -> None:
    """Print the sliding window beside the configuration's k, parts of the memory included."""
    table = Table(title=f"{gpu} of {memory_gb} GB, MFU {mfu:.0%} (assumed)", title_justify="left")
    table.add_column("")
    for cost in costs:
        table.add_column("sliding window" if cost.k == 1 else f"k = {cost.k}", justify="right")
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


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
