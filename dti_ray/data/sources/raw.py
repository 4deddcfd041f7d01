"""What every source delivers: a log cut into pieces, each of them read as batches.

Stage: sources. In: files that a source has found. Out: `RawLog`; a task reads one `Piece` of it at a time.
Invariant: a source converts names, never values: columns keep the type that the file gives them (text in CSV),
and whether a value is any good is for `checks` to say. Only what is no row at all (a line with too few fields, bytes
that are no UTF-8) is marked here, in `fault`. A piece gives the same batches every time, in any process.

    file 0, rows 1 to 3        user_id item_id time       label.rating row fault
    196  242  881250949  3     "196"   "242"   "8812…"    "3"          1   null
    186  302  891717742        null    null    null       null         2   "wrong_number_of_fields"
    22   377  878887116  1     "22"    "377"   "8788…"    "1"          3   null
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import accumulate

import pyarrow as pa

from dti_ray.data.sources import formats, parquet
from dti_ray.data.sources.formats import Format
from dti_ray.errors import InputError
from dti_ray.storage import Storage

USER, ITEM, TIME = "user_id", "item_id", "time"
LABEL = "label."  # in front of the heading of each column that the label's definition names
ROW, FAULT = formats.ROW, formats.FAULT

PIECE_ROWS = 4_000_000  # of Parquet: what one task holds while it groups rows by user
OPEN_FILES = 8  # files whose ends or beginnings are read at a time; in object storage each is a round trip


@dataclass(frozen=True)
class Piece:
    """What one task reads: a file, or some row groups of a Parquet file.

    Attributes:
        file: index into `RawLog.files`.
        rows: number of rows: exact for Parquet, by line ends for text and estimated beyond its first 32 MB; 0 for a
            file that cannot be read.
        row_groups: first row group and the one after the last; None reads the whole file.
        first_row: number of the piece's first row in its file, from 1.
    """

    file: int
    rows: int
    row_groups: tuple[int, int] | None = None
    first_row: int = 1


@dataclass(frozen=True)
class RawLog:
    """The raw files of one log and how an interaction is read from them.

    Attributes:
        storage: what the paths are relative to.
        files: files of interactions, sorted; all have the needed columns. `archive.zip!member` is a file in a zip.
        format: how the files are laid out.
        columns: canonical name (`user_id`, `item_id`, `time`, `label.<heading>`) → heading in the files.
        catalogue: files of items as a user would type them; empty where the log itself holds what is known of an item.
        item_columns: without a catalogue: name in the ItemTable (`item_id` first) → heading in the log.
        read_catalogue: reads the catalogue, all of it; None where `catalogue` is empty.
    """

    storage: Storage
    files: tuple[str, ...]
    format: Format
    columns: Mapping[str, str]
    catalogue: tuple[str, ...] = ()
    item_columns: Mapping[str, str] = field(default_factory=dict)
    read_catalogue: Callable[[], pa.Table] | None = None

    def pieces(self) -> list[Piece]:
        """Cut the log into what tasks read, in the order of files and rows.

        A file that is damaged or has vanished is one piece of no row: whoever reads it is told what is wrong.

        Raises:
            StorageError: a file cannot be reached.
        """
        with ThreadPoolExecutor(OPEN_FILES) as pool:
            return [piece for pieces in pool.map(self._pieces_of, range(len(self.files))) for piece in pieces]

    def batches(self, piece: Piece) -> Iterator[pa.RecordBatch]:
        """Yield a piece's rows: the keys of `columns`, then `row` (int64, in the file, from 1) and `fault` (string).

        Raises:
            InputError: the file is missing or damaged; StorageError: it cannot be reached.
        """
        return self._read(piece, self.columns)

    def item_batches(self, piece: Piece) -> Iterator[pa.RecordBatch]:
        """Yield the same rows with the keys of `item_columns` instead, and without `row` and `fault`.

        Raises:
            InputError: the file is missing or damaged; StorageError: it cannot be reached.
        """
        numbered = {
            str(i): heading for i, heading in enumerate(self.item_columns.values())
        }  # a text may be named "row"
        for batch in self._read(piece, numbered):
            yield batch.select(list(numbered)).rename_columns(list(self.item_columns))

    def _read(self, piece: Piece, columns: Mapping[str, str]) -> Iterator[pa.RecordBatch]:
        file = self.files[piece.file]
        return formats.batches(self.storage, file, self.format, columns, piece.row_groups, piece.first_row)

    def _pieces_of(self, file: int) -> list[Piece]:
        try:
            if self.format.kind != "parquet":
                return [Piece(file, formats.count(self.storage, self.files[file], self.format))]
            rows = parquet.row_group_rows(self.storage, self.files[file])
        except InputError:
            return [Piece(file, 0)]
        first_rows = list(accumulate(rows, initial=1))
        return [
            Piece(file, sum(rows[start:stop]), (start, stop), first_rows[start])
            for start, stop in parquet.cut(rows, PIECE_ROWS)
        ]
