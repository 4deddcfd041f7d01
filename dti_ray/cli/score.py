"""The command that scores a log of requests.

Stage: top. In: a configuration, or the name of a run. Out: scores below the storage root, one line for a machine.
"""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Annotated

import typer

from dti_ray.cli.options import AsJson, Files, Root, end, load
from dti_ray.config import RunConfig
from dti_ray.display import Bar, console, show_scores
from dti_ray.errors import ConfigError, Fault
from dti_ray.storage import MANIFEST, Storage

if TYPE_CHECKING:  # a wrong option must not wait for torch
    from dti_ray.score.job import Scores

# What a person reads for the stages of the job.
STAGES = {"rows": "reading requests", "unit": "scoring"}

RunAndOverrides = Annotated[
    list[str],
    typer.Argument(
        help="name of the run, and overrides such as score.input=requests", default_factory=list, show_default=False
    ),
]


def score(arguments: RunAndOverrides, files: Files, root: Root = None, as_json: AsJson = False) -> None:
    """Score a Parquet log of (user, candidates); run again to go on where it stopped."""
    end(as_json, run_score(score_config(arguments, files, root)))


def score_config(arguments: list[str], files: Files, root: str | None) -> RunConfig:
    """Read the configuration; a word that is no override names the run."""
    overrides = [argument for argument in arguments if "=" in argument]
    names = [argument for argument in arguments if "=" not in argument]
    if len(names) > 1:
        raise ConfigError(Fault("RUN", f"got {len(names)} names: {names}", "one"))
    given = [f"train.run={json.dumps(name, ensure_ascii=False)}" for name in names]
    return load(files, [*overrides, *given], root)


def run_score(config: RunConfig) -> dict[str, object]:
    """Score, show what came of it, and return that for a machine."""
    from dti_ray.cluster import connect
    from dti_ray.data.ray_jobs import Watch, peak_rss_mb
    from dti_ray.score.job import run_job
    from dti_ray.score.plan import plan

    storage = Storage(config.storage.root)
    job = plan(config, storage)  # what is wrong is told before Ray is started
    storage.check_writable()
    workers = config.score.workers or config.cluster.workers
    connect(config.cluster.model_copy(update={"workers": workers}))
    started = time.monotonic()
    with Bar("looking at the requests", None) as bar:
        watch = Watch(lambda stage, done, total: bar.stage(STAGES[stage], done, total))
        scores = run_job(job, watch)
    seconds = time.monotonic() - started
    show_scores(scores.folder, scores.rows, scores.pairs, scores.counts)
    speed = _speed(scores, seconds)
    result = {
        "name": config.score.name,
        "rows": scores.rows,
        "pairs": scores.pairs,
        "counts": dict(scores.counts),
        "units": len(scores.files),
        "fresh_units": scores.fresh_units,
        "workers": workers,
        "seconds": round(seconds, 2),
        "pairs_per_s": speed,
        "driver_rss_mb": round(peak_rss_mb(), 1),
        "worker_rss_mb": round(watch.worker_rss_mb, 1) or None,
        "manifest": storage.display(scores.folder, MANIFEST),
    }
    _say(result)
    return result


def _speed(scores: Scores, seconds: float) -> float | None:
    """Return pairs per second, where all of them were scored now."""
    return round(scores.pairs / seconds, 1) if scores.fresh_units == len(scores.files) > 0 else None


def _say(result: dict[str, object]) -> None:
    if not result["fresh_units"]:
        console.print("complete already: nothing was done but to check its files")
        return
    speed = "" if result["pairs_per_s"] is None else f", {result['pairs_per_s']:,.0f} pairs/s"
    console.print(
        f"{result['seconds']:,.1f} s{speed}, {result['fresh_units']} of {result['units']} files written; "
        f"largest driver {result['driver_rss_mb']:,.0f} MB, largest worker {result['worker_rss_mb'] or 0:,.0f} MB"
    )
