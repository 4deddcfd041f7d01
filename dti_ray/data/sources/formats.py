"""The three formats of raw files behind one interface: Parquet, delimited text, JSON Lines.

Stage: sources. In: files in some storage. Out: which columns a file has, how many rows, and the rows.
Invariant: whatever the format, a batch holds the wanted columns, `row` (number of the row in its file, from 1, blank
lines and headings not counted) and `fault` (null, or why the row could not be read; its columns are null then).
Parquet keeps its types, delimited text gives strings, JSON Lines gives what the JSON holds.

    part.parquet part.pq   ·   part.csv part.tsv   ·   part.jsonl part.ndjson part.json   ·   each text also as .gz
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

from dti_ray.data.sources import delimited, jsonlines, lines, parquet
from dti_ray.data.sources.delimited import Layout
from dti_ray.data.sources.files import GZIP
from dti_ray.data.sources.values import FAULT, MALFORMED, NOT_UTF8, ROW, WRONG_FIELDS, as_text, nested_text
from dti_ray.storage import Storage

__all__ = ["FAULT", "MALFORMED", "NOT_UTF8", "ROW", "WRONG_FIELDS", "Format", "Layout", "as_text", "nested_text"]

Kind = Literal["parquet", "csv", "jsonl"]
ENDINGS: dict[str, Kind] = {
    "parquet": "parquet", "pq": "parquet", "csv": "csv", "tsv": "csv",
    "jsonl": "jsonl", "ndjson": "jsonl", "json": "jsonl",
}  # fmt: skip
COMMAS = Layout()


@dataclass(frozen=True)
class Format:
    """How the files of one log are laid out.

    Attributes:
        kind: the format.
        layout: delimiter, quoting and names, for `csv` alone.
    """

    kind: Kind
    layout: Layout = COMMAS


def ending(file: str) -> str:
    """Return what a file's name ends with, without .gz and in small letters: `a/b.CSV.gz` is csv."""
    name = file.lower().removesuffix(GZIP).rpartition("/")[2]
    return name.rpartition(".")[2] if "." in name else ""


def headings(storage: Storage, file: str, form: Format) -> list[tuple[str, pa.DataType | None]]:
    """Return a file's columns in order, with the type where the format states one.

    Raises:
        InputError: the file is missing or damaged; StorageError: it cannot be reached.
    """
    if form.kind == "parquet":
        return [*parquet.headings(storage, file)]
    if form.kind == "jsonl":
        return jsonlines.headings(storage, file)
    return [(name, None) for name in delimited.headings(storage, file, form.layout)]


def count(storage: Storage, file: str, form: Format) -> int:
    """Return the number of a text file's rows, estimated from its first 32 MB.

    Raises:
        InputError: the file is missing or damaged; StorageError: it cannot be reached.
    """
    has_heading = form.kind == "csv" and form.layout.has_heading
    return max(lines.count(storage, file) - has_heading, 0)


def batches(
    storage: Storage,
    file: str,
    form: Format,
    columns: Mapping[str, str],
    row_groups: tuple[int, int] | None = None,
    first_row: int = 1,
) -> Iterator[pa.RecordBatch]:
    """Yield a file's rows in order, one thread, the same batches every time.

    Args:
        storage: where the file lies.
        file: its name there.
        form: how it is laid out.
        columns: name in the batch → heading in the file; two names may share a heading.
        row_groups: for Parquet, first row group and the one after the last; None reads all.
        first_row: number of the first of these rows.

    Yields:
        Batches with the keys of `columns`, then `row` (int64) and `fault` (string).

    Raises:
        InputError: the file is missing or damaged; StorageError: it cannot be reached.
    """
    if form.kind == "parquet":
        return parquet.batches(storage, file, columns, row_groups, first_row)
    if form.kind == "jsonl":
        return jsonlines.batches(storage, file, columns)
    return delimited.batches(storage, file, columns, form.layout)
