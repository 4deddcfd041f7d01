"""From checked rows to users: time-ordered, split, laid down as Parquet segments.

Stage: after checks. In: rows of `INTERACTIONS`. Out: `SEQUENCES` (one row per user) and refused rows; from a
prepared data set, `UserSequences` and the ItemTable.
Invariants: an item is its index in the ItemTable sorted by item_id (as UTF-8 bytes); a user's interactions
are ordered by (time, item index), which is therefore (time, item_id): total, and the same for any order of
the input; no row is lost: each is in a sequence or refused.

    user item label time          train_fraction 0.5, valid_fraction 0.25
    u    b    1     7             user_id items      labels     times      splits
    u    a    0     7        →    u       [c,a,b,a]  [1,0,1,1]  [3,7,7,9]  [0,0,1,2]
    u    c    1     3
    u    a    1     9
"""

# pyarrow.compute makes its functions at run time, where no type checker sees them.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pyarrow import parquet as pq

from dti_ray.config.schema import DataConfig
from dti_ray.data.checks import INTERACTIONS, QUARANTINE
from dti_ray.errors import Fault, InputError, StorageError
from dti_ray.storage import FileEntry, Storage

SPLITS = ("train", "valid", "test")
TRAIN, VALID, TEST = range(3)

SEQUENCES = pa.schema(
    [
        ("user_id", pa.string()),
        ("items", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.int8())),
        ("times", pa.list_(pa.int64())),
        ("splits", pa.list_(pa.int8())),
    ]
)
SCHEMA_VERSION = 1
ITEMS_FILE = "items.parquet"
ROUNDING = 1e-9  # 0.7 + 0.1 is a little less than 0.8


@dataclass(frozen=True)
class Boundaries:
    """Last second of the training and of the validation split, for `split: global_time`."""

    train_until: int
    valid_until: int


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

    @classmethod
    def parse(cls, tree: Mapping[str, Any]) -> Segment:
        """Return the segment that `asdict` and JSON made a tree of."""
        return cls(**{**tree, "targets": tuple(tree["targets"])})


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

    @property
    def folder(self) -> str:
        """Path below the root."""
        return dataset_folder(self.name)

    def manifest(self) -> dict[str, object]:
        """Return what `open_dataset` reads back."""
        body = {name: value for name, value in vars(self).items() if name != "storage"}
        targets = dict(zip(SPLITS, self.targets, strict=True))
        segments = [asdict(segment) for segment in self.segments]
        return {"schema_version": SCHEMA_VERSION, **body, "targets": targets, "segments": segments}

    @classmethod
    def parse(cls, storage: Storage, body: Mapping[str, Any]) -> Dataset:
        """Return the data set of which `manifest` made a tree."""
        tree = {name: value for name, value in body.items() if name != "schema_version"}
        tree["targets"] = tuple(tree["targets"][split] for split in SPLITS)
        tree["segments"] = tuple(map(Segment.parse, tree["segments"]))
        return cls(storage=storage, **tree)


def dataset_folder(name: str) -> str:
    """Return a data set's folder, relative to the root."""
    return f"datasets/{name}"


def global_boundaries(times: NDArray[np.int64], config: DataConfig) -> Boundaries:
    """Return the quantiles train_fraction and train_fraction + valid_fraction of all valid times.

    A quantile is the earliest second up to which at least that share of the interactions lies.
    """
    shares = np.array([config.train_fraction, config.train_fraction + config.valid_fraction])
    ranks = np.ceil(shares * len(times) - ROUNDING).astype(np.int64) - 1
    train, valid = np.partition(times, ranks)[ranks]
    return Boundaries(int(train), int(valid))


def sequences(
    good: pa.Table, item_ids: pa.Array, config: DataConfig, boundaries: Boundaries | None = None
) -> tuple[pa.Table, pa.Table]:
    """Order each user's interactions, refuse duplicates and short users, and mark the splits.

    Of rows with equal user, item and time the one with the lowest label is kept; the others are refused as
    duplicate_event. Users with fewer than `min_interactions` after that are refused as
    user_with_too_few_interactions. Refused rows hold label and time as they were understood.

    Args:
        good: all interactions of some users, as `INTERACTIONS`, in any order.
        item_ids: the ItemTable's ids, in its order.
        config: how to split, and how short a user may be.
        boundaries: needed by `split: global_time`.

    Returns:
        (`SEQUENCES` sorted by user_id, `QUARANTINE` sorted by (user, time, item)).
    """
    good = good.combine_chunks()
    users = pc.unique(good["user_id"]).sort()
    user = pc.index_in(good["user_id"], value_set=users).to_numpy()
    item, label, time = (good[name].to_numpy() for name in INTERACTIONS.names[1:])
    order = np.lexsort((label, item, time, user))
    user, item, label, time = (values[order] for values in (user, item, label, time))
    duplicate = np.zeros(len(order), np.bool_)
    duplicate[1:] = (np.diff(user) == 0) & (np.diff(item) == 0) & (np.diff(time) == 0)
    counts = np.bincount(user[~duplicate], minlength=len(users))
    is_long = counts >= config.min_interactions
    kept = ~duplicate & is_long[user]
    splits = _splits(time[kept], counts[is_long], config, boundaries)
    offsets = pa.array(np.concatenate([[0], np.cumsum(counts[is_long])]), pa.int32())
    flat = (item[kept], label[kept], time[kept], splits)
    lists = [pa.ListArray.from_arrays(offsets, pa.array(values)) for values in flat]
    refused = pa.table(
        {
            "user_id": users.take(pa.array(user[~kept])),
            "item_id": item_ids.take(pa.array(item[~kept])),
            "label": pc.cast(pa.array(label[~kept]), pa.string()),
            "time": pc.cast(pa.array(time[~kept]), pa.string()),
            "reason": np.where(duplicate[~kept], "duplicate_event", "user_with_too_few_interactions"),
        }
    )
    return pa.table([users.filter(pa.array(is_long)), *lists], schema=SEQUENCES), refused.cast(QUARANTINE)


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
    return Dataset.parse(storage, body)


def read_segment(dataset: Dataset, segment: Segment) -> UserSequences:
    """Return the users of one segment.

    Raises:
        StorageError: the shard is missing or damaged.
    """
    with _shard(dataset, segment.shard) as file:
        table = file.read_row_group(segment.row_group)
    return UserSequences.from_table(table)


def read_all(dataset: Dataset) -> UserSequences:
    """Return all users, in the order of the segments.

    Raises:
        StorageError: a shard is missing or damaged.
    """
    tables = []
    for shard in dict.fromkeys(segment.shard for segment in dataset.segments):
        with _shard(dataset, shard) as file:
            tables.append(file.read())
    return UserSequences.from_table(pa.concat_tables(tables))


def read_items(dataset: Dataset) -> pa.Table:
    """Return the ItemTable: item_id and text columns; row i is the item with index i.

    Raises:
        StorageError: the file is missing or damaged.
    """
    with _shard(dataset, ITEMS_FILE) as file:
        return file.read()


def _splits(
    times: NDArray[np.int64], counts: NDArray[np.int64], config: DataConfig, boundaries: Boundaries | None
) -> NDArray[np.int8]:
    """Return each interaction's index into `SPLITS`; users lie one after the other, `counts` long."""
    if config.split == "global_time":
        assert boundaries is not None, "prepare computes them for this split"
        in_valid, in_test = times > boundaries.train_until, times > boundaries.valid_until
    else:
        rank = np.arange(len(times)) - np.repeat(np.cumsum(counts) - counts, counts)
        first_valid = np.floor(config.train_fraction * counts + ROUNDING)
        first_test = np.floor((config.train_fraction + config.valid_fraction) * counts + ROUNDING)
        in_valid, in_test = rank >= np.repeat(first_valid, counts), rank >= np.repeat(first_test, counts)
    return in_valid.astype(np.int8) + in_test.astype(np.int8)


def _row_groups(offsets: NDArray[np.int64], segment_interactions: int) -> Iterator[tuple[int, int]]:
    """Yield (first user, user after the last one) of each row group."""
    start, users = 0, len(offsets) - 1
    while start < users:
        full = int(np.searchsorted(offsets, offsets[start] + segment_interactions))
        yield start, (start := min(full, users))


def _check_sizes(storage: Storage, folder: str, files: Iterable[FileEntry]) -> None:
    entries = list(files)
    infos = storage.filesystem.get_file_info([storage.path(folder, entry.path) for entry in entries])
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


@contextmanager
def _shard(dataset: Dataset, path: str) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file of the data set; what goes wrong while it is read names it."""
    storage = dataset.storage
    try:
        with (
            storage.filesystem.open_input_file(storage.path(dataset.folder, path)) as source,
            pq.ParquetFile(source, page_checksum_verification=True) as file,
        ):
            yield file
    except (OSError, ValueError) as error:  # ArrowInvalid and UnicodeDecodeError are ValueErrors
        where, reason = storage.display(dataset.folder, path), " ".join(str(error).split())
        hint = "delete the data set's folder and run `dti-ray prepare`"
        raise StorageError(Fault(where, f"cannot be read: {reason}", hint=hint)) from error
