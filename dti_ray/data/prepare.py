"""The job that turns a raw log into a data set: read, check, group by user, write.

Stage: sources → checks → sequences → interactions, over Ray Data. In: a `RunConfig` and the storage root; Ray must be
running. Out: the opened `Dataset`.
Invariants: the shards are a function of the raw rows and the `data` section alone, byte for byte, whatever the number
of workers and the order in which they finish, and whether a task runs once or twice; the data set is visible only once
its manifest is written; an existing data set is never changed; what a broken attempt finished is not done again.

    scatter   one task per piece of the log → checked rows as scratch files; batch p: users with crc32(id) mod P = p
    gather    one task per partition p      → batch p of every scratch file: one shard, what it refuses to quarantine
"""

# pyarrow.compute makes its functions at run time, where no type checker sees them.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
from ray.util.metrics import Counter as RayCounter
from ray.util.metrics import Gauge

from dti_ray.config import DataConfig, RunConfig
from dti_ray.data import sources
from dti_ray.data.asked import check_same, content_of
from dti_ray.data.attempt import SCRATCH, Attempt, begin
from dti_ray.data.checks import REFUSED, item_table
from dti_ray.data.clock import unit_of_parts
from dti_ray.data.gather import Gathering, Part, count_times, gather, named, write_parquet
from dti_ray.data.interactions import (
    ITEMS_FILE,
    SPLITS,
    Dataset,
    dataset_folder,
    log2_histogram,
    open_dataset,
    verify_dataset,
)
from dti_ray.data.ray_jobs import Tree, Watch
from dti_ray.data.scatter import EXAMPLES, Scattered, collect_items, first_of_each, scatter
from dti_ray.data.sequences import Boundaries, boundary_ranks
from dti_ray.errors import Fault, InputError
from dti_ray.storage import FileEntry, Storage
from dti_ray.telemetry.series import RUN
from dti_ray.telemetry.sinks import SeriesSink, series_tags

logger = logging.getLogger(__name__)

UNREADABLE = "unreadable_file"
COMMONEST = 3  # reasons that the message on too many bad rows quotes
DAY_S = 86_400
SEGMENT = (1_024, 16_384)  # interactions: small ones shuffle better, large ones are read faster
SEGMENTS = 1_000


def prepare(config: RunConfig, storage: Storage, watch: Watch | None = None) -> Dataset:
    """Make the data set that `config.data` describes, or open it if it is there already.

    Args:
        config: only its `data` section matters.
        storage: the root; every node of the cluster must reach it.
        watch: told of progress.

    Raises:
        InputError: raw files, columns or good rows are missing, too many rows are bad, units of time are mixed, or a
            data set of that name was prepared with another `data` section.
        StorageError: the root cannot be read or written; a second attempt goes on where this one stopped.
    """
    data, folder = config.data, dataset_folder(config.data.name)
    existing = _existing(data, storage)
    if existing is not None:
        logger.info("%s is complete already", storage.display(folder))
        return existing
    raw = sources.locate(data, storage)
    items = None
    if raw.read_catalogue is not None:
        items = item_table(raw.storage.attempt("read", raw.catalogue[0], raw.read_catalogue))
    attempt = Attempt(data, storage, raw, raw.pieces(), watch or Watch())
    begin(attempt, items)
    if items is None:
        items = item_table(_collect_items(attempt))
    shared = ray.put(items["item_id"].combine_chunks())
    with closing(SeriesSink(Gauge, RayCounter, series_tags("", None, data.name))) as series:
        found, bad_files = _scatter(attempt, shared)
        series.add(RUN, {"quarantined_rows": sum(sum(one.refused.values()) for one in found)})
        _check_bad_fraction(found, data, storage)
        job = _gathering(attempt, found)
        partitions = _partitions(attempt)

        def task(partition: int) -> Tree:
            return gather(partition, job, ray.get(shared), data, storage, folder).tree()

        parts = [Part.parse(tree) for tree in attempt.run(task, partitions, "shard")] if job.blocks else []
        return _complete(attempt, items, parts, bad_files)


def _existing(data: DataConfig, storage: Storage) -> Dataset | None:
    folder = dataset_folder(data.name)
    if storage.read_manifest(folder) is None:
        return None
    dataset = open_dataset(storage, data.name)
    check_same(data, dataset)
    verify_dataset(dataset)
    storage.delete(f"{folder}/{SCRATCH}")  # where an attempt died between its manifest and this
    return dataset


def _collect_items(attempt: Attempt) -> pa.Table:
    """Collect the items that the log itself names, each with the texts of its first row."""
    raw, storage, pieces, scratch = attempt.raw, attempt.storage, attempt.pieces, attempt.scratch

    def task(number: int) -> Tree:
        name = f"items-{number:05d}.parquet"
        try:
            write_parquet(storage, scratch, name, collect_items(pieces[number], raw))
        except InputError:  # scatter meets the same file and says so, or leaves it out
            return {"file": ""}
        return {"file": f"{scratch}/{name}"}

    written = [tree["file"] for tree in attempt.run(task, len(pieces), "items")]
    tables = [pa.parquet.read_table(pa.BufferReader(storage.read(file))) for file in written if file]
    return first_of_each(pa.concat_tables(tables)) if tables else pa.table({name: [] for name in raw.item_columns})


def _partitions(attempt: Attempt) -> int:
    return max(1, math.ceil(_expected_rows(attempt) / attempt.data.shard_interactions))


def _expected_rows(attempt: Attempt) -> float:
    return sum(piece.rows for piece in attempt.pieces) * (attempt.data.user_fraction or 1)


def _scatter(attempt: Attempt, item_ids: ray.ObjectRef[pa.Array]) -> tuple[list[Scattered], dict[int, str]]:
    """Check all pieces; return what was found in readable files, and file → what is wrong with an unreadable one."""
    raw, data, storage, pieces, scratch = attempt.raw, attempt.data, attempt.storage, attempt.pieces, attempt.scratch
    partitions = _partitions(attempt)

    def task(number: int) -> Tree:
        return asdict(scatter(number, pieces[number], raw, ray.get(item_ids), data, partitions, storage, scratch))

    found = [Scattered(**tree) for tree in attempt.run(task, len(pieces), "rows")]
    bad_files = {piece.file: one.problem for piece, one in zip(pieces, found, strict=True) if one.problem}
    kept = [one for piece, one in zip(pieces, found, strict=True) if piece.file not in bad_files]
    for problem in bad_files.values():
        logger.warning("left out: %s", problem)
    return kept, bad_files


def _check_bad_fraction(found: Sequence[Scattered], data: DataConfig, storage: Storage) -> None:
    """Stop where more rows are malformed than `data.max_bad_fraction` allows."""
    rows, refused = sum(one.rows for one in found), Counter[str]()
    examples: dict[str, list[str]] = {}
    for one in found:
        refused.update(one.refused)
        for reason, quotes in one.examples.items():
            examples.setdefault(reason, []).extend(quotes)
    bad = refused.total()
    if rows and bad > data.max_bad_fraction * rows:
        reasons = "; ".join(
            f"{reason} {count:,} times, such as {', '.join(examples[reason][:EXAMPLES])}"
            for reason, count in refused.most_common(COMMONEST)
        )
        problem = f"{bad:,} of {rows:,} rows are bad ({bad / rows:.1%}): {reasons}"
        expected = f"at most {data.max_bad_fraction:.1%} (data.max_bad_fraction)"
        raise InputError(
            Fault(storage.display(dataset_folder(data.name)), problem, expected, "mend the log or the mapping")
        )


def _gathering(attempt: Attempt, found: Sequence[Scattered]) -> Gathering:
    """Decide what all partitions must know: the log's unit of time, and where the splits part."""
    per_second = unit_of_parts(found, attempt.data)
    names = tuple(attempt.raw.storage.display(file) for file in attempt.raw.files)
    blocks = tuple(block for one in found for block in one.blocks)
    boundaries = None
    if attempt.data.split == "global_time" and any(one.kinds for one in found):
        boundaries = _boundaries(attempt, blocks, per_second)
    return Gathering(names, blocks, per_second, _segment_interactions(attempt), boundaries)


def _segment_interactions(attempt: Attempt) -> int:
    """Return the least power of two, within `SEGMENT`, that makes about a thousand segments of the log, not more."""
    if attempt.data.segment_interactions is not None:
        return attempt.data.segment_interactions
    least, most = SEGMENT
    wanted = _expected_rows(attempt) / SEGMENTS
    return min(most, max(least, 2 ** math.ceil(math.log2(max(wanted, 1)))))


def _boundaries(attempt: Attempt, blocks: Sequence[str], per_second: int) -> Boundaries:
    """Find the boundary seconds: the days that they lie in first, then the second within."""
    days = _times(attempt, blocks, per_second * DAY_S, None, "days")
    ranks = boundary_ranks(sum(days.values()), attempt.data)
    seconds = []
    for split, rank in zip(SPLITS, ranks, strict=False):
        day, before = _at_rank(days, rank)
        start = day * DAY_S * per_second
        within = _times(attempt, blocks, per_second, (start, start + DAY_S * per_second), f"seconds-{split}")
        seconds.append(_at_rank(within, rank - before)[0])
    return Boundaries(*seconds)


def _times(
    attempt: Attempt, blocks: Sequence[str], width: int, within: tuple[int, int] | None, stage: str
) -> Mapping[int, int]:
    storage = attempt.storage
    trees = attempt.run(lambda number: count_times(storage, blocks[number], width, within), len(blocks), stage)
    total: Counter[int] = Counter()
    for tree in trees:
        total.update(dict(zip(tree["buckets"], tree["counts"], strict=True)))
    return total


def _at_rank(counts: Mapping[int, int], rank: int) -> tuple[int, int]:
    """Return (bucket of the value with that rank, values in earlier buckets)."""
    buckets = sorted(counts)
    ends = np.cumsum([counts[bucket] for bucket in buckets])
    at = int(np.searchsorted(ends, rank, side="right"))
    return buckets[at], int(ends[at]) - counts[buckets[at]]


def _complete(attempt: Attempt, items: pa.Table, parts: Sequence[Part], bad_files: Mapping[int, str]) -> Dataset:
    """Write catalogue and manifest, the latter last, and drop the scratch files."""
    storage, folder = attempt.storage, attempt.folder
    dataset = _summary(parts, items, bad_files, attempt)
    if not dataset.interactions:
        raise _no_good_rows(dataset, list(bad_files.values()))
    files = [write_parquet(storage, folder, ITEMS_FILE, items), *(file for part in parts for file in part.files)]
    if bad_files:
        files.append(_write_bad_files(attempt, bad_files))
    storage.write_manifest(folder, files, dataset.manifest())
    storage.delete(attempt.scratch)
    logger.info("%s: %d interactions of %d users", storage.display(folder), dataset.interactions, dataset.users)
    return open_dataset(storage, attempt.data.name)


def _write_bad_files(attempt: Attempt, bad_files: Mapping[int, str]) -> FileEntry:
    rows = [{"reason": UNREADABLE, "file": file} for file in bad_files]
    names = tuple(attempt.raw.storage.display(file) for file in attempt.raw.files)
    table = named(pa.Table.from_pylist(rows, REFUSED), names)
    return write_parquet(attempt.storage, attempt.folder, "quarantine/files.parquet", table)


def _summary(parts: Sequence[Part], items: pa.Table, bad_files: Mapping[int, str], attempt: Attempt) -> Dataset:
    segments = tuple(segment for part in parts for segment in part.segments)
    interactions = sum(segment.interactions for segment in segments)
    quarantined = Counter({UNREADABLE: len(bad_files)} if bad_files else {})
    lengths: Counter[int] = Counter()
    for part in parts:
        quarantined.update(part.quarantined)
        lengths.update(dict(enumerate(part.user_lengths)))
    train, valid, test = (sum(segment.targets[split] for segment in segments) for split in range(len(SPLITS)))
    return Dataset(
        storage=attempt.storage,
        name=attempt.data.name,
        users=sum(segment.users for segment in segments),
        interactions=interactions,
        items=len(items),
        label_rate=sum(part.clicks for part in parts) / max(interactions, 1),
        targets=(train, valid, test),
        quarantined=dict(sorted(quarantined.items())),
        segments=segments,
        data_config=content_of(attempt.data),
        user_lengths=tuple(lengths[power] for power in range(max(lengths, default=-1) + 1)),
        item_words=_item_words(items),
        partitions=_partitions(attempt),
    )


def _item_words(items: pa.Table) -> tuple[int, ...]:
    """Return the histogram of words and punctuation marks over the catalogue's texts."""
    texts = [name for name in items.column_names if name != "item_id"] or ["item_id"]
    words = sum(pc.count_substring_regex(items[name], r"\w+|[^\w\s]").to_numpy().astype(np.int64) for name in texts)
    return log2_histogram(np.asarray(words))


def _no_good_rows(dataset: Dataset, problems: Sequence[str]) -> InputError:
    counts = ", ".join(f"{count} {reason}" for reason, count in dataset.quarantined.items())
    where = dataset.storage.display(dataset.folder)
    has_rows = any(reason != UNREADABLE for reason in dataset.quarantined)
    hint = f"the refused rows are in {where}/quarantine" if has_rows else "; ".join(problems[:1])
    is_share = dataset.data_config["user_fraction"] is not None
    nothing = "none, no user was drawn (data.user_fraction)" if is_share else "none, the raw files hold no row"
    problem = f"no interaction is left; quarantined: {counts or nothing}"
    return InputError(Fault(where, problem, hint=hint))
