"""Parquet files: cut at row groups, read in batches, each page held against its checksum.

Stage: sources. In: an open file. Out: batches with the wanted columns, `row` and `fault`.
Invariant: a row group lies in one piece, and a batch never spans two pieces; types stay as the file has them.

    row groups of 3, 3 and 2 million rows   →   pieces: groups 0 to 1 from row 1, group 2 from row 6,000,001
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pyarrow as pa
from pyarrow import parquet as pq

from dti_ray.data.sources.files import random_access
from dti_ray.data.sources.values import check_present, marked
from dti_ray.storage import Storage

BATCH_ROWS = 1 << 17


def headings(storage: Storage, file: str) -> list[tuple[str, pa.DataType]]:
    """Return the columns in order, each with its type."""
    with random_access(storage, file) as source, pq.ParquetFile(source) as parquet:
        schema = parquet.schema_arrow
        return list(zip(schema.names, schema.types, strict=True))


def row_group_rows(storage: Storage, file: str) -> list[int]:
    """Return the number of rows of each row group."""
    with random_access(storage, file) as source, pq.ParquetFile(source) as parquet:
        return [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]


def cut(rows: list[int], piece_rows: int) -> list[tuple[int, int]]:
    """Cut row groups into runs of at most about `piece_rows` rows: a run ends before it would pass that.

    Returns:
        (first row group, the one after the last) of each run.
    """
    runs, start, held = [], 0, 0
    for group, count in enumerate(rows):
        if held and held + count > piece_rows:
            runs.append((start, group))
            start, held = group, 0
        held += count
    return [*runs, (start, len(rows))] if rows else [(0, 0)]


def batches(
    storage: Storage,
    file: str,
    columns: Mapping[str, str],
    row_groups: tuple[int, int] | None,
    first_row: int,
    batch_rows: int = BATCH_ROWS,
) -> Iterator[pa.RecordBatch]:
    """Yield a file's rows, or those of some row groups, up to `batch_rows` at a time; see `formats.batches`."""
    with (
        random_access(storage, file) as source,
        pq.ParquetFile(source, page_checksum_verification=True, memory_map=False) as parquet,
    ):
        check_present(columns.values(), parquet.schema_arrow.names, storage.display(file))
        groups = range(*(row_groups or (0, parquet.num_row_groups)))
        for batch in parquet.iter_batches(batch_rows, list(groups), sorted(set(columns.values())), use_threads=False):
            yield marked({name: batch[heading] for name, heading in columns.items()}, first_row, rows=len(batch))
            first_row += len(batch)
