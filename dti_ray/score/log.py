"""A log of requests: its Parquet files found, their columns checked, their rows counted, before anything is read.

Stage: first of batch scoring. In: the `score` section. Out: a `RequestLog`, which is cut into pieces.
Invariant: all files have the wanted columns, in the same form; rows and pairs are known from the files' ends alone.

    user_id  candidates       or   user_id  candidates         (`candidates` is a list, or one item a row)
    "u"      ["a", "b"]            "u"      "a"
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import accumulate

import pyarrow as pa
from pyarrow import parquet as pq
from pyarrow import types

from dti_ray.config import RequestColumnsConfig, ScoreConfig
from dti_ray.data.sources import files, parquet
from dti_ray.data.sources.raw import OPEN_FILES, Piece
from dti_ray.errors import Fault, InputError
from dti_ray.storage import Storage

SUFFIX = ".parquet"
USER, CANDIDATES, TEXT, TIME, HISTORY, KEEP = "user_id", "candidates", "text", "time", "history", "keep."
PIECE_PAIRS = 4_000_000  # that one task reads and lays into scratch files
BATCH_PAIRS = 200_000  # that it decodes at once, if a row has no more
IN_HISTORY = ("item_id", "label", "time")  # the last one may be missing
LISTS = (types.is_list, types.is_large_list, types.is_fixed_size_list)
WHERE = "score.columns"


@dataclass(frozen=True)
class RequestLog:
    """The files of a log of requests.

    Attributes:
        storage: what the names are relative to.
        files: names, sorted.
        columns: canonical name (`user_id`, `candidates`, `text`, `time`, `history`, `keep.<name>`) → heading.
        kinds: canonical name → type in the files.
        pieces: what one task reads, in the order of files and rows.
        rows: of all files.
        pairs: of user and candidate, a row without any counted as one.
    """

    storage: Storage
    files: tuple[str, ...]
    columns: Mapping[str, str]
    kinds: Mapping[str, pa.DataType]
    pieces: tuple[Piece, ...]
    rows: int
    pairs: int

    @property
    def has_slates(self) -> bool:
        """Whether a row has a list of candidates, and not one."""
        return is_list(self.kinds[CANDIDATES])

    @property
    def batch_rows(self) -> int:
        """Rows that are decoded at once."""
        return max(1, BATCH_PAIRS * self.rows // max(self.pairs, 1))

    def name(self, file: int) -> str:
        """Return a file as a user would type it."""
        return self.storage.display(self.files[file])

    def batches(self, piece: Piece) -> Iterator[pa.RecordBatch]:
        """Yield a piece's rows: the keys of `columns`, then `row` (int64, in the file, from 1) and `fault` (string).

        Raises:
            InputError: the file is missing or damaged; StorageError: it cannot be reached.
        """
        name = self.files[piece.file]
        try:
            yield from parquet.batches(
                self.storage, name, self.columns, piece.row_groups, piece.first_row, self.batch_rows
            )
        except InputError as error:
            raise _without_advice(error) from error


@dataclass(frozen=True)
class _End:
    """What a file's end says: its columns, and rows and pairs of each row group."""

    schema: pa.Schema
    rows: Sequence[int]
    pairs: Sequence[int]


def locate(asked: ScoreConfig) -> RequestLog:
    """Find the log and look at the ends of its files.

    Raises:
        InputError: with one fault per column that is missing or of the wrong kind, and per damaged file.
        StorageError: it cannot be reached.
    """
    if asked.input is None:
        expected = "a Parquet file, a folder or a URI of some"
        raise InputError(Fault("score.input", "is not set", expected, "such as score.input=requests.parquet"))
    place = files.place(asked.input, "score.input")
    names = tuple(name for name in place.files if name.lower().endswith(SUFFIX))
    if not names:
        raise InputError(Fault(place.name, f"holds no {SUFFIX} file", "requests as Parquet", "set score.input"))
    columns = _columns(asked.columns)
    with ThreadPoolExecutor(OPEN_FILES) as pool:
        looked = list(pool.map(lambda name: _look(place.storage, name, columns[CANDIDATES]), names))
    ends = [end for end in looked if isinstance(end, _End)]
    faults = [fault for error in looked if isinstance(error, InputError) for fault in error.faults]
    for name, end in zip(names, looked, strict=True):
        if isinstance(end, _End):
            faults += _faults(place.storage.display(name), end.schema, ends[0].schema, columns)
    if faults:
        raise InputError(*faults)
    kinds = {name: ends[0].schema.field(heading).type for name, heading in columns.items()}
    pieces = tuple(piece for number, end in enumerate(ends) for piece in _pieces(number, end))
    rows, pairs = (sum(sum(getattr(end, name)) for end in ends) for name in ("rows", "pairs"))
    return RequestLog(place.storage, names, columns, kinds, pieces, rows, pairs)


def is_list(kind: pa.DataType) -> bool:
    """Say whether a type is a list of any sort."""
    return any(is_kind(kind) for is_kind in LISTS)


def _columns(given: RequestColumnsConfig) -> dict[str, str]:
    wanted = {
        USER: given.user,
        CANDIDATES: given.candidates,
        TEXT: given.text,
        TIME: given.time,
        HISTORY: given.history,
    }
    present = {name: heading for name, heading in wanted.items() if heading is not None}
    return present | {KEEP + name: name for name in given.keep}


def _look(storage: Storage, file: str, candidates: str) -> _End | InputError:
    try:
        return storage.attempt("read", file, lambda: _end(storage, file, candidates))
    except InputError as error:
        return _without_advice(error)


def _end(storage: Storage, file: str, candidates: str) -> _End:
    with files.random_access(storage, file) as source, pq.ParquetFile(source) as opened:
        data, groups = opened.metadata, range(opened.num_row_groups)
        leaves = [i for i in range(data.num_columns) if data.schema.column(i).path.partition(".")[0] == candidates]
        rows = [data.row_group(group).num_rows for group in groups]
        pairs = [max(data.row_group(group).column(leaves[0]).num_values, rows[group]) if leaves else 0
                 for group in groups]  # fmt: skip
        return _End(opened.schema_arrow, rows, pairs)


def _pieces(file: int, end: _End) -> Iterator[Piece]:
    first_rows = list(accumulate(end.rows, initial=1))
    for start, stop in parquet.cut(list(end.pairs), PIECE_PAIRS):
        yield Piece(file, sum(end.rows[start:stop]), (start, stop), first_rows[start])


def _faults(file: str, schema: pa.Schema, first: pa.Schema, columns: Mapping[str, str]) -> Iterator[Fault]:
    """Yield what is wrong with the columns of one file."""
    for name, heading in columns.items():
        key = f"{WHERE}.{name.partition('.')[0].removesuffix('_id')}"
        if heading not in schema.names:
            has = ", ".join(schema.names) or "no column"
            yield Fault(file, f"has no column {heading!r} ({key})", f"one of its columns: {has}", f"set {key}")
            continue
        kind = schema.field(heading).type
        expected = _expected(name, kind, schema, columns)
        if expected:
            yield Fault(file, f"column {heading!r} ({key}) is {kind}", expected)
        elif heading in first.names and (before := first.field(heading).type) != kind and _matters(name, kind, before):
            yield Fault(file, f"column {heading!r} ({key}) is {kind}", f"{before} as in the first file")


def _expected(name: str, kind: pa.DataType, schema: pa.Schema, columns: Mapping[str, str]) -> str:
    """Return what a column should be, where it is not that."""
    element = kind.value_type if is_list(kind) else kind
    if name == HISTORY:
        is_history = is_list(kind) and types.is_struct(element) and {*IN_HISTORY[:2]} <= _fields(element)
        has_seconds = is_history and (IN_HISTORY[2] not in _fields(element) or _is_whole(element.field(IN_HISTORY[2])))
        return "" if has_seconds else "a list of {item_id, label} or {item_id, label, time}, time in whole seconds"
    if name == CANDIDATES:
        return "ids, or lists of ids" if types.is_nested(element) else ""
    if name == TEXT:
        among = schema.field(columns[CANDIDATES]).type if columns[CANDIDATES] in schema.names else kind
        return (
            "" if is_list(among) == is_list(kind) and not types.is_nested(element) else "like the candidates, as text"
        )
    return "one value a row" if types.is_nested(kind) and not name.startswith(KEEP) else ""


def _fields(kind: pa.DataType) -> set[str]:
    return {kind.field(i).name for i in range(kind.num_fields)}


def _is_whole(field: pa.Field) -> bool:
    return types.is_integer(field.type)


def _matters(name: str, kind: pa.DataType, before: pa.DataType) -> bool:
    """Say whether two types of a column may not stand side by side: ids and times are read alike from any type."""
    return name.startswith(KEEP) or is_list(kind) != is_list(before) or name == HISTORY


def _without_advice(error: InputError) -> InputError:
    """Return an error without what only `prepare` can do."""
    return InputError(*(replace(fault, hint="get the file again") if fault.hint else fault for fault in error.faults))
