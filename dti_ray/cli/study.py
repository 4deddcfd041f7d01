"""The command that compares ways of training: bench quality.

Stage: top. In: a configuration with a `study` section. Out: progress for a person, a report, one line for a machine.
"""

from __future__ import annotations

import shlex
import tempfile
import time
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from dti_ray.cli.bench import leave_cluster
from dti_ray.cli.data import ensure_known_dataset
from dti_ray.cli.options import AsJson, Files, Overrides, Root, end, load
from dti_ray.display import Bar, console
from dti_ray.errors import ConfigError, Fault, RunError
from dti_ray.study.follow import Follow

if TYPE_CHECKING:  # a wrong option must not wait for torch
    from dti_ray.study.again import Repeat
    from dti_ray.study.check import Study
    from dti_ray.study.plan import PlannedRun
    from dti_ray.study.results import StudyResults
    from dti_ray.study.run import Outcome
    from dti_ray.telemetry import Line


def bench_quality(
    overrides: Overrides,
    files: Files,
    limit_hours: Annotated[
        float | None, typer.Option(min=0.0, help="begin no run after so many hours; 0: only write the report")
    ] = None,
    row: Annotated[str | None, typer.Option(help="train this row of the study again, beside the others")] = None,
    seed: Annotated[int | None, typer.Option(help="with --row: which of its seeds; default: the first")] = None,
    to: Annotated[
        Path | None, typer.Option(help="folder of the report; default: report/ in the study's own folder")
    ] = None,
    stem: Annotated[str | None, typer.Option("--as", help="name of the report's files; default: study.name")] = None,
    root: Root = None,
    as_json: AsJson = False,
) -> None:
    """Train every row of a study with every seed, compare them, and write a report; run again to go on."""
    if seed is not None and row is None:
        raise ConfigError(Fault("--seed", f"got {seed}", "--row as well: which row is to be trained again"))
    config = load(files, overrides, root)
    from dti_ray.study.plan import plan_study

    plan_study(config)
    if ensure_known_dataset(config, files, overrides):
        leave_cluster()
    from dti_ray.study.check import check_study

    study = check_study(config)
    if row is not None:
        end(as_json, _again(study, row, seed))
        return
    command = _command(files, overrides, root)
    outcome, results = _run(study, limit_hours, command)
    written = _report(study, results, to, stem or study.name)
    end(as_json, _summary(study, outcome, written))
    if outcome.failed:
        hint = "the same command tries them again"
        raise RunError(*(Fault(f"run {name}", reason, hint=hint) for name, reason in outcome.failed.items()))


def _run(study: Study, limit_hours: float | None, command: str) -> tuple[Outcome, StudyResults]:
    from dti_ray.study.collect import collect_results
    from dti_ray.study.run import run_study

    _tell_plan(study)
    with StudyView() as view:
        outcome = run_study(study, view, limit_hours)
    results = collect_results(study, command)
    _tell_results(results)
    for name, reason in outcome.failed.items():
        console.print(f"[red]failed[/] {escape(name)}: {escape(reason)}", soft_wrap=True)
    if outcome.left:
        console.print(f"{len(outcome.done)} of {len(study.runs)} runs are done; the same command goes on")
    return outcome, results


def _again(study: Study, row: str, seed: int | None) -> dict[str, object]:
    """Train one row again and say whether it lies where the study said."""
    from dti_ray.study.again import choose_run, run_again

    run = choose_run(study, row, seed)
    with StudyView() as view:
        repeats = run_again(study, run, view)
    grid = Table("split", "protocol", "n", "AUC", "stated", "a rerun lies within", "inside", title=f"{run.again.name}")
    for one in repeats:
        grid.add_row(one.split, one.protocol, str(one.n), f"{one.auc:.4f}", *_stated(one))
    console.print(grid)
    answers = [
        {
            "split": one.split, "protocol": one.protocol, "n": one.n, "auc": one.auc,
            "stated": one.stated, "within": one.within, "is_inside": one.is_inside,
        }
        for one in repeats
    ]  # fmt: skip
    return {"study": study.name, "row": row, "seed": run.seed, "run": run.again.name, "answers": answers}


def _stated(one: Repeat) -> tuple[str, str, str]:
    auc = "not run yet" if one.stated is None else f"{one.stated:.4f}"
    if one.within is None:
        return (auc, "needs a row with two seeds", "")
    return (auc, f"{one.within[0]:.4f}–{one.within[1]:.4f}", "yes" if one.is_inside else "no")


def _tell_plan(study: Study) -> None:
    """Say what is about to be done."""
    from dti_ray.study.words import count

    grid = Table("row", "changes", "seeds", "n asked", "test", "tokens", title=f"study {study.name}")
    for name, row in study.base.study.rows.items():
        runs = study.of_row(name)
        changes = ", ".join(f"{key} {value}" for key, value in row.change.items())
        seeds, contexts = (", ".join(map(str, values)) for values in ((run.seed for run in runs), runs[0].contexts))
        is_tested = "once" if row.final else ""
        grid.add_row(name, changes, seeds, contexts, is_tested, count(study.tokens(runs[0])))
    console.print(grid)
    total = sum(study.tokens(run) for run in study.runs)
    console.print(f"{len(study.runs)} runs in turns, one row after the other with the same seed; "
                  f"about {count(total)} tokens in all, on {study.device.type}")  # fmt: skip


def _tell_results(results: StudyResults) -> None:
    """Show what is there, row by row, in the words of the validation while training."""
    grid = Table("row", "runs", "validation AUC", "training (s)", title="means over seeds, while training")
    for name in results.study.rows:
        runs = [run for run in results.runs if run.row == name]
        if runs:
            means = (fmean(run.valid_auc for run in runs), fmean(run.seconds for run in runs))
            grid.add_row(name, str(len(runs)), f"{means[0]:.4f}", f"{means[1]:,.1f}")
    console.print(grid)


def _report(study: Study, results: StudyResults, to: Path | None, stem: str) -> list[str]:
    """Write the report, to a folder of this machine or below the study; return where its files lie."""
    if not results.runs:
        console.print("no run is done: there is nothing to report yet")
        return []
    from dti_ray.study.report import write_quality

    if to is not None:
        written = [str(path) for path in write_quality(results, to, stem)]
    else:
        place = f"{study.folder}/report"
        with tempfile.TemporaryDirectory(prefix="dti-ray-report-") as folder:
            write_quality(results, Path(folder), stem)
            entries = study.storage.upload(Path(folder), place)
        written = [study.storage.display(place, entry.path) for entry in entries]
    console.print(f"report: {next(path for path in written if path.endswith('.md'))}", soft_wrap=True)
    return written


def _summary(study: Study, outcome: Outcome, written: list[str]) -> dict[str, object]:
    """Return the line for a machine."""
    return {
        "study": study.name,
        "runs": len(study.runs),
        "done": len(outcome.done),
        "failed": dict(outcome.failed),
        "left": list(outcome.left),
        "report": written,
    }


def _command(files: list[Path], overrides: list[str], root: str | None) -> str:
    """Return the command that goes on with this study."""
    given = [word for file in files for word in ("-c", str(file))]
    place = [] if root is None else ["--root", root]
    return shlex.join(["dti-ray", "bench", "quality", *given, *overrides, *place])


class StudyView(Follow):
    """Follows a study: a line for each run and each validation, a bar for what is under way."""

    def __init__(self) -> None:
        self.bar = Bar("checking", None)
        self.run, self.total, self.began = "", 0, time.monotonic()

    def __enter__(self) -> StudyView:
        self.bar.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.__exit__(None, None, None)

    def say(self, text: str) -> None:
        """Print a remark, with the minutes since the command began."""
        minutes = (time.monotonic() - self.began) / 60
        console.print(f"{minutes:6.1f} min  {escape(text)}", soft_wrap=True)

    def begin(self, run: PlannedRun, number: int, runs: int, total_targets: int) -> None:
        """Say which run begins."""
        self.run, self.total = run.name, total_targets
        self.say(f"{run.name}: run {number} of {runs}, {total_targets:,} targets")

    def line(self, kind: str, line: Line) -> None:
        """Show how far the run is; print its validations."""
        if kind == "train":
            self.bar.stage(self.run, int(line["targets"]), self.total)
        if kind == "valid":
            self.say(f"{self.run}: {line['targets']:,} targets, AUC {line['auc']:.4f}, log loss {line['log_loss']:.4f}")

    def stage(self, what: str, done: int, total: int) -> None:
        """Move the bar."""
        self.bar.stage(what, done, total)
