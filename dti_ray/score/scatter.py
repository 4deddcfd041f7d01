"""First half of batch scoring: pieces of the log become scratch files, each cut by its users' partition.

Stage: batch scoring, inside Ray tasks. In: a `Piece` of a `RequestLog`. Out: scratch files whose record batch p holds
the requests of the users with crc32(user_id) mod P = p, as `schema` says, and a `Scattered` that says what was found.
Invariant: every row of the piece is in exactly one record batch. A file is named by its piece and its number in it, and
its content is a function of the piece, so a task that runs again, or twice at once, writes the same bytes.

    piece 3 → scratch/rows-00003-00000.arrow, rows-00003-00001.arrow, ...
"""

# pyarrow.compute makes its functions at run time, where no type checker sees them.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import types

from dti_ray.config import ScoreConfig
from dti_ray.config.data import DataConfig
from dti_ray.data.clock import Kind, read_times
from dti_ray.data.scatter import by_partition, partition_of
from dti_ray.data.sources.raw import Piece
from dti_ray.data.sources.values import FAULT, ROW, as_text
from dti_ray.errors import Fault, InputError
from dti_ray.score.log import CANDIDATES, HISTORY, IN_HISTORY, KEEP, TEXT, TIME, USER, RequestLog, is_list
from dti_ray.storage import Storage

FILE = "file"
BLOCK_PAIRS = 1_000_000  # of one scratch file, about: what a task holds at once
NAMED = 5  # of the things that are wrong


@dataclass
class Scattered:
    """What a task found in one piece.

    Attributes:
        rows: rows read.
        pairs: candidates of these.
        blocks: scratch files written, relative to the root.
        weights: of each block, the pairs of each partition, a row without candidates counted as one.
        kinds: `Kind` of time → rows.
        first_of_kind: kind → (file, row, value) of the first.
    """

    rows: int = 0
    pairs: int = 0
    blocks: list[str] = field(default_factory=list)
    weights: list[list[int]] = field(default_factory=list)
    kinds: dict[str, int] = field(default_factory=dict)
    first_of_kind: dict[str, tuple[str, int, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Rules:
    """What all pieces are read by.

    Attributes:
        log: the requests.
        asked: the `score` section.
        data: says unit and zone of times, where a user had to.
        needs_time: whether the model wants to know when.
    """

    log: RequestLog
    asked: ScoreConfig
    data: DataConfig
    needs_time: bool

    @property
    def schema(self) -> pa.Schema:
        """Columns of a scratch file."""
        log, texts = self.log, pa.list_(pa.string())
        kinds = {USER: pa.string(), CANDIDATES: texts, TEXT: texts, TIME: pa.int64()}
        if HISTORY in log.columns:
            kinds[HISTORY] = pa.list_(_past_type(log.kinds[HISTORY].value_type))
        fields = [(name, kinds[name]) for name in (USER, CANDIDATES, TEXT, TIME, HISTORY) if name in log.columns]
        kept = [(name, _plain(kind)) for name, kind in log.kinds.items() if name.startswith(KEEP)]
        return pa.schema([*fields, (FILE, pa.int32()), (ROW, pa.int64()), *kept])


def scatter(
    number: int, piece: Piece, rules: Rules, known: pa.Array, partitions: int, storage: Storage, scratch: str
) -> Scattered:
    """Write the requests of one piece as scratch files.

    Args:
        number: of the piece.
        piece: of the log.
        rules: how it is read.
        known: ids of the items that the model knows.
        partitions: P.
        storage: the root.
        scratch: folder of the scratch files.

    Raises:
        InputError: a row is malformed, or asks for an unknown item where that is to fail; names file and row.
        StorageError: a file cannot be read or written, also not later.
    """
    log = rules.log

    def attempt() -> Scattered:
        found = Scattered()
        for block, rows in enumerate(_blocks(piece, rules, found)):
            if rules.asked.unknown_item == "fail":
                _refuse_unknown(rows, known, log)
            weights = np.maximum(pc.fill_null(pc.list_value_length(rows[CANDIDATES]), 0).to_numpy(), 1)
            path = f"{scratch}/rows-{number:05d}-{block:05d}.arrow"
            storage.write(path, by_partition(rows, partitions))
            of_row = partition_of(rows[USER], partitions)
            found.blocks.append(path)
            found.weights.append(np.bincount(of_row, weights, partitions).astype(np.int64).tolist())
        return found

    return log.storage.attempt("read", log.files[piece.file], attempt)


def _blocks(piece: Piece, rules: Rules, found: Scattered) -> Iterator[pa.Table]:
    """Yield a piece's requests, about `BLOCK_PAIRS` at a time."""
    held, pairs = [], 0
    for batch in rules.log.batches(piece):
        held.append(_requests(batch, piece, rules, found))
        pairs += max(len(held[-1][CANDIDATES].combine_chunks().flatten()), len(batch))
        if pairs >= BLOCK_PAIRS:
            yield pa.concat_tables(held)
            held, pairs = [], 0
    if pairs:
        yield pa.concat_tables(held)


def _requests(batch: pa.RecordBatch, piece: Piece, rules: Rules, found: Scattered) -> pa.Table:
    """Return a batch of the log as `Rules.schema`."""
    where, rows = rules.log.name(piece.file), batch[ROW].to_numpy()
    for column in batch.columns:
        _check_text(column, where)
    if batch[FAULT].null_count < len(batch):
        raise _malformed(where, rows[pc.is_valid(batch[FAULT]).to_numpy(zero_copy_only=False)], "is not UTF-8")
    columns: dict[str, pa.Array] = {USER: as_text(batch[USER]), CANDIDATES: _lists(batch[CANDIDATES])}
    if TEXT in rules.log.columns:
        columns[TEXT] = _lists(batch[TEXT])
        lengths = (pc.fill_null(pc.list_value_length(columns[name]), 0).to_numpy() for name in (CANDIDATES, TEXT))
        differ = np.not_equal(*lengths)
        if differ.any():
            raise _malformed(where, rows[differ], "has another number of texts than of candidates")
    if TIME in rules.log.columns:
        columns[TIME] = _times(batch, where, rules, found)
    if HISTORY in rules.log.columns:
        columns[HISTORY] = _histories(batch[HISTORY], rows, where)
    columns[FILE] = pa.array(np.full(len(batch), piece.file, np.int32))
    columns[ROW] = batch[ROW]
    schema = rules.schema
    for name in schema.names:
        columns.setdefault(name, batch[name] if name in batch.schema.names else pa.nulls(len(batch)))
    found.rows += len(batch)
    found.pairs += len(columns[CANDIDATES].flatten())
    return pa.table({name: columns[name].cast(schema.field(name).type) for name in schema.names}, schema=schema)


def _lists(column: pa.Array) -> pa.Array:
    """Return ids as lists of texts, whatever they were; a row of one becomes a list of one."""
    if not is_list(column.type):
        return pa.ListArray.from_arrays(pa.array(np.arange(len(column) + 1, dtype=np.int32)), as_text(column))
    return relisted(column, as_text(pc.list_flatten(column)))


def relisted(lists: pa.Array, values: pa.Array) -> pa.Array:
    """Return lists of the same lengths with other values; what was null stays so."""
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy()
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    return pa.ListArray.from_arrays(offsets, values, mask=pc.is_null(lists))


def _times(batch: pa.RecordBatch, where: str, rules: Rules, found: Scattered) -> pa.Array:
    """Return times in the log's own unit, null where there is none; count their kinds."""
    given = pc.is_valid(batch[TIME]).to_numpy(zero_copy_only=False)
    values, kinds = read_times(batch[TIME], rules.data)
    rows = batch[ROW].to_numpy()
    if (bad := given & (kinds == Kind.BAD)).any():
        raise _malformed(where, rows[bad], f"has a time that is not understood: {batch[TIME][int(bad.argmax())]}")
    if rules.needs_time and not given.all():
        raise _malformed(where, rows[~given], "has no time; this model reads how long ago things happened")
    for kind in np.unique(kinds[given]).tolist():
        of_kind = kinds == kind
        first, name = int(of_kind.argmax()), Kind(kind).name
        found.kinds[name] = found.kinds.get(name, 0) + int(of_kind.sum())
        found.first_of_kind.setdefault(name, (where, int(rows[first]), int(values[first])))
    return pa.array(values, mask=~given)


def _histories(column: pa.Array, rows: np.ndarray, where: str) -> pa.Array:
    """Return histories with ids as texts; labels are 0 or 1, and times never fall."""
    flat = pc.list_flatten(column)
    parent = pc.list_parent_indices(column).to_numpy()
    given = {name: pc.struct_field(flat, name) for name in IN_HISTORY if name in _names(flat.type)}
    items, labels = as_text(given["item_id"]), pc.cast(given["label"], pa.float64())
    is_label = pc.fill_null(pc.or_(pc.equal(labels, 0.0), pc.equal(labels, 1.0)), False)
    wrong = {"a history without an item": pc.is_null(items), "a label that is not 0 or 1": pc.invert(is_label)}
    if "time" in given:
        times, same_row = pc.fill_null(pc.cast(given["time"], pa.int64()), 0).to_numpy(), np.diff(parent) == 0
        wrong["a history without a time"] = pc.is_null(given["time"])
        wrong["a history that is not oldest first"] = pa.array(
            np.concatenate([np.zeros(min(1, len(times)), bool), (np.diff(times) < 0) & same_row])
        )
    for what, mask in wrong.items():
        if pc.any(mask).as_py():
            raise _malformed(where, np.unique(rows[parent[mask.to_numpy(zero_copy_only=False)]]), f"has {what}")
    clean = {**given, "item_id": items, "label": pc.cast(labels, pa.int8())}
    kind = _past_type(flat.type)
    fields = [clean[name].cast(kind.field(name).type) for name in _names(kind)]
    return relisted(column, pa.StructArray.from_arrays(fields, fields=list(kind)))


def _refuse_unknown(rows: pa.Table, known: pa.Array, log: RequestLog) -> None:
    """Stop at candidates, or items of given histories, that the model does not know.

    Raises:
        InputError: naming some of them.
    """
    ids = rows[CANDIDATES].combine_chunks()
    unknown = pc.invert(pc.is_in(ids.flatten(), value_set=known))
    if TEXT in rows.column_names:
        texts = pc.utf8_trim_whitespace(rows[TEXT].combine_chunks().flatten())
        unknown = pc.and_(unknown, pc.equal(pc.fill_null(texts, ""), ""))
    places = np.flatnonzero(unknown.to_numpy(zero_copy_only=False))
    if not len(places):
        return
    of_row = pc.list_parent_indices(ids).take(pa.array(places[:1]))[0].as_py()
    file, row = (rows[name][of_row].as_py() for name in (FILE, ROW))
    named = list(dict.fromkeys(map(repr, ids.flatten().take(pa.array(places[: 10 * NAMED])).to_pylist())))[:NAMED]
    problem = f"asks for items that the model does not know, such as {', '.join(named)}"
    hint = "score.unknown_item=null gives them null scores; score.columns.text names a column of texts to read instead"
    raise InputError(Fault(f"{log.name(file)} row {row}", problem, f"ids of its {len(known):,} items", hint))


def _check_text(column: pa.Array, where: str) -> None:
    """Hold what is nested against UTF-8; `marked` did so for the rest."""
    try:
        if types.is_nested(column.type):
            column.validate(full=True)
    except pa.ArrowInvalid as error:
        raise InputError(Fault(where, f"is damaged: {' '.join(str(error).split())}", hint="get it again")) from error


def _malformed(where: str, rows: np.ndarray, what: str) -> InputError:
    more = f" ({len(rows):,} rows such)" if len(rows) > 1 else ""
    return InputError(Fault(f"{where} row {rows[0]}", f"{what}{more}", hint="mend the log"))


def _past_type(given: pa.DataType) -> pa.DataType:
    kinds = {"item_id": pa.string(), "label": pa.int8(), "time": pa.int64()}
    return pa.struct([(name, kinds[name]) for name in IN_HISTORY if name in _names(given)])


def _names(kind: pa.DataType) -> list[str]:
    return [kind.field(i).name for i in range(kind.num_fields)]


def _plain(kind: pa.DataType) -> pa.DataType:
    """Return a type as `values.decoded` leaves it: no dictionaries, bytes are texts."""
    if types.is_dictionary(kind):
        return _plain(kind.value_type)
    is_bytes = types.is_binary(kind) or types.is_fixed_size_binary(kind) or types.is_large_binary(kind)
    return pa.string() if is_bytes or types.is_string_view(kind) or types.is_binary_view(kind) else kind
