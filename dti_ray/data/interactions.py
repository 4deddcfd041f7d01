"""Users laid down as Parquet segments: a data set, written and read.

Stage: interactions. In: `SEQUENCES`, one row per user (data/sequences makes them). Out: shards and a manifest; from a
complete data set `UserSequences` and the ItemTable.
Invariants: an item is its index in the ItemTable sorted by item_id (as UTF-8 bytes); a segment is a row group of whole
users; a data set is complete if and only if its manifest is there, which holds every file's size and SHA-256.

    user_id items      labels     times      splits         part-00000.parquet: row group 0 = users 0 to 9, ...
    u       [c,a,b,a]  [1,0,1,1]  [3,7,7,9]  [0,0,1,2]      manifest.json: 10 users, 1,031 interactions, targets 820 ...
"""

# pyarrow.compute makes its functions at run time, where no type checker sees them.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pyarrow import parquet as pq

from dti_ray.errors import Fault, InputError, StorageError
from dti_ray.storage import FileEntry, Storage

SPLITS = ("train", "valid", "test")
TRAIN, VALID, TEST = range(3)

Item = TypeVar("Item")

SEQUENCES = pa.schema(
    [
        ("user_id", pa.string()),
        ("items", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.int8())),
        ("times", pa.list_(pa.int64())),
        ("splits", pa.list_(pa.int8())),
    ]
)
SCHEMA_VERSION = 2
ITEMS_FILE = "items.parquet"
FOOTERS = 64  # kept in memory, of the shards that were read last


@dataclass(frozen=True, eq=False)
class UserSequences:
    """Whole users, one after the other: those of user u lie at `offsets[u]:offsets[u + 1]`.

    Attributes:
        user_ids: [U] strings.
        offsets: int64 [U + 1].
        items: int32 [N], index into the ItemTable.
        labels: int8 [N], 0 or 1.
        times: int64 [N], seconds.
        splits: int8 [N], index into `SPLITS`.
    """

    user_ids: NDArray[np.str_]
    offsets: NDArray[np.int64]
    items: NDArray[np.int32]
    labels: NDArray[np.int8]
    times: NDArray[np.int64]
    splits: NDArray[np.int8]

    @classmethod
    def from_table(cls, table: pa.Table) -> UserSequences:
        """Return the users of a table of `SEQUENCES`, in its order; the arrays are read-only views."""
        lists = {name: table[name].combine_chunks() for name in SEQUENCES.names[1:]}
        lengths = pc.list_value_length(lists["items"]).to_numpy(zero_copy_only=False)
        offsets = np.zeros(len(table) + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        flat = {name: values.flatten().to_numpy(zero_copy_only=False) for name, values in lists.items()}
        return cls(np.asarray(table["user_id"].to_pylist(), dtype=np.str_), offsets, **flat)


@dataclass(frozen=True)
class Segment:
    """One row group of one shard: the unit that is read, shuffled and resumed.

    Attributes:
        shard: path relative to the data set's folder.
        row_group: its index in the shard.
        users: users in it, never parts of one.
        interactions: interactions in it.
        targets: interactions of each of `SPLITS`.
    """

    shard: str
    row_group: int
    users: int
    interactions: int
    targets: tuple[int, int, int]


@dataclass(frozen=True)
class Dataset:
    """A complete data set, as its manifest describes it.

    Attributes:
        storage: the root.
        name: folder below `<root>/datasets`.
        users: users in all segments.
        interactions: interactions in all segments.
        items: items of the catalogue, seen or not.
        label_rate: share of label 1.
        targets: interactions of each of `SPLITS`.
        quarantined: refused rows by reason.
        segments: in the order of shards and row groups.
        data_config: the `data` section that it was prepared with.
        user_lengths: entry i counts users of 2^i to 2^(i + 1) - 1 interactions.
        item_words: entry i counts items whose text columns have 2^i to 2^(i + 1) - 1 words and punctuation marks; an
            empty text counts as one word. How many tokens that makes depends on a run's tokenizer: `data stats`.
        partitions: shard p holds the users with crc32(user_id) mod partitions = p, and is not there if there are none;
            None where whoever wrote the data set did not say.
        files: all files with their sizes and hashes; empty until it has been opened by its manifest.
    """

    storage: Storage
    name: str
    users: int
    interactions: int
    items: int
    label_rate: float
    targets: tuple[int, int, int]
    quarantined: dict[str, int]
    segments: tuple[Segment, ...]
    data_config: dict[str, object]
    user_lengths: tuple[int, ...] = ()
    item_words: tuple[int, ...] = ()
    partitions: int | None = None
    files: tuple[FileEntry, ...] = field(default=(), compare=False)

    @property
    def folder(self) -> str:
        """Path below the root."""
        return dataset_folder(self.name)

    def manifest(self) -> dict[str, object]:
        """Return what `open_dataset` reads back; segments column by column, since there may be a million of them."""
        body = {name: value for name, value in vars(self).items() if name not in ("storage", "files")}
        targets = dict(zip(SPLITS, self.targets, strict=True))
        return {
            "schema_version": SCHEMA_VERSION,
            **body,
            "targets": targets,
            "segments": segment_columns(self.segments),
        }

    @classmethod
    def parse(cls, storage: Storage, files: Sequence[FileEntry], body: Mapping[str, Any]) -> Dataset:
        """Return the data set of which `manifest` made a tree."""
        tree = {name: value for name, value in body.items() if name != "schema_version"}
        tree["targets"] = tuple(tree["targets"][split] for split in SPLITS)
        tree["segments"] = tuple(segments_of(tree["segments"]))
        for name in ("user_lengths", "item_words"):
            tree[name] = tuple(tree[name])
        return cls(storage=storage, files=tuple(files), **tree)


def segment_columns(segments: Sequence[Segment]) -> dict[str, Any]:
    """Return segments as JSON takes them: shard → number of row groups, and one list per count."""
    return {
        "shards": dict(Counter(segment.shard for segment in segments)),
        "users": [segment.users for segment in segments],
        "interactions": [segment.interactions for segment in segments],
        **{name: [segment.targets[split] for segment in segments] for split, name in enumerate(SPLITS)},
    }


def segments_of(columns: Mapping[str, Any]) -> Iterator[Segment]:
    """Yield the segments of which `segment_columns` made lists."""
    places = ((shard, group) for shard, groups in columns["shards"].items() for group in range(groups))
    counts = zip(columns["users"], columns["interactions"], *(columns[name] for name in SPLITS), strict=True)
    for (shard, group), (users, interactions, *targets) in zip(places, counts, strict=True):
        train, valid, test = targets
        yield Segment(shard, group, users, interactions, (train, valid, test))


def log2_histogram(counts: NDArray[np.int64]) -> tuple[int, ...]:
    """Count numbers >= 1 by the power of two that they reach: entry i is for 2^i to 2^(i + 1) - 1."""
    powers = np.floor(np.log2(np.maximum(counts, 1))).astype(np.int64)
    return tuple(np.bincount(powers).tolist()) if len(counts) else ()


def dataset_folder(name: str) -> str:
    """Return a data set's folder, relative to the root."""
    return f"datasets/{name}"


def shard_name(partition: int) -> str:
    """Return the shard of a partition of the users, relative to the data set's folder."""
    return f"interactions/part-{partition:05d}.parquet"


def write_shard(
    storage: Storage, folder: str, shard: str, table: pa.Table, segment_interactions: int
) -> tuple[FileEntry, list[Segment]]:
    """Write users as one Parquet file; a row group ends with the user that fills it.

    Args:
        storage: the root.
        folder: the data set's folder.
        shard: path relative to it.
        table: rows of `SEQUENCES`.
        segment_interactions: a row group has at least so many interactions, but for the last one.

    Returns:
        (the file's entry, relative to `folder`; its segments).
    """
    users = UserSequences.from_table(table)
    segments = []
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, SEQUENCES, compression="zstd", write_page_checksum=True) as writer:
        for start, stop in _row_groups(users.offsets, segment_interactions):
            writer.write_table(table.slice(start, stop - start), row_group_size=stop - start)
            first, last = users.offsets[start], users.offsets[stop]
            train, valid, test = np.bincount(users.splits[first:last], minlength=len(SPLITS)).tolist()
            targets = (train, valid, test)
            segments.append(Segment(shard, len(segments), stop - start, int(last - first), targets))
    written = storage.write(f"{folder}/{shard}", sink.getvalue().to_pybytes())
    return FileEntry(shard, written.size_bytes, written.sha256), segments


def open_dataset(storage: Storage, name: str) -> Dataset:
    """Open a data set by its manifest and look whether its files lie there with their sizes.

    Contents are held against the checksums of the Parquet pages when they are read.

    Raises:
        InputError: there is no complete data set of that name, or another version wrote it.
        StorageError: a file of the manifest is missing or has another size.
    """
    folder = dataset_folder(name)
    found = storage.read_manifest(folder)
    if found is None:
        hint = "run `dti-ray prepare`"
        raise InputError(Fault(storage.display(folder), "is no complete data set", "a manifest.json", hint))
    files, body = found
    version = body.get("schema_version")
    if version != SCHEMA_VERSION:
        hint = "delete the folder and run `dti-ray prepare`"
        where = storage.display(folder, "manifest.json")
        raise InputError(Fault(where, f"has schema version {version}", str(SCHEMA_VERSION), hint))
    _check_sizes(storage, folder, files)
    return Dataset.parse(storage, files, body)


def verify_dataset(dataset: Dataset) -> None:
    """Hold every file of a data set against the SHA-256 in its manifest: once per launch, it reads everything.

    Raises:
        StorageError: a file differs, or cannot be read.
    """
    dataset.storage.verify(dataset.folder, dataset.files)


def read_segment(dataset: Dataset, segment: Segment) -> UserSequences:
    """Return the users of one segment.

    Raises:
        StorageError: the shard is missing or damaged.
    """
    table = _read(dataset, segment.shard, lambda file: file.read_row_group(segment.row_group))
    return UserSequences.from_table(table)


def read_segments(dataset: Dataset, segments: Sequence[Segment]) -> UserSequences:
    """Return the users of some segments of one shard.

    Raises:
        StorageError: the shard is missing or damaged.
    """
    groups = [segment.row_group for segment in segments]
    return UserSequences.from_table(_read(dataset, segments[0].shard, lambda file: file.read_row_groups(groups)))


def read_all(dataset: Dataset) -> UserSequences:
    """Return all users, in the order of the segments.

    Raises:
        StorageError: a shard is missing or damaged.
    """
    shards = dict.fromkeys(segment.shard for segment in dataset.segments)
    tables = [_read(dataset, shard, pq.ParquetFile.read) for shard in shards]
    return UserSequences.from_table(pa.concat_tables(tables))


def read_items(dataset: Dataset) -> pa.Table:
    """Return the ItemTable: item_id and text columns; row i is the item with index i.

    Raises:
        StorageError: the file is missing or damaged.
    """
    return _read(dataset, ITEMS_FILE, pq.ParquetFile.read)


def split_by_weight(items: Iterable[Item], weight: Callable[[Item], int], least: float) -> Iterator[list[Item]]:
    """Yield neighbours together, as few at a time as weigh `least`; the last ones may weigh less."""
    part: list[Item] = []
    total = 0
    for item in items:
        part.append(item)
        total += weight(item)
        if total >= least:
            yield part
            part, total = [], 0
    if part:
        yield part


def _row_groups(offsets: NDArray[np.int64], segment_interactions: int) -> Iterator[tuple[int, int]]:
    """Yield (first user, user after the last one) of each row group."""
    start, users = 0, len(offsets) - 1
    while start < users:
        full = int(np.searchsorted(offsets, offsets[start] + segment_interactions))
        yield start, (start := min(full, users))


def _check_sizes(storage: Storage, folder: str, files: Iterable[FileEntry]) -> None:
    entries = list(files)
    infos = storage.infos([f"{folder}/{entry.path}" for entry in entries])
    faults = [
        Fault(
            storage.display(folder, entry.path),
            "is missing" if info.size is None else f"has {info.size} bytes",
            f"{entry.size_bytes} bytes as in the manifest",
            "delete the data set's folder and run `dti-ray prepare`",
        )
        for entry, info in zip(entries, infos, strict=True)
        if info.size != entry.size_bytes
    ]
    if faults:
        raise StorageError(*faults)


def _read(dataset: Dataset, path: str, read: Callable[[pq.ParquetFile], pa.Table]) -> pa.Table:
    """Read a Parquet file of the data set; what fails is held against its hash, to tell damage from bad storage."""
    storage, full = dataset.storage, f"{dataset.folder}/{path}"
    entries = [entry for entry in dataset.files if entry.path == path]

    def attempt() -> pa.Table:
        try:
            with storage.filesystem.open_input_file(storage.path(full)) as source:
                footer = _footer(source, storage.display(full), entries[0].sha256) if entries else None
                with pq.ParquetFile(source, metadata=footer, page_checksum_verification=True) as file:
                    return read(file)
        except FileNotFoundError:
            raise
        except (OSError, ValueError) as error:  # ArrowInvalid and UnicodeDecodeError are ValueErrors
            storage.verify(dataset.folder, entries)
            raise OSError(" ".join(str(error).split())) from error

    return storage.attempt("read", full, attempt)


def _footer(source: pa.NativeFile, where: str, sha256: str) -> pq.FileMetaData:
    """Return a shard's footer, from memory if it was read lately: parsing it takes far longer than a row group."""
    found = _footers.get((where, sha256))
    if found is None:
        found = pq.read_metadata(source)
        if len(_footers) >= FOOTERS:
            _footers.pop(next(iter(_footers)), None)
        _footers[where, sha256] = found
    return found


_footers: dict[tuple[str, str], pq.FileMetaData] = {}
