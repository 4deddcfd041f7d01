"""The command that looks before a run is started: versions, storage, data, cluster, machines, GPUs.

Stage: top. In: a configuration. Out: a table of checks, one line for a machine; exit code 2 if one failed.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from dti_ray.cli.options import AsJson, Files, Overrides, Root, end, load
from dti_ray.display import console
from dti_ray.errors import Fault, InputError

if TYPE_CHECKING:  # a wrong option must not wait for what the checks import
    from dti_ray.doctor.check import Group

COLOURS = {"pass": "green", "warn": "yellow", "fail": "red", "skip": "dim"}

NoCluster = Annotated[
    bool,
    typer.Option("--no-cluster", help="look at this machine, storage, data and model only; join no Ray cluster"),
]


def doctor(
    overrides: Overrides, files: Files, no_cluster: NoCluster = False, root: Root = None, as_json: AsJson = False
) -> None:
    """Check what a run of this configuration needs, and say what to do about what is missing."""
    config = load(files, overrides, root)
    from dti_ray.doctor.check import is_anything_left_behind
    from dti_ray.doctor.examine import examine

    started = time.monotonic()
    with console.status("looking"):
        groups = examine(config, with_cluster=not no_cluster)
    seconds = round(time.monotonic() - started, 1)
    show_checks(groups, seconds)
    checks = [{"group": group.title, **asdict(one)} for group in groups for one in group.checks]
    bad = [str(one["name"]) for one in checks if one["status"] == "fail"]
    end(as_json, {"ok": not bad, "failed": bad, "seconds": seconds, "checks": checks})
    error = InputError(Fault("doctor", f"{len(bad)} of {len(checks)} checks failed: {', '.join(bad)}"))
    if is_anything_left_behind():
        _end_now(error if bad else None)
    if bad:
        raise error


def show_checks(groups: Sequence[Group], seconds: float) -> None:
    """Print all checks, by group."""
    table = Table(title=f"{sum(len(group.checks) for group in groups)} checks in {seconds} s", title_justify="left")
    for name in ("check", "", "found", "what to do"):
        table.add_column(name, overflow="fold")
    for group in groups:
        table.add_section()
        table.add_row(f"[bold]{group.title}[/]")
        for one in group.checks:
            colour = COLOURS[one.status]
            table.add_row(one.name, f"[{colour}]{one.status}[/]", escape(one.found), escape(one.advice))
    console.print(table)


def _end_now(error: InputError | None) -> None:
    """End without the interpreter's farewell, which would wait for a client of S3 that waits itself."""
    if error is not None:
        console.print(f"[red]error[/] {escape(str(error))}", soft_wrap=True)
    sys.stdout.flush()
    os._exit(error.exit_code if error is not None else 0)
