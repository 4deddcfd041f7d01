"""The job that scores a log: requests to their users' partitions, histories read there, scores written, nothing lost.

Stage: top of batch scoring, over Ray Data. In: a `RunConfig` and the storage root; Ray must be running. Out: `Scores`.
Invariants: shards are a function of the log, the model, the data set and the `score` section alone, whatever the number
of actors and the order in which they finish, and whether a unit runs once or twice; rows in are rows out, or the job
fails; scores are complete once their manifest is written; a name stays with what it was begun with.

    scatter   one task per piece of the log → requests as scratch files; batch p: users with crc32(id) mod P = p
    units     partition p of so many scratch files that it has `score.unit_pairs` pairs, about
    score     one actor call per unit       → scores/part-00000.parquet; scratch/unit-00000.json holds size and hash

    scores/<name>/  manifest.json  scores/part-*.parquet  scratch/ (until the manifest is written)
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace

import ray
from ray.util.metrics import Counter as RayCounter
from ray.util.metrics import Gauge

from dti_ray.config import RunConfig
from dti_ray.data.attempt import run_missing
from dti_ray.data.clock import unit_of_parts
from dti_ray.data.ray_jobs import Actors, Tree, Watch
from dti_ray.errors import DamagedError, Fault, IncompleteError, InputError
from dti_ray.score.plan import SCHEMA_VERSION, Inputs, Job, plan
from dti_ray.score.scatter import Scattered, scatter
from dti_ray.score.scorer import Scorer, cut_units
from dti_ray.score.unit import COUNTS
from dti_ray.storage import FileEntry, Storage
from dti_ray.telemetry.series import RUN, SCORING
from dti_ray.telemetry.sinks import SeriesSink, series_tags

logger = logging.getLogger(__name__)

SHOWN = 10  # of the things in which two jobs of one name differ


@dataclass(frozen=True)
class Scores:
    """Complete scores, as their manifest describes them.

    Attributes:
        storage: the root.
        folder: path below it.
        rows: in and out.
        pairs: of user and candidate.
        counts: what the policies did, by `unit.COUNTS`.
        files: with sizes and hashes, one per unit of work.
        fresh_units: that this call scored; the others were there.
    """

    storage: Storage
    folder: str
    rows: int
    pairs: int
    counts: Mapping[str, int]
    files: tuple[FileEntry, ...]
    fresh_units: int = 0


def score(config: RunConfig, storage: Storage, watch: Watch | None = None) -> Scores:
    """Score the log that `config.score` describes, or go on with it, or open what is complete.

    Args:
        config: `score`, `train.run`, `cluster`, and `data.time_unit` and `data.time_zone` for times of the log.
        storage: the root; every node of the cluster must reach it, and the log.
        watch: told of progress.

    Raises:
        InputError: the log, the model or the data set is not usable, a policy says fail, or the name stands for
            something else.
        StorageError: something cannot be read or written; a second attempt goes on where this one stopped.
        IncompleteError: rows out are not rows in.
    """
    return run_job(plan(config, storage), watch or Watch())


def run_job(job: Job, watch: Watch) -> Scores:
    """Do what was planned, or what is left of it; see `score`."""
    storage = job.storage
    existing = open_scores(storage, job.config.score.name)
    if existing is not None:
        scores, begun = existing
        _refuse_other(job, begun)
        storage.verify(job.folder, scores.files)
        storage.delete(job.scratch)  # where an attempt died between its manifest and this
        return scores
    _begin(job)
    found = _scatter(job, watch)
    trees, fresh = _score(job, _scorer(job, found), watch)
    return replace(_complete(job, found, trees), fresh_units=fresh)


def open_scores(storage: Storage, name: str) -> tuple[Scores, Inputs] | None:
    """Return complete scores and what they were made of; None where there are none.

    Raises:
        StorageError: the manifest is damaged.
    """
    folder = f"scores/{name}"
    found = storage.read_manifest(folder)
    if found is None:
        return None
    files, body = found
    return Scores(storage, folder, body["rows_out"], body["pairs"], body["counts"], tuple(files)), body["inputs"]


def _begin(job: Job) -> None:
    """Note what the job is made of; refuse to go on with one that was begun otherwise."""
    path, storage = f"{job.scratch}/inputs.json", job.storage
    if storage.exists(path):
        _refuse_other(job, json.loads(storage.read(path)))
    else:
        storage.delete(job.folder)  # what stands there without this file belongs to nobody
        storage.write(path, json.dumps(job.inputs).encode())


def _refuse_other(job: Job, begun: Inputs) -> None:
    asked = json.loads(json.dumps(job.inputs))  # as `begun` came back: tuples are lists
    faults = [
        Fault(key, f"got {asked.get(key)!r}", f"{begun.get(key)!r} as in {job.storage.display(job.folder)}")
        for key in sorted(begun.keys() | asked.keys())
        if begun.get(key) != asked.get(key)
    ]
    if faults:
        hint = "choose another score.name, or delete that folder:"
        taken = Fault(f"score.name={job.config.score.name}", "was begun with something else", hint=hint)
        raise InputError(taken, *faults[:SHOWN])


def _scatter(job: Job, watch: Watch) -> list[Scattered]:
    """Lay the log into scratch files.

    Raises:
        IncompleteError: other rows were read than the files' ends tell of.
    """
    rules, log, storage, scratch, partitions = job.rules, job.log, job.storage, job.scratch, job.partitions
    known = ray.put(job.model.item_ids())

    def task(number: int) -> Tree:
        return asdict(scatter(number, log.pieces[number], rules, ray.get(known), partitions, storage, scratch))

    trees = run_missing(task, len(log.pieces), "rows", scratch, storage, watch)
    found = [Scattered(**tree) for tree in trees]
    rows = sum(one.rows for one in found)
    if rows != log.rows:
        hint = "the log changed while it was read; choose another score.name"
        raise IncompleteError(Fault(job.config.score.input or "", f"{rows:,} rows were read", f"{log.rows:,}", hint))
    return found


def _scorer(job: Job, found: Sequence[Scattered]) -> Scorer:
    per_second = unit_of_parts(found, job.config.data)
    blocks = tuple(block for one in found for block in one.blocks)
    weights = [of_block for one in found for of_block in one.weights]
    units = cut_units(weights, job.partitions, job.config.score.unit_pairs)
    return Scorer(job, tuple(units), blocks, per_second)


def _score(job: Job, scorer: Scorer, watch: Watch) -> tuple[list[Tree], int]:
    """Score units but for those whose shards lie there as written; return all states, and how many are new."""
    cluster, storage, total = job.config.cluster, job.storage, len(scorer.units)
    count = min(job.config.score.workers or cluster.workers, max(total, 1))
    actors = Actors(count, cluster.cpus_per_worker, cluster.gpus_per_worker)

    def is_there(state: Tree) -> bool:
        try:
            storage.verify(job.folder, [FileEntry(**state["file"])])
        except DamagedError as error:
            logger.warning("%s: it is scored again", error)
            return False
        return True

    fresh = 0
    tags = series_tags(job.model.identity["run"], None, job.dataset)
    with closing(SeriesSink(Gauge, RayCounter, tags, SCORING)) as series:

        def show(stage: str, done: int, left: int) -> None:
            nonlocal fresh
            fresh = left
            series.add(RUN, {"scored_units": (total - left + done) / total})
            watch.show(stage, done, left)

        units = Watch(show)
        trees = run_missing(scorer, total, "unit", job.scratch, storage, units, is_there, actors)
    watch.measure(units.worker_rss_mb)
    return trees, fresh


def _complete(job: Job, found: Sequence[Scattered], trees: Sequence[Tree]) -> Scores:
    """Count once more, write the manifest, last, and drop the scratch files.

    Raises:
        IncompleteError: rows or pairs out are not those that went in.
    """
    storage, folder, name = job.storage, job.folder, job.config.score.name
    counts: Counter[str] = Counter(dict.fromkeys(COUNTS, 0))
    for tree in trees:
        counts.update(tree["counts"])
    rows_out, pairs = sum(tree["rows"] for tree in trees), sum(one.pairs for one in found)
    pairs_out = counts["pairs_scored"] + counts["pairs_null"]
    if rows_out != job.log.rows or pairs_out != pairs:
        problem, expected = f"{rows_out:,} rows, {pairs_out:,} pairs", f"{job.log.rows:,} rows, {pairs:,} pairs"
        raise IncompleteError(Fault(storage.display(folder), problem, expected, "delete the folder and score again"))
    files = [FileEntry(**tree["file"]) for tree in trees]
    body = {
        "schema_version": SCHEMA_VERSION,
        "rows_in": job.log.rows,
        "rows_out": rows_out,
        "pairs": pairs,
        "counts": dict(counts),
        "policies": {
            key: getattr(job.config.score, key) for key in ("no_history", "unknown_item", "unknown_in_history")
        },
        "model": job.model.identity,
        "dataset": job.dataset,
        "config_hash": hashlib.sha256(json.dumps(job.inputs, sort_keys=True).encode()).hexdigest()[:16],
        "rows": [tree["rows"] for tree in trees],
        "inputs": job.inputs,
    }
    storage.write_manifest(folder, files, body)
    storage.delete(job.scratch)
    logger.info("%s: %d rows, %d pairs", storage.display(folder), rows_out, pairs)
    opened = open_scores(storage, name)
    assert opened is not None  # it was just written
    return opened[0]
