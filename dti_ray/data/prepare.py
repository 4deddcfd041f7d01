"""The job that turns a raw log into a data set: read, check, group by user, write.

Stage: sources → checks → interactions, over Ray Data. In: a `RunConfig` and the storage root; Ray must be
running. Out: the opened `Dataset`.
Invariants: the data set is a function of the raw rows and the `data` section alone, byte for byte, whatever
the number of workers and the order in which they finish, and whether a task runs once or twice; it is visible
only once its manifest is written, last; an existing data set is never changed.

    count     one task per log         → rows, and from them the number of partitions P
    scatter   one task per log         → checked rows as scratch files, batch p = users with crc32(user_id) mod P = p
    gather    one task per partition p → batch p of every scratch file: one shard, what it refuses to quarantine
"""

# pyarrow.compute makes its functions at run time, where no type checker sees them.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import io
import json
import logging
import math
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray.data
from numpy.typing import NDArray
from pyarrow import ipc
from pyarrow import parquet as pq
from ray.exceptions import RayTaskError

from dti_ray.config.schema import DataConfig, RunConfig
from dti_ray.data.checks import INTERACTIONS, QUARANTINE, check, item_table
from dti_ray.data.interactions import (
    ITEMS_FILE,
    SPLITS,
    Boundaries,
    Dataset,
    Segment,
    dataset_folder,
    global_boundaries,
    open_dataset,
    sequences,
    write_shard,
)
from dti_ray.data.sources import movielens
from dti_ray.data.sources.movielens import RawLog
from dti_ray.errors import DtiRayError, Fault, InputError, StorageError
from dti_ray.storage import FileEntry, Storage

logger = logging.getLogger(__name__)

SCRATCH = "scratch"
# Checked rows: a good one has the columns of `INTERACTIONS`, a refused one `refused_*` and a reason.
REFUSED = {"user_id": "user_id", **{name: f"refused_{name}" for name in ("item_id", "label", "time")}}


@dataclass(frozen=True)
class Part:
    """What a task wrote for one partition of the users."""

    partition: int
    files: list[FileEntry]
    segments: list[Segment]
    clicks: int
    quarantined: dict[str, int]


def prepare(config: RunConfig, storage: Storage) -> Dataset:
    """Make the data set that `config.data` describes, or open it if it is there already.

    Args:
        config: only its `data` section matters.
        storage: the root; every node of the cluster must reach it.

    Raises:
        InputError: raw files, columns or good rows are missing, or a data set of that name was prepared with
            another `data` section.
        StorageError: the root cannot be read or written.
    """
    data, folder = config.data, dataset_folder(config.data.name)
    existing = _existing(data, storage)
    if existing is not None:
        logger.info("%s is complete already", storage.display(folder))
        return existing
    raw = movielens.locate(data, storage)
    items = item_table(movielens.read_items(raw.storage, raw.catalogue))
    storage.delete(folder)  # what a broken attempt left there
    with _ray_data():
        parts = _write_parts(raw, items["item_id"].combine_chunks(), data, storage)
    dataset = _summary(parts, len(items), data, storage)
    if not dataset.interactions:
        raise _no_good_rows(dataset)
    written = storage.write(f"{folder}/{ITEMS_FILE}", _parquet(items))
    files = [FileEntry(ITEMS_FILE, written.size_bytes, written.sha256)]
    storage.write_manifest(folder, files + [file for part in parts for file in part.files], dataset.manifest())
    logger.info("%s: %d interactions of %d users", storage.display(folder), dataset.interactions, dataset.users)
    return open_dataset(storage, data.name)


def _existing(data: DataConfig, storage: Storage) -> Dataset | None:
    folder = dataset_folder(data.name)
    if storage.read_manifest(folder) is None:
        return None
    dataset = open_dataset(storage, data.name)
    asked, stored = data.model_dump(mode="json"), dataset.data_config
    faults = [
        Fault(
            f"data.{key}",
            f"got {asked.get(key)!r}",
            f"{stored.get(key)!r} as in {storage.display(folder)}",
            "choose another data.name",
        )
        for key in sorted(asked.keys() | stored.keys())
        if asked.get(key) != stored.get(key)
    ]
    if faults:
        raise InputError(*faults)
    return dataset


def _write_parts(raw: RawLog, item_ids: pa.Array, data: DataConfig, storage: Storage) -> list[Part]:
    """Run the three Ray Data jobs; between them, rows lie in storage and not in Ray's object store."""
    logs = len(raw.logs)
    rows = sum(row["rows"] for row in _run(partial(_count, raw=raw), logs))
    if not rows:
        return []
    partitions = math.ceil(rows / data.shard_interactions)
    logger.info("%d rows counted; grouping them by user into %d shards", rows, partitions)
    given = {"item_ids": item_ids, "data": data, "storage": storage}
    blocks = _run(partial(_scatter, raw=raw, partitions=partitions, **given), logs)
    files = sorted(block["file"] for block in blocks)
    boundaries = _boundaries((block["times"] for block in blocks), data)
    parts = _run(partial(_gather, files=files, boundaries=boundaries, **given), partitions)
    storage.delete(f"{dataset_folder(data.name)}/{SCRATCH}")
    return sorted((_parse(row["part"]) for row in parts), key=lambda part: part.partition)


def _run(task: Callable[[int], list[dict[str, Any]]], count: int) -> list[dict[str, Any]]:
    """Run `task(0)` to `task(count - 1)` as one Ray Data job; return their rows, in any order.

    Ray may run a task again, even while its first attempt still runs: it must write the same files.
    """
    numbers = ray.data.range(count, override_num_blocks=count)
    try:
        return numbers.flat_map(lambda row: task(row["id"])).take_all()
    except RayTaskError as error:
        if isinstance(error.cause, DtiRayError):
            raise error.cause from None
        raise


def _count(log: int, raw: RawLog) -> list[dict[str, Any]]:
    return [{"rows": sum(len(batch) for batch in raw.batches(raw.logs[log]))}]


def _scatter(
    log: int, raw: RawLog, partitions: int, item_ids: pa.Array, data: DataConfig, storage: Storage
) -> list[dict[str, Any]]:
    """Write the rows of a log as scratch files, each named by its place in the log; return one row per file."""
    written = []
    for number, rows in enumerate(_checked_blocks(raw, raw.logs[log], item_ids, data)):
        file = f"{dataset_folder(data.name)}/{SCRATCH}/{log:05d}-{number:05d}.arrow"
        storage.write(file, _by_partition(rows, partitions))
        times = rows["time"].drop_null().to_numpy() if data.split == "global_time" else np.zeros(0, np.int64)
        written.append({"file": file, "times": times.tobytes()})
    return written


def _checked_blocks(raw: RawLog, log: str, item_ids: pa.Array, data: DataConfig) -> Iterator[pa.Table]:
    """Yield a log's checked rows in blocks of about one shard, which the gathering task must hold too."""
    held: list[pa.Table] = []
    for batch in raw.batches(log):
        held.append(_check(pa.table(batch), data, item_ids))
        if sum(map(len, held)) >= data.shard_interactions:
            yield pa.concat_tables(held)
            held = []
    if sum(map(len, held)):
        yield pa.concat_tables(held)


def _check(rows: pa.Table, data: DataConfig, item_ids: pa.Array) -> pa.Table:
    """Check some rows; good and refused ones leave together, told apart by `reason`."""
    good, bad = check(rows, data, item_ids)
    refused = bad.rename_columns([REFUSED.get(name, name) for name in bad.column_names])
    return pa.concat_tables([good, refused], promote_options="default")


def _by_partition(rows: pa.Table, partitions: int) -> bytes:
    """Return an Arrow file whose record batch p holds the rows of partition p, in their order."""
    partition = _partition(rows["user_id"], partitions)
    order = np.argsort(partition, kind="stable")
    starts = np.searchsorted(partition[order], np.arange(partitions + 1))
    (ordered,) = rows.combine_chunks().take(pa.array(order)).combine_chunks().to_batches()
    sink = pa.BufferOutputStream()
    with ipc.new_file(sink, rows.schema, options=ipc.IpcWriteOptions(compression="zstd")) as writer:
        for start, stop in pairwise(starts.tolist()):
            writer.write_batch(ordered.slice(start, stop - start))
    return sink.getvalue().to_pybytes()


def _partition(user_ids: pa.ChunkedArray, partitions: int) -> NDArray[np.int32]:
    """Return the partition of each row: the same for all rows of a user, in every process."""
    user = pc.fill_null(user_ids, "").combine_chunks().dictionary_encode()
    of_user = [zlib.crc32(name.encode()) % partitions for name in user.dictionary.to_pylist()]
    return np.array(of_user, np.int32)[user.indices.to_numpy()]


def _boundaries(times: Iterable[bytes], data: DataConfig) -> Boundaries | None:
    """Find the boundaries from all valid times (8 bytes each), for the split that needs them."""
    if data.split != "global_time":
        return None
    merged = np.frombuffer(b"".join(times), np.int64)
    return global_boundaries(merged, data) if len(merged) else Boundaries(0, 0)


def _gather(
    partition: int,
    files: list[str],
    item_ids: pa.Array,
    data: DataConfig,
    storage: Storage,
    boundaries: Boundaries | None,
) -> list[dict[str, Any]]:
    """Write the shard and the quarantine of one partition; return one row that says what was written."""
    rows = pa.Table.from_batches([_read_batch(storage, file, partition) for file in files])
    part = _write_part(partition, rows, item_ids, data, storage, boundaries)
    return [{"part": json.dumps(asdict(part))}]


def _read_batch(storage: Storage, file: str, number: int) -> pa.RecordBatch:
    try:
        with storage.filesystem.open_input_file(storage.path(file)) as source, ipc.open_file(source) as batches:
            return batches.get_batch(number)
    except (OSError, pa.ArrowInvalid) as error:
        problem, hint = f"cannot be read: {' '.join(str(error).split())}", "run `dti-ray prepare` again"
        raise StorageError(Fault(storage.display(file), problem, hint=hint)) from error


def _write_part(
    partition: int,
    rows: pa.Table,
    item_ids: pa.Array,
    data: DataConfig,
    storage: Storage,
    boundaries: Boundaries | None,
) -> Part:
    folder = dataset_folder(data.name)
    is_good = pc.is_null(rows["reason"])
    good = rows.filter(is_good).select(INTERACTIONS.names).cast(INTERACTIONS)
    bad = rows.filter(pc.invert(is_good)).select([*REFUSED.values(), "reason"]).rename_columns(QUARANTINE.names)
    users, refused = sequences(good, item_ids, data, boundaries)
    quarantine = pa.concat_tables([bad.cast(QUARANTINE), refused])
    quarantine = quarantine.sort_by([(name, "ascending") for name in QUARANTINE.names])
    files, segments, clicks = [], [], 0
    if len(users):
        shard = f"interactions/part-{partition:05d}.parquet"
        file, segments = write_shard(storage, folder, shard, users, data.segment_interactions)
        files.append(file)
        clicks = int(pc.sum(pc.list_flatten(users["labels"])).as_py())
    if len(quarantine):
        path = f"quarantine/part-{partition:05d}.parquet"
        written = storage.write(f"{folder}/{path}", _parquet(quarantine))
        files.append(FileEntry(path, written.size_bytes, written.sha256))
    reasons = dict(sorted(Counter(quarantine["reason"].to_pylist()).items()))
    return Part(partition, files, segments, clicks, reasons)


def _parse(text: str) -> Part:
    tree = json.loads(text)
    files = [FileEntry(**file) for file in tree["files"]]
    segments = [Segment.parse(segment) for segment in tree["segments"]]
    return Part(tree["partition"], files, segments, tree["clicks"], tree["quarantined"])


def _summary(parts: list[Part], items: int, data: DataConfig, storage: Storage) -> Dataset:
    segments = tuple(segment for part in parts for segment in part.segments)
    interactions = sum(segment.interactions for segment in segments)
    quarantined: Counter[str] = Counter()
    for part in parts:
        quarantined.update(part.quarantined)
    train, valid, test = (sum(segment.targets[split] for segment in segments) for split in range(len(SPLITS)))
    return Dataset(
        storage=storage,
        name=data.name,
        users=sum(segment.users for segment in segments),
        interactions=interactions,
        items=items,
        label_rate=sum(part.clicks for part in parts) / max(interactions, 1),
        targets=(train, valid, test),
        quarantined=dict(sorted(quarantined.items())),
        segments=segments,
        data_config=data.model_dump(mode="json"),
    )


def _no_good_rows(dataset: Dataset) -> InputError:
    counts = ", ".join(f"{count} {reason}" for reason, count in dataset.quarantined.items())
    where = dataset.storage.display(dataset.folder)
    hint = f"the refused rows are in {where}/quarantine" if counts else ""
    problem = f"no interaction is left; quarantined: {counts or 'none, the raw files hold no row'}"
    return InputError(Fault(where, problem, hint=hint))


def _parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return sink.getvalue().to_pybytes()


@contextmanager
def _ray_data() -> Iterator[None]:
    """Run Ray Data without its bars and messages, and let an error of ours come back as itself.

    Ray Data takes the trace off what goes wrong inside it, and only logs it: here it is put back, as a note.
    Its log files are left as they are.
    """
    context, log = ray.data.DataContext.get_current(), logging.getLogger("ray.data")
    before = (context.enable_progress_bars, context.raise_original_map_exception)
    context.enable_progress_bars, context.raise_original_map_exception = False, True
    consoles = [handler for handler in log.handlers if isinstance(handler, logging.StreamHandler)]
    trace = io.StringIO()
    kept = logging.StreamHandler(trace)
    kept.setLevel(logging.ERROR)
    log.handlers = [kept, *(handler for handler in log.handlers if handler not in consoles)]
    try:
        yield
    except Exception as error:
        if not isinstance(error, DtiRayError):
            error.add_note(trace.getvalue())
        raise
    finally:
        log.handlers = [*consoles, *(handler for handler in log.handlers if handler is not kept)]
        context.enable_progress_bars, context.raise_original_map_exception = before
