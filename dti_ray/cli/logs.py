"""Commands that look at a log, or make one up.

Stage: top. In: a configuration, or the size of a log. Out: tables; files of a made-up log.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from dti_ray.cli.options import AsJson, Files, Overrides, Root, end, load
from dti_ray.config import RunConfig
from dti_ray.display import Bar, console, show_stats
from dti_ray.errors import ConfigError, Fault, InputError, RunError
from dti_ray.storage import Storage

if TYPE_CHECKING:
    from dti_ray.data.interactions import Dataset
    from dti_ray.data.prompts import TokenTable

# What configs/synth.yaml prepares.
INTERACTIONS, USERS, OUT = 100_000, 1_000, Path("outputs/synth")


def data_synth(
    interactions: Annotated[int, typer.Option(help="rows of the log (count)")] = INTERACTIONS,
    users: Annotated[int, typer.Option(help="users; each has at least one row (count)")] = USERS,
    out: Annotated[Path, typer.Option(help="local folder, new or empty")] = OUT,
    items: Annotated[
        int | None, typer.Option(help="items of the catalogue (count); default: 5 times the square root of the rows")
    ] = None,
    files: Annotated[int | None, typer.Option(help="files (count); default: one for a million rows")] = None,
    seed: Annotated[int, typer.Option(help="the same seed and sizes give the same files")] = 0,
    as_json: AsJson = False,
) -> None:
    """Make up a log of realistic shape, with something in it to learn."""
    from dti_ray.data.synth import log_shape, write_log

    shape = log_shape(interactions, users, items, files, seed)
    with Bar("making up a log", shape.interactions) as bar:
        is_new = write_log(shape, out, bar.update)
    console.print(
        f"{escape(str(out))}: {shape.interactions:,} interactions of {shape.users:,} users with {shape.items:,} items"
        f"{'' if is_new else ', there already'}",
        soft_wrap=True,
    )
    end(as_json, {"interactions": shape.interactions, "users": shape.users, "items": shape.items, "path": str(out)})


def data_stats(overrides: Overrides, files: Files, root: Root = None, as_json: AsJson = False) -> None:
    """Tell what a prepared log looks like, and check its splits for leaks."""
    from dti_ray.data.asked import open_asked
    from dti_ray.data.stats import dataset_stats

    config = load(files, overrides, root)
    storage = Storage(config.storage.root)
    dataset = open_asked(config.data, storage)
    table = _token_table(config, storage, dataset)
    with console.status("reading"):
        stats = dataset_stats(dataset, table)
    show_stats(stats)
    end(as_json, stats.to_tree())
    leaks = [check for check in stats.checks if not check.passed]
    if leaks:
        where = storage.display(dataset.folder)
        hint = "prepare writes none: delete the folder and run `dti-ray prepare`, or mend what wrote it"
        raise RunError(
            *(Fault(where, f"{check.name}: violated {check.violations:,} times", "0", hint) for check in leaks)
        )


def _token_table(config: RunConfig, storage: Storage, dataset: Dataset) -> TokenTable | None:
    """Return the item texts as tokens; where the prompt section does not fit this catalogue, say so and go on."""
    from dti_ray.train.tokens import tokenizer_and_table

    try:
        return tokenizer_and_table(config, storage, dataset)[1]
    except (ConfigError, InputError) as error:
        console.print(f"[yellow]no text lengths[/]: {escape(str(error))}", soft_wrap=True)
        return None
