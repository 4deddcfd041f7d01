"""Commands that bring data in: fetch a public log, prepare a raw one.

Stage: top. In: a configuration. Out: files below the storage root.
"""

from __future__ import annotations

from typing import Annotated

import typer

from dti_ray.cli.options import AsJson, Files, Overrides, Root, end, load
from dti_ray.config import RunConfig
from dti_ray.display import Bar, console, show_dataset
from dti_ray.storage import Storage

data_app = typer.Typer(help="Fetch and look at logs.", no_args_is_help=True)


@data_app.command("get")
def data_get(name: Annotated[str, typer.Argument(help="ml-100k")], root: Root = None, as_json: AsJson = False) -> None:
    """Fetch a public log below the storage root."""
    from dti_ray.data.sources import movielens

    config = load([], [], root)
    with Bar(f"fetching {name}", None) as bar:
        path = movielens.fetch(Storage(config.storage.root), name, bar.update)
    console.print(f"raw files: {path}")
    end(as_json, {"name": name, "path": path})


def prepare(overrides: Overrides, files: Files, root: Root = None, as_json: AsJson = False) -> None:
    """Turn a raw log into time-ordered, split users."""
    from dti_ray.cluster import connect
    from dti_ray.data.prepare import prepare as run_prepare

    config = load(files, overrides, root)
    storage = Storage(config.storage.root)
    storage.check_writable()
    connect(config.cluster)
    with console.status("preparing"):
        dataset = run_prepare(config, storage)
    show_dataset(dataset)
    manifest = storage.display(dataset.folder, "manifest.json")
    quarantined = sum(dataset.quarantined.values())
    end(as_json, {"interactions": dataset.interactions, "quarantined": quarantined, "manifest": manifest})


def ensure_dataset(config: RunConfig, files: Files, overrides: Overrides) -> None:
    """Fetch and prepare what a demo or a bench needs; what is there already is left as it is."""
    data_get(config.data.name, config.storage.root)
    prepare(overrides, files, config.storage.root)
