"""The command line: parse, check, one call, one exit code.

Stage: top. In: arguments. Out: text for a person on stderr, with `--json` one line for a machine on stdout.
Exit codes: 0 done, 2 bad configuration or input (nothing was started), 3 the run failed (state is kept).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn

import typer
from rich.markup import escape

from dti_ray.cli.bench import bench_app, estimate
from dti_ray.cli.data import data_app, prepare
from dti_ray.cli.doctor import doctor
from dti_ray.cli.jobs import jobs_app, submit
from dti_ray.cli.options import Files, Overrides, Root, load
from dti_ray.cli.runs import demo, evaluate, export, report, train
from dti_ray.cli.score import score
from dti_ray.cli.serving import serve
from dti_ray.cli.study import bench_quality
from dti_ray.cli.sweeps import tune
from dti_ray.config import to_yaml
from dti_ray.display import console
from dti_ray.errors import DtiRayError

app = typer.Typer(
    help="Train LLM click models by Dynamic Target Isolation.",
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
)  # fmt: skip
config_app = typer.Typer(help="Look at the configuration.", no_args_is_help=True)
for command in (demo, prepare, estimate, doctor, train, evaluate, score, serve, tune, report, export):
    app.command()(command)
# What it does not know belongs to the command that it sends.
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(submit)
bench_app.command("quality")(bench_quality)
app.add_typer(jobs_app, name="jobs")
app.add_typer(data_app, name="data")
app.add_typer(bench_app, name="bench")
app.add_typer(config_app, name="config")


@config_app.command("show")
def config_show(overrides: Overrides, files: Files, root: Root = None) -> None:
    """Print the effective configuration as YAML."""
    sys.stdout.write(to_yaml(load(files, overrides, root)))


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line; every expected error is one line per fault, without a traceback.

    Args:
        arguments: command first; None takes the process's own.
    """
    try:
        app(arguments, prog_name="dti-ray")
    except DtiRayError as error:
        for fault in error.faults:
            console.print(f"[red]error[/] {escape(str(fault))}", soft_wrap=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        console.print("interrupted; the same command goes on from the last checkpoint")
        sys.exit(DtiRayError.exit_code)
    sys.exit(0)
