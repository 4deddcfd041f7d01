"""Delimited text: every field stays the text that the file holds, and a line that is no row is marked.

Stage: sources. In: blocks of whole lines. Out: batches with the wanted columns (strings), `row` and `fault`.
Invariant: each line that is not blank is one row, unless quotation marks hold it and the next ones together; a stray
quotation mark never swallows the rest of the file.

    user,item,rating
    1,"7, rue",5          row 1   "1"  "7, rue"  "5"
    1,8                   row 2   null null      null   wrong_number_of_fields
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain

import numpy as np
import pyarrow as pa
from pyarrow import csv as pa_csv

from dti_ray.data.sources import lines
from dti_ray.data.sources.values import WRONG_FIELDS, check_present, is_utf8, marked
from dti_ray.errors import Fault, InputError
from dti_ray.storage import Storage

DELIMITERS = (",", "\t", ";", "|")


@dataclass(frozen=True)
class Layout:
    """How lines become fields.

    Attributes:
        delimiter: one character between two fields.
        quoting: a field may stand in quotation marks and then hold anything; otherwise they are letters.
        names: columns of a file without a heading; empty reads the heading.
    """

    delimiter: str = ","
    quoting: bool = True
    names: tuple[str, ...] = ()

    @property
    def has_heading(self) -> bool:
        """Whether the first line names the columns."""
        return not self.names


def headings(storage: Storage, file: str, layout: Layout) -> list[str]:
    """Return a file's columns in order.

    Raises:
        InputError: the file is missing, damaged, empty or no UTF-8; StorageError: it cannot be reached.
    """
    return list(layout.names) or fields(first_line(storage, file), layout.delimiter, layout.quoting)


def first_line(storage: Storage, file: str) -> str:
    """Return a file's heading line; see `headings` for the errors."""
    with lines.stream(storage, file) as (source, _):
        line = source.readline(lines.LINE_BYTES)
        while line and not line.strip():
            line = source.readline(lines.LINE_BYTES)
    return _decoded(line.removeprefix(lines.BOM), storage.display(file))


def guess_delimiter(heading: str) -> str:
    """Return the delimiter that cuts a heading into the most fields; a comma where none cuts it."""
    return max(DELIMITERS, key=lambda delimiter: len(fields(heading, delimiter, quoting=True)))


def fields(line: str, delimiter: str, quoting: bool) -> list[str]:
    """Cut one line into its fields."""
    try:
        return next(csv.reader([line], delimiter=delimiter), [""]) if quoting else line.split(delimiter)
    except csv.Error:  # a field of more than 128 KB, which no heading has
        return [line]


def batches(storage: Storage, file: str, columns: Mapping[str, str], layout: Layout) -> Iterator[pa.RecordBatch]:
    """Yield a file's rows, one batch per block; see `formats.batches`."""
    where, found, names = storage.display(file), lines.blocks(storage, file, layout.quoting), list(layout.names)
    if layout.has_heading:
        heading, _, rest = next(found, b"").lstrip(b"\r\n").partition(b"\n")
        names, found = fields(_decoded(heading, where), layout.delimiter, layout.quoting), chain([rest], found)
    check_present(columns.values(), names, where)
    places = {name: names.index(heading) for name, heading in columns.items()}
    first_row = 1
    for block in found:
        good, bad = _rows(block, sorted(set(places.values())), len(names), layout)
        batch = marked({name: good[str(place)] for name, place in places.items()}, first_row, bad, good.num_rows)
        first_row += len(batch)
        if len(batch):
            yield batch


def _decoded(heading: bytes, where: str) -> str:
    if not heading.strip():
        raise InputError(Fault(where, "is empty", "a heading and rows"))
    try:
        return heading.decode().rstrip("\r\n")
    except UnicodeDecodeError:
        raise InputError(Fault(where, "has a heading that is not UTF-8", "UTF-8 text")) from None


def _rows(block: bytes, places: list[int], width: int, layout: Layout) -> tuple[pa.RecordBatch, dict[int, str]]:
    """Return a block's good rows, and place → fault of the bad ones."""
    good, bad = _parse(block, places, width, layout)
    if not layout.quoting:
        return good, dict.fromkeys(bad, WRONG_FIELDS)
    if block.count(lines.QUOTE) % 2 and good.num_rows + len(bad) != len(lines.split(block)):
        good, bad = good.slice(0, 0), {0: block}  # a stray quotation mark took whatever follows into its field
    parts = {place: lines.split(text) for place, text in bad.items()}
    if all(len(part) == 1 for part in parts.values()):
        return good, dict.fromkeys(bad, WRONG_FIELDS)
    return _taken_apart(good, parts, places, width, layout)


def _taken_apart(
    good: pa.RecordBatch, parts: dict[int, list[bytes]], places: list[int], width: int, layout: Layout
) -> tuple[pa.RecordBatch, dict[int, str]]:
    """Parse the lines of bad rows once more, each by itself, and put them where the rows were."""
    sizes = np.ones(good.num_rows + len(parts), np.int64)
    is_good = np.ones(len(sizes), np.bool_)
    for place, part in parts.items():
        sizes[place], is_good[place] = len(part), False
    starts = np.cumsum(sizes) - sizes
    where, bad, rows = starts[is_good].tolist(), {}, []
    for place, part in parts.items():
        for number, line in enumerate(part, start=int(starts[place])):
            row = _fields_alone(line, layout.delimiter)
            if len(row) == width:
                rows.append(row)
                where.append(number)
            else:
                bad[number] = WRONG_FIELDS
    columns = [pa.array([row[place] for row in rows], pa.binary()) for place in places]
    found = pa.concat_batches([good, pa.RecordBatch.from_arrays(columns, schema=good.schema)])
    return found.take(pa.array(np.argsort(where), pa.int64())), bad


def _fields_alone(line: bytes, delimiter: str) -> list[bytes]:
    """Cut one line into its fields; if a quotation mark stays open in it, all of them are letters."""
    text = line.decode("latin-1").rstrip("\r")
    try:
        row = next(csv.reader([text], delimiter=delimiter, strict=True), [""])
    except csv.Error:  # an open quotation mark, or a field of more than 128 KB
        row = text.split(delimiter)
    return [field.encode("latin-1") for field in row]


def _parse(block: bytes, places: list[int], width: int, layout: Layout) -> tuple[pa.RecordBatch, dict[int, bytes]]:
    """Return the good rows of some text, each field as its bytes, columns named by their places; and the bad rows."""
    if is_utf8(block):
        batch, bad = _arrow(block, places, width, layout)
        return batch, {place: text.encode() for place, text in bad.items()}
    # Arrow cannot hand over a bad row that is no UTF-8: let each byte be a character on the way.
    batch, bad = _arrow(block.decode("latin-1").encode(), places, width, layout)
    columns = [pa.array([value.decode().encode("latin-1") for value in column.to_pylist()]) for column in batch.columns]
    columns = [column.cast(pa.binary()) for column in columns]  # of no row, Arrow knows no type
    return pa.RecordBatch.from_arrays(columns, schema=batch.schema), {
        i: text.encode("latin-1") for i, text in bad.items()
    }


def _arrow(block: bytes, places: list[int], width: int, layout: Layout) -> tuple[pa.RecordBatch, dict[int, str]]:
    names = [str(place) for place in range(width)]
    schema = pa.schema([(str(place), pa.binary()) for place in places])
    bad: dict[int, str] = {}

    def note(row: pa_csv.InvalidRow) -> str:
        bad[row.number - 1] = row.text
        return "skip"

    if not block.strip():
        return pa.RecordBatch.from_pylist([], schema), bad
    table = pa_csv.read_csv(
        pa.BufferReader(block),
        pa_csv.ReadOptions(use_threads=False, block_size=len(block) + 1, column_names=names),
        pa_csv.ParseOptions(
            delimiter=layout.delimiter,
            quote_char='"' if layout.quoting else False,
            newlines_in_values=layout.quoting,
            invalid_row_handler=note,
        ),
        pa_csv.ConvertOptions(
            include_columns=schema.names, column_types=dict.fromkeys(names, pa.binary()), strings_can_be_null=False
        ),
    )
    return table.combine_chunks().to_batches()[0] if table.num_rows else pa.RecordBatch.from_pylist([], schema), bad
