"""Commands that bring data in: fetch a public log, prepare a raw one.

Stage: top. In: a configuration. Out: files below the storage root.
"""

from __future__ import annotations

import time
from typing import Annotated

import typer

from dti_ray.cli.logs import data_stats, data_synth
from dti_ray.cli.options import AsJson, Files, Overrides, Root, end, load
from dti_ray.config import RunConfig
from dti_ray.display import Bar, console, show_dataset
from dti_ray.storage import MANIFEST, Storage

# What a person reads for the jobs of `prepare`.
STAGES = {"items": "collecting items", "rows": "reading and checking", "shard": "writing shards"}

data_app = typer.Typer(help="Fetch, make up and look at logs.", no_args_is_help=True)
data_app.command("synth")(data_synth)
data_app.command("stats")(data_stats)


@data_app.command("get")
def data_get(name: Annotated[str, typer.Argument(help="ml-100k")], root: Root = None, as_json: AsJson = False) -> None:
    """Fetch a public log below the storage root."""
    from dti_ray.data.sources import get

    config = load([], [], root)
    with Bar(f"fetching {name}", None) as bar:
        path = get.fetch(Storage(config.storage.root), name, bar.update)
    console.print(f"raw files: {path}")
    end(as_json, {"name": name, "path": path})


def prepare(overrides: Overrides, files: Files, root: Root = None, as_json: AsJson = False) -> None:
    """Turn a raw log into time-ordered, split users; run again to go on where it stopped."""
    from dti_ray.cluster import connect
    from dti_ray.data.prepare import prepare as run_prepare
    from dti_ray.data.ray_jobs import Watch

    config = load(files, overrides, root)
    storage = Storage(config.storage.root)
    storage.check_writable()
    connect(config.cluster)
    started = time.monotonic()
    with Bar("looking at the log", None) as bar:
        watch = Watch(lambda stage, done, total: bar.stage(STAGES.get(stage, "finding the split"), done, total))
        dataset = run_prepare(config, storage, watch)
    seconds = time.monotonic() - started
    show_dataset(dataset)
    result = {
        "interactions": dataset.interactions,
        "quarantined": sum(dataset.quarantined.values()),
        "interactions_per_s": None,
        "peak_rss_mb": None,
        "manifest": storage.display(dataset.folder, MANIFEST),
    }
    if watch.peak_rss_mb:  # otherwise it was there already, and no speed can be told
        speed = dataset.interactions / seconds
        console.print(f"{seconds:,.1f} s, {speed:,.0f} interactions/s, largest process {watch.peak_rss_mb:,.0f} MB")
        result |= {"interactions_per_s": round(speed, 1), "peak_rss_mb": round(watch.peak_rss_mb, 1)}
    else:
        console.print("complete already: nothing was done but to check its files")
    end(as_json, result)


def ensure_known_dataset(config: RunConfig, files: Files, overrides: Overrides) -> bool:
    """Fetch and prepare a public log that is not there yet; return whether that was done."""
    from dti_ray.data.interactions import dataset_folder
    from dti_ray.data.sources.get import KNOWN

    is_there = Storage(config.storage.root).read_manifest(dataset_folder(config.data.name)) is not None
    if config.data.name not in KNOWN or is_there:
        return False
    ensure_dataset(config, files, overrides)
    return True


def ensure_dataset(config: RunConfig, files: Files, overrides: Overrides) -> None:
    """Fetch and prepare what a demo or a bench needs; what is there already is left as it is."""
    data_get(config.data.name, config.storage.root)
    prepare(overrides, files, config.storage.root)
