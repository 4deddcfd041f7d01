"""Second half of `prepare`: the scratch rows of one partition become one shard, and its refused rows a quarantine file.

Stage: prepare, inside Ray tasks. In: scratch files of `scatter`. Out: a shard, a quarantine file and a `Part` that says
what is in them; counts of times, for `split: global_time`.
Invariant: a shard depends on the good rows of its users alone, byte for byte, in whatever files they lay and in
whatever order they were read.

    record batch 2 of every scratch file → interactions/part-00002.parquet, quarantine/part-00002.parquet
"""

# pyarrow.compute makes its functions at run time, where no type checker sees them.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import ipc
from pyarrow import parquet as pq

from dti_ray.config.data import DataConfig
from dti_ray.data.checks import INTERACTIONS, REFUSED, TEXTS
from dti_ray.data.interactions import Segment, log2_histogram, segment_columns, segments_of, shard_name, write_shard
from dti_ray.data.scatter import REFUSED_AS, ROWS
from dti_ray.data.sequences import Boundaries, sequences
from dti_ray.errors import Fault, StorageError
from dti_ray.storage import FileEntry, Storage

QUARANTINE = pa.schema(
    [*((name, pa.string()) for name in TEXTS), ("reason", pa.string()), ("file", pa.string()), ("row", pa.int64())]
)


@dataclass(frozen=True)
class Part:
    """What a task wrote for one partition of the users.

    Attributes:
        files: what it wrote, relative to the data set's folder.
        segments: row groups of its shard.
        clicks: interactions with label 1.
        quarantined: reason → rows.
        user_lengths: `log2_histogram` of its users' lengths.
    """

    files: list[FileEntry]
    segments: list[Segment]
    clicks: int
    quarantined: dict[str, int]
    user_lengths: tuple[int, ...]

    def tree(self) -> dict[str, Any]:
        """Return what `parse` reads back from JSON."""
        return {**asdict(self), "segments": segment_columns(self.segments)}

    @classmethod
    def parse(cls, tree: dict[str, Any]) -> Part:
        """Return the part of which `tree` made a tree."""
        files = [FileEntry(**file) for file in tree["files"]]
        lengths = tuple(tree["user_lengths"])
        return cls(**{**tree, "files": files, "segments": list(segments_of(tree["segments"])), "user_lengths": lengths})


@dataclass(frozen=True)
class Gathering:
    """What all partitions share.

    Attributes:
        files: names of the raw files, as a user would type them; rows refer to them by number.
        blocks: scratch files, in the order of pieces and rows.
        per_second: what the log's times are divided by.
        segment_interactions: a segment has at least so many, but for the last one of a shard.
        boundaries: of `split: global_time`.
    """

    files: tuple[str, ...]
    blocks: tuple[str, ...]
    per_second: int
    segment_interactions: int
    boundaries: Boundaries | None = None


def gather(partition: int, job: Gathering, item_ids: pa.Array, data: DataConfig, storage: Storage, folder: str) -> Part:
    """Write the shard and the quarantine of one partition."""
    rows = pa.Table.from_batches([read_batch(storage, block, partition) for block in job.blocks], ROWS)
    is_good = pc.is_null(rows["reason"])
    good = rows.filter(is_good).select(INTERACTIONS.names)
    bad = rows.filter(pc.invert(is_good)).select([REFUSED_AS.get(name, name) for name in REFUSED.names])
    del rows
    users, refused = sequences(good, item_ids, data, job.per_second, job.boundaries)
    del good
    quarantine = named(pa.concat_tables([bad.rename_columns(REFUSED.names), refused]), job.files)
    files, segments = [], []
    if len(users):
        file, segments = write_shard(storage, folder, shard_name(partition), users, job.segment_interactions)
        files.append(file)
    if len(quarantine):
        files.append(write_parquet(storage, folder, f"quarantine/part-{partition:05d}.parquet", quarantine))
    lengths = pc.list_value_length(users["items"]).to_numpy()
    clicks = int(pc.sum(pc.list_flatten(users["labels"])).as_py() or 0)
    reasons = dict(sorted(Counter(quarantine["reason"].to_pylist()).items()))
    return Part(files, segments, clicks, reasons, log2_histogram(lengths))


def count_times(storage: Storage, block: str, width: int, within: Sequence[int] | None) -> dict[str, list[int]]:
    """Count the good rows of a scratch file by `time // width`.

    Args:
        storage: the root.
        block: a scratch file.
        width: of a bucket, in the log's own unit.
        within: (first time, time after the last) to look at; None: all.
    """
    buckets: Counter[int] = Counter()
    options = ipc.IpcReadOptions(
        included_fields=[ROWS.names.index("time"), ROWS.names.index("reason")], use_threads=False
    )

    def count() -> None:
        buckets.clear()
        with _batches(storage, block, options) as batches:
            for number in range(batches.num_record_batches):
                batch = batches.get_batch(number)
                times = (
                    batch["time"].filter(pc.is_null(batch["reason"])).to_numpy(zero_copy_only=False).astype(np.int64)
                )
                if within is not None:
                    times = times[(times >= within[0]) & (times < within[1])]
                values, counts = np.unique(times // width, return_counts=True)
                buckets.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))

    storage.attempt("read", block, count)
    return {"buckets": list(buckets), "counts": list(buckets.values())}


def read_batch(storage: Storage, block: str, number: int) -> pa.RecordBatch:
    """Return one record batch of a scratch file.

    Raises:
        StorageError: it cannot be read.
    """

    def read() -> pa.RecordBatch:
        with _batches(storage, block) as batches:
            return batches.get_batch(number)

    return storage.attempt("read", block, read)


def named(refused: pa.Table, files: Sequence[str]) -> pa.Table:
    """Return refused rows as `QUARANTINE`, sorted by file and row."""
    refused = refused.sort_by([("file", "ascending"), ("row", "ascending")]).combine_chunks()
    names = pa.array(files, pa.string()).take(_column(refused, "file"))
    return (
        refused.set_column(refused.column_names.index("file"), "file", names).select(QUARANTINE.names).cast(QUARANTINE)
    )


def write_parquet(storage: Storage, folder: str, path: str, table: pa.Table) -> FileEntry:
    """Write a table as one Parquet file; return its entry, relative to `folder`."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    written = storage.write(f"{folder}/{path}", sink.getvalue().to_pybytes())
    return FileEntry(path, written.size_bytes, written.sha256)


@contextmanager
def _batches(
    storage: Storage, block: str, options: ipc.IpcReadOptions | None = None
) -> Iterator[ipc.RecordBatchFileReader]:
    """Open a scratch file; an error names it, and says how to do without it."""
    try:
        with (
            storage.filesystem.open_input_file(storage.path(block)) as source,
            ipc.open_file(source, options=options) as batches,
        ):
            yield batches
    except (pa.ArrowInvalid, FileNotFoundError) as error:
        reason, scratch = " ".join(str(error).split()), storage.display(block.rpartition("/")[0])
        hint = f"delete {scratch} and run the same command"
        raise StorageError(Fault(storage.display(block), f"is missing or damaged: {reason}", hint=hint)) from error


def _column(table: pa.Table, name: str) -> pa.Array:
    return table[name].combine_chunks()
