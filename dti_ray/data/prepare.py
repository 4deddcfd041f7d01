"""The job that turns a raw log into a data set: read, check, group by user, write.

Stage: sources → checks → interactions, over Ray Data. In: a `RunConfig` and the storage root; Ray must be
running. Out: the opened `Dataset`.
Invariants: the data set is a function of the raw rows and the `data` section alone, byte for byte, whatever
the number of workers and the order in which they finish; it is visible only once its manifest is written,
last; an existing data set is never changed.

    read_csv → check, partition = crc32(user_id) mod P → group by partition → one shard each → manifest
"""

# pyarrow.compute makes its functions at run time, where no type checker sees them.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import json
import logging
import math
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray.data
from pyarrow import csv
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
from dti_ray.errors import DtiRayError, Fault, InputError
from dti_ray.storage import FileEntry, Storage

logger = logging.getLogger(__name__)

# One block of checked rows: a good row has the first columns, a refused one `refused_*` and a reason.
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
    """Run the Ray Data job; the checked rows are materialised because their number decides P."""
    try:
        checked = _read(raw, item_ids, data).materialize()
        rows = checked.count()
        if not rows:
            return []
        partitions = math.ceil(rows / data.shard_interactions)
        logger.info("%d rows read; grouping them by user into %d shards", rows, partitions)
        write = partial(
            _write_part, storage=storage, data=data, item_ids=item_ids, boundaries=_boundaries(checked, data)
        )
        parted = checked.map_batches(
            partial(_partition, partitions=partitions), batch_format="pyarrow", batch_size=None
        )
        grouped = parted.groupby("partition", num_partitions=partitions)
        written = grouped.map_groups(write, batch_format="pyarrow")
        parts = [_parse(row["part"]) for row in written.take_all()]
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, DtiRayError):
            raise cause from None
        raw.check_readable()  # names the line that Ray Data's message leaves out
        raise
    return sorted(parts, key=lambda part: part.partition)


def _read(raw: RawLog, item_ids: pa.Array, data: DataConfig) -> ray.data.Dataset:
    rows = ray.data.read_csv(
        [raw.storage.path(log) for log in raw.logs],
        filesystem=raw.storage.filesystem,
        partitioning=None,  # pyright: ignore[reportArgumentType] - a folder `a=b` is no column
        read_options=csv.ReadOptions(use_threads=False),
        parse_options=raw.parse_options(),
        convert_options=raw.convert_options(),
    )
    checked = partial(_check, columns=raw.columns, data=data, item_ids=item_ids)
    return rows.map_batches(checked, batch_format="pyarrow", batch_size=None)


def _check(rows: pa.Table, columns: Mapping[str, str], data: DataConfig, item_ids: pa.Array) -> pa.Table:
    """Check one block; good and refused rows leave together, told apart by `reason`."""
    raw = rows.rename_columns([columns[name] for name in rows.column_names])
    good, bad = check(raw, data, item_ids)
    refused = bad.rename_columns([REFUSED.get(name, name) for name in bad.column_names])
    return pa.concat_tables([good, refused], promote_options="default")


def _partition(rows: pa.Table, partitions: int) -> pa.Table:
    """Add the partition of each row: the same for all rows of a user, in every process."""
    user = pc.fill_null(rows["user_id"], "").combine_chunks().dictionary_encode()
    of_user = [zlib.crc32(name.encode()) % partitions for name in user.dictionary.to_pylist()]
    return rows.append_column("partition", pa.array(of_user, pa.int32()).take(user.indices))


def _boundaries(checked: ray.data.Dataset, data: DataConfig) -> Boundaries | None:
    """Bring all valid times to the driver (8 bytes each), only for the split that needs them."""
    if data.split != "global_time":
        return None
    batches = checked.select_columns(["time"]).iter_batches(batch_format="pyarrow", batch_size=None)
    times = np.concatenate([batch["time"].drop_null().to_numpy() for batch in batches])
    return global_boundaries(times, data) if len(times) else Boundaries(0, 0)


def _write_part(
    rows: pa.Table, storage: Storage, data: DataConfig, item_ids: pa.Array, boundaries: Boundaries | None
) -> pa.Table:
    """Write the shard and the quarantine of one partition; return one row that says what was written."""
    partition, folder = rows["partition"][0].as_py(), dataset_folder(data.name)
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
    return pa.table({"part": [json.dumps(asdict(Part(partition, files, segments, clicks, reasons)))]})


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
    """Run Ray Data without its bars and logs, and let an error of ours come back as itself."""
    context, log = ray.data.DataContext.get_current(), logging.getLogger("ray.data")
    before = (context.enable_progress_bars, context.raise_original_map_exception, log.level)
    context.enable_progress_bars, context.raise_original_map_exception = False, True
    log.setLevel(logging.CRITICAL)  # what goes wrong comes back as an exception
    try:
        yield
    finally:
        context.enable_progress_bars, context.raise_original_map_exception = before[:2]
        log.setLevel(before[2])
