"""The command that searches: a live table of trials, and what came of them.

Stage: top. In: a configuration with a `tune` section. Out: a sweep's folder, tables, one line for a machine.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.live import Live
from rich.markup import escape
from rich.table import Table

from dti_ray.cli.data import ensure_known_dataset
from dti_ray.cli.options import AsJson, Files, Overrides, Root, end, load
from dti_ray.config import RunConfig, Value
from dti_ray.display import console
from dti_ray.errors import Fault, RunError

if TYPE_CHECKING:  # a wrong option must not wait for torch
    from dti_ray.tune.checks import Sweep
    from dti_ray.tune.ledger import RunState, SweepState
    from dti_ray.tune.results import SeedMean, TrialResult
    from dti_ray.tune.sweep import Finished

MOST_ROWS = 24  # of the live table


def tune(overrides: Overrides, files: Files, root: Root = None, as_json: AsJson = False) -> None:
    """Search over k, learning rate, debias strength or any other key; run again to go on where it stopped."""
    config = load(files, overrides, root)
    from dti_ray.cluster import connect
    from dti_ray.tune.checks import check_sweep
    from dti_ray.tune.sweep import run_sweep

    ensure_known_dataset(config, files, overrides)
    sweep = check_sweep(config)
    tell_start(sweep)
    connect(config.cluster, config.tune.max_concurrent)
    with SweepView(config) as view:
        finished = run_sweep(sweep, view.show)
    show_results(finished.results, config)
    page = write_page(sweep, finished)
    end(as_json, summary(finished, page))
    if finished.best is None:
        raise RunError(Fault(f"sweep {config.tune.sweep}", "no trial saw all its targets", hint=f"see {page}"))


def tell_start(sweep: Sweep) -> None:
    """Say what is searched, how, and what is known already."""
    from dti_ray.tune.ledger import Ledger

    config, ledger = sweep.base.tune, Ledger(sweep.storage, sweep.base.tune.sweep)
    for damage in ledger.damage:
        where = sweep.storage.display(ledger.path)
        console.print(
            f"[yellow]{escape(where)}: line {damage.line} is left out: {escape(damage.reason)}[/]", soft_wrap=True
        )
    console.print(
        f"sweep {config.sweep}: {config.search} search over {', '.join(config.space)}; "
        f"scheduler {config.scheduler}; {sweep.total_targets:,} targets a run",
        soft_wrap=True,
    )
    state = ledger.state()
    if state.runs:
        ended = sum(run.status.is_final for run in state.runs.values())
        console.print(f"goes on: {ended} of {len(state.runs)} known runs have ended and are not run again")


class SweepView:
    """A table of trials that changes while they run; without a terminal, a line for each event."""

    def __init__(self, config: RunConfig) -> None:
        self.tune = config.tune
        self.live = Live(console=console, refresh_per_second=2, transient=True)
        self.seen: dict[str, int] = {}

    def __enter__(self) -> SweepView:
        if console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()

    def show(self, state: SweepState, texts: list[str]) -> None:
        """Show where the sweep stands, and say what there is to say."""
        for text in texts:
            console.print(escape(text), soft_wrap=True)
        if console.is_terminal:
            self.live.update(self._table(state))
            return
        for run in state.runs.values():
            if len(run.reports) > self.seen.get(run.name, 0):
                self.seen[run.name] = len(run.reports)
                console.print(f"{run.name}: {_progress(run)}", soft_wrap=True)

    def _table(self, state: SweepState) -> Table:
        grid = Table("run", *self.tune.space, "status", "targets", "AUC", "log loss", title=f"sweep {self.tune.sweep}")
        runs = sorted(state.runs.values(), key=lambda run: (run.status.is_final, run.starts == 0))[:MOST_ROWS]
        for run in runs:
            params, last = state.trials[run.trial].params, run.reports[-1] if run.reports else None
            numbers = [f"{last.targets:,}", f"{last.auc:.4f}", f"{last.log_loss:.4f}"] if last else ["", "", ""]
            grid.add_row(run.name, *(_figure(params.get(key)) for key in self.tune.space), run.status, *numbers)
        return grid


def show_results(results: Iterable[TrialResult], config: RunConfig) -> None:
    """Print all trials, the best first."""
    from dti_ray.tune.results import by_metric

    grid = Table(
        "trial", *config.tune.space, "status", "AUC", "log loss", "ms a target", title=f"sweep {config.tune.sweep}"
    )
    for one in by_metric(results, config.tune.metric):
        cost = "" if one.seconds_per_target is None else f"{1e3 * one.seconds_per_target:.3g}"
        values = (_mean(one.auc), _mean(one.log_loss))
        grid.add_row(
            str(one.number), *(_figure(one.params.get(key)) for key in config.tune.space), one.status, *values, cost
        )
    console.print(grid)


def write_page(sweep: Sweep, finished: Finished) -> str:
    """Write the sweep's report; return where it lies."""
    from dti_ray.report.sweep import write_sweep_report

    config = sweep.base
    facts = {
        "data set": config.data.name,
        "protocol": f"sliding inference on the validation split, {config.eval_n} interactions of context",
        "targets of a run": f"{sweep.total_targets:,}",
        "targets of an optimizer step": f"{config.optim.targets_per_step:,}",
    }
    path = f"{sweep.folder}/best.yaml"
    best = sweep.storage.read(path).decode() if finished.best is not None else None
    page = write_sweep_report(sweep.storage, config.tune.sweep, finished.state, config.tune, facts, best)
    console.print(f"report: {page}", soft_wrap=True)
    if finished.best is not None:
        console.print(
            f"best: trial {finished.best.number}; train it with `dti-ray train -c {finished.best_config}`",
            soft_wrap=True,
        )
    return page


def summary(finished: Finished, page: str) -> dict[str, object]:
    """Return the line for a machine."""
    from dti_ray.tune.ledger import Status

    best = finished.best
    statuses = [one.status for one in finished.results]
    return {
        "trials": len(statuses),
        "finished": sum(status in (Status.DONE, Status.STOPPED) for status in statuses),
        "stopped": statuses.count(Status.STOPPED),
        "failed": statuses.count(Status.FAILED),
        "rerun": finished.reruns,
        "best": None if best is None else {
            "trial": best.number, "params": dict(best.params),
            "runs": [finished.state.runs[name].folder for name in best.runs],
            "auc": best.auc.mean if best.auc else None, "log_loss": best.log_loss.mean if best.log_loss else None,
        },
        "best_config": finished.best_config,
        "ledger": finished.ledger,
        "report": page,
    }  # fmt: skip


def _progress(run: RunState) -> str:
    last = run.reports[-1]
    return f"{last.targets:,} targets, AUC {last.auc:.4f}, log loss {last.log_loss:.4f}, {last.seconds:.0f} s"


def _mean(found: SeedMean | None) -> str:
    if found is None:
        return ""
    interval = "" if found.low is None else f" ({found.low:.4f}–{found.high:.4f})"
    return f"{found.mean:.4f}{interval}"


def _figure(value: Value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
