"""First half of `prepare`: pieces of the raw log become checked rows in scratch files, sorted by partition.

Stage: prepare, inside Ray tasks. In: a `Piece`. Out: scratch files whose record batch p holds the rows of the users
with crc32(user_id) mod P = p, and a `Scattered` that says what was found.
Invariant: a block is named by its piece and its number in it, never by its content: a task that runs again, or twice at
once, writes the same bytes to the same names.

    piece 3: rows of logs/b.parquet → scratch/rows-00003-00000.arrow, rows-00003-00001.arrow, ...
"""

# pyarrow.compute makes its functions at run time, where no type checker sees them.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import hashlib
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pyarrow import ipc

from dti_ray.config.data import DataConfig
from dti_ray.data.checks import INTERACTIONS, REFUSED, TEXTS, Checked, check
from dti_ray.data.clock import Kind
from dti_ray.data.sources.raw import USER, Piece, RawLog
from dti_ray.data.sources.values import as_text
from dti_ray.errors import InputError
from dti_ray.storage import Storage

BLOCK_ROWS = 2_000_000  # rows that a task holds at once, if a shard is not smaller
EXAMPLES = 3  # rows of each reason that a message may quote
HASH_BYTES = 8

# A good row has the columns of `INTERACTIONS`, a refused one its texts and a reason; user, file and row serve both.
REFUSED_AS = {name: f"refused_{name}" for name in ("item_id", "label", "time")}
ROWS = pa.schema([*INTERACTIONS, *(pa.field(name, pa.string()) for name in (*REFUSED_AS.values(), "reason"))])


@dataclass
class Scattered:
    """What a task found in one piece.

    Attributes:
        rows: rows read, those of users who were not drawn left out.
        blocks: scratch files written, relative to the root.
        refused: reason → rows.
        examples: reason → some of these rows, as a message quotes them.
        kinds: `Kind` of time → good rows.
        first_of_kind: kind → (file, row, value) of the first.
        problem: what is wrong with the file where it could not be read; its rows then do not count.
    """

    rows: int = 0
    blocks: list[str] = field(default_factory=list)
    refused: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    kinds: dict[str, int] = field(default_factory=dict)
    first_of_kind: dict[str, tuple[str, int, int]] = field(default_factory=dict)
    problem: str = ""

    def count(self, checked: Checked, file: str) -> None:
        """Add some checked rows."""
        self.rows += len(checked.good) + len(checked.refused)
        for reason, count in Counter(checked.refused["reason"].to_pylist()).items():
            self.refused[reason] = self.refused.get(reason, 0) + count
            held = self.examples.setdefault(reason, [])
            rows = checked.refused.filter(pc.equal(checked.refused["reason"], reason)).slice(0, EXAMPLES - len(held))
            held += [_quote(file, row) for row in rows.to_pylist()]
        times, rows = checked.good["time"].to_numpy(), checked.good["row"].to_numpy()
        for kind in np.unique(checked.kinds).tolist():
            of_kind = checked.kinds == kind
            first, name = int(of_kind.argmax()), Kind(kind).name
            self.kinds[name] = self.kinds.get(name, 0) + int(of_kind.sum())
            self.first_of_kind.setdefault(name, (file, int(rows[first]), int(times[first])))


def scatter(
    number: int,
    piece: Piece,
    raw: RawLog,
    item_ids: pa.Array,
    data: DataConfig,
    partitions: int,
    storage: Storage,
    scratch: str,
) -> Scattered:
    """Check one piece and write its rows as scratch files.

    Raises:
        InputError: the file is damaged and `data.on_bad_file` is fail.
        StorageError: a file cannot be read or written, also not later.
    """
    name = raw.storage.display(raw.files[piece.file])

    def attempt() -> Scattered:
        found = Scattered()
        for block, rows in enumerate(_blocks(raw, piece, min(BLOCK_ROWS, data.shard_interactions))):
            checked = check(of_drawn_users(rows, data.user_fraction), piece.file, data, item_ids)
            found.count(checked, name)
            path = f"{scratch}/rows-{number:05d}-{block:05d}.arrow"
            storage.write(path, by_partition(_joined(checked), partitions))
            found.blocks.append(path)
        return found

    try:
        return raw.storage.attempt("read", raw.files[piece.file], attempt)
    except InputError as error:
        if data.on_bad_file == "fail":
            raise
        return Scattered(problem=str(error))


def collect_items(piece: Piece, raw: RawLog) -> pa.Table:
    """Return the distinct items of a piece of a log without a catalogue, each with the texts of its first row.

    Raises:
        InputError: the file is damaged.
        StorageError: it cannot be read, also not later.
    """

    def collect() -> pa.Table:
        found = [pa.table({name: pa.array([], pa.string()) for name in raw.item_columns})]
        for batch in raw.item_batches(piece):
            texts = {name: pc.fill_null(as_text(batch[name]), "") for name in raw.item_columns}
            found.append(first_of_each(pa.table(texts)))
        return first_of_each(pa.concat_tables(found))

    return raw.storage.attempt("read", raw.files[piece.file], collect)


def first_of_each(items: pa.Table) -> pa.Table:
    """Keep the first row of each item_id; rows without one are left out."""
    known = items.filter(pc.fill_null(pc.not_equal(pc.utf8_trim_whitespace(items["item_id"]), ""), False))
    texts = [name for name in items.column_names if name != "item_id"]
    grouped = known.group_by("item_id", use_threads=False).aggregate([(name, "first") for name in texts])
    return grouped.rename_columns([name.removesuffix("_first") for name in grouped.column_names]).select(
        items.column_names
    )


def _quote(file: str, row: dict[str, object]) -> str:
    said = " ".join(f"{name.removesuffix('_id')}={row[name]!r}" for name in TEXTS if row[name] is not None)
    return f"{file} row {row['row']}" + (f" ({said})" if said else "")


def _blocks(raw: RawLog, piece: Piece, size: int) -> Iterator[pa.Table]:
    """Yield a piece's raw rows, about `size` at a time."""
    held: list[pa.RecordBatch] = []
    for batch in raw.batches(piece):
        held.append(batch)
        if sum(map(len, held)) >= size:
            yield _table(held)
            held = []
    if sum(map(len, held)):
        yield _table(held)


def _table(batches: list[pa.RecordBatch]) -> pa.Table:
    """Lay batches together; where a column's type differs between them (JSON), it becomes text."""
    tables = [pa.table(batch) for batch in batches]
    differing = [
        name for name in tables[0].column_names if len({table.schema.field(name).type for table in tables}) > 1
    ]
    for name in differing:
        tables = [table.set_column(table.column_names.index(name), name, as_text(table[name])) for table in tables]
    return pa.concat_tables(tables)


def _joined(checked: Checked) -> pa.Table:
    """Lay good and refused rows together; they are told apart by `reason`."""
    refused = checked.refused.rename_columns([REFUSED_AS.get(name, name) for name in REFUSED.names])
    return pa.concat_tables([checked.good, refused], promote_options="default").select(ROWS.names).cast(ROWS)


def by_partition(rows: pa.Table, partitions: int) -> bytes:
    """Return an Arrow file whose record batch p holds the rows of the users with crc32(user_id) mod P = p, in order."""
    partition = partition_of(rows["user_id"], partitions)
    order = np.argsort(partition, kind="stable")
    starts = np.searchsorted(partition[order], np.arange(partitions + 1))
    ordered = rows.combine_chunks().take(pa.array(order)).combine_chunks()
    sink = pa.BufferOutputStream()
    with ipc.new_file(sink, rows.schema, options=ipc.IpcWriteOptions(compression="lz4", use_threads=False)) as writer:
        for start, stop in pairwise(starts.tolist()):
            (batch,) = ordered.slice(start, stop - start).to_batches() or [pa.RecordBatch.from_pylist([], rows.schema)]
            writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def of_drawn_users(rows: pa.Table, fraction: float | None) -> pa.Table:
    """Keep the rows of a share of the users: those of whom a hash of the id lies below it.

    A user who is kept with a fraction is kept with every larger one. A row without a user, as a broken line is, belongs
    to none of them.

    Args:
        rows: with the column of users, as a `RawLog` delivers it.
        fraction: share of the users, 0 to 1; None keeps every row.
    """
    if fraction is None:
        return rows
    user = pc.fill_null(as_text(rows[USER]), "").combine_chunks().dictionary_encode()
    kept = [bool(name.strip()) and _hash(name) < fraction for name in user.dictionary.to_pylist()]
    return rows.filter(pa.array(np.array(kept, bool)[user.indices.to_numpy()]))


def _hash(name: str) -> float:
    """Return a number from 0 to 1 that looks as if drawn at random."""
    digest = hashlib.blake2b(name.encode(), digest_size=HASH_BYTES).digest()
    return int.from_bytes(digest, "big") / 2 ** (8 * HASH_BYTES)


def partition_of(user_ids: pa.ChunkedArray, partitions: int) -> NDArray[np.int32]:
    """Return the partition of each row: the same for all rows of a user, in every process."""
    user = pc.fill_null(user_ids, "").combine_chunks().dictionary_encode()
    of_user = [zlib.crc32(name.encode()) % partitions for name in user.dictionary.to_pylist()]
    return np.array(of_user, np.int32)[user.indices.to_numpy()]
