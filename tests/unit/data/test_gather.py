"""Scratch rows as shards: the same bytes however the rows came, a quarantine that names files, counts of times."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet as pq

from dti_ray.config.data import DataConfig
from dti_ray.data.checks import INTERACTIONS, REFUSED, Checked
from dti_ray.data.gather import QUARANTINE, Gathering, Part, count_times, gather, named, read_batch
from dti_ray.data.interactions import SEQUENCES
from dti_ray.data.scatter import _joined, by_partition
from dti_ray.data.sequences import Boundaries
from dti_ray.errors import StorageError
from dti_ray.storage import Storage

ITEM_IDS = pa.array(["a", "b", "c"])
CONFIG = DataConfig(min_interactions=2)
FILES = ("logs/a.csv", "logs/b.csv")
PARTITIONS = 3

Row = tuple[str, int, int, int]  # user, item, label, time
RANDOM = np.random.default_rng(0)
LOG: list[Row] = [
    (f"user {RANDOM.integers(40)}", int(RANDOM.integers(3)), int(RANDOM.integers(2)), int(RANDOM.integers(5_000)))
    for _ in range(400)
]


def write_block(storage: Storage, path: str, rows: Sequence[Row], refused: Sequence[dict[str, object]] = ()) -> str:
    """Write a scratch file as `scatter` does, of rows that are checked already."""
    tree = [dict(zip(INTERACTIONS.names, (*row, at % 2, at), strict=True)) for at, row in enumerate(rows)]
    good, bad = pa.Table.from_pylist(tree, INTERACTIONS), pa.Table.from_pylist(list(refused), REFUSED)
    checked = Checked(good, bad, np.zeros(len(rows), np.int8))
    storage.write(path, by_partition(_joined(checked), PARTITIONS))
    return path


def gather_all(storage: Storage, blocks: Sequence[str], data: DataConfig = CONFIG, **settings: object) -> list[Part]:
    job = Gathering(FILES, tuple(blocks), 1, 10, **settings)  # pyright: ignore[reportArgumentType]
    return [gather(partition, job, ITEM_IDS, data, storage, "d") for partition in range(PARTITIONS)]


def shards(storage: Storage) -> dict[str, bytes]:
    return {path: storage.read(path) for path in storage.list("d/interactions")}


def test_shards_have_the_same_bytes_for_any_order_and_any_division_of_the_rows(tmp_path: Path) -> None:
    once = Storage(str(tmp_path / "once"))
    parts = gather_all(once, [write_block(once, "rows-0", LOG)])
    assert len(shards(once)) == PARTITIONS
    for seed in range(3):
        rng = np.random.default_rng(seed)
        order, cuts = rng.permutation(len(LOG)), sorted(rng.integers(0, len(LOG), 3).tolist())
        other = Storage(str(tmp_path / f"other {seed}"))
        blocks = [
            write_block(other, f"rows-{number}", [LOG[at] for at in order[start:stop]])
            for number, (start, stop) in enumerate(zip([0, *cuts], [*cuts, len(LOG)], strict=True))
        ]
        again = gather_all(other, blocks)
        assert shards(other) == shards(once)
        assert [part.segments for part in again] == [part.segments for part in parts]
        assert [part.quarantined for part in again] == [part.quarantined for part in parts]


def test_part_says_what_was_written(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    refused = [{"user_id": "user 1", "reason": "null_item", "file": 1, "row": 7}]
    parts = gather_all(storage, [write_block(storage, "rows-0", LOG, refused)])
    tables = [pq.read_table(tmp_path / "d" / f"interactions/part-0000{p}.parquet") for p in range(PARTITIONS)]
    lengths: Counter[int] = Counter()
    for part, table in zip(parts, tables, strict=True):
        assert table.schema.equals(SEQUENCES)
        assert part.clicks == sum(map(sum, table["labels"].to_pylist()))
        sizes = [len(items) for items in table["items"].to_pylist()]
        assert sum(segment.interactions for segment in part.segments) == sum(sizes)
        assert all(segment.interactions >= 10 for segment in part.segments[:-1])
        lengths.update(size.bit_length() - 1 for size in sizes)
        for file in part.files:
            content = storage.read(f"d/{file.path}")
            assert (file.size_bytes, file.path.partition("/")[0]) in (
                (len(content), "interactions"),
                (len(content), "quarantine"),
            )
    assert sum((Counter(dict(enumerate(part.user_lengths))) for part in parts), Counter()) == lengths
    lost = sum((Counter(part.quarantined) for part in parts), Counter())
    kept = sum(segment.interactions for part in parts for segment in part.segments)
    assert kept + lost.total() == len(LOG) + 1
    assert lost["null_item"] == 1


def test_part_comes_back_from_json(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    for part in gather_all(storage, [write_block(storage, "rows-0", LOG)]):
        assert Part.parse(json.loads(json.dumps(part.tree()))) == part


def test_quarantine_names_file_and_row_and_is_sorted_by_them(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    refused = [
        {"user_id": "x", "item_id": "9", "label": "a", "time": "5", "reason": "time_not_in_s", "file": 1, "row": 9},
        {"user_id": "x", "item_id": None, "label": "3", "time": "5", "reason": "null_item", "file": 0, "row": 12},
        {"user_id": None, "reason": "not_utf8", "file": 0, "row": 3},
    ]  # fmt: skip
    rows = [("x", 1, 1, 7), ("x", 1, 0, 7), ("x", 2, 1, 8), ("lone", 0, 1, 7)]
    gather_all(storage, [write_block(storage, "rows-0", rows, refused)])
    paths = storage.list("d/quarantine")
    table = pa.concat_tables(pq.read_table(storage.path(path)) for path in paths)
    assert table.schema.equals(QUARANTINE)
    found = [tuple(row.values()) for row in table.to_pylist()]
    assert sorted(found, key=str) == sorted(
        [
            ("x", "9", "a", "5", "time_not_in_s", "logs/b.csv", 9),
            ("x", None, "3", "5", "null_item", "logs/a.csv", 12),
            (None, None, None, None, "not_utf8", "logs/a.csv", 3),
            ("x", "b", "1", "7", "duplicate_event", "logs/a.csv", 0),
            ("lone", "a", "1", "7", "user_with_too_few_interactions", "logs/b.csv", 3),
        ],
        key=str,
    )
    for path in paths:
        places = [(row["file"], row["row"]) for row in pq.read_table(storage.path(path)).to_pylist()]
        assert places == sorted(places)


def test_partition_without_users_or_refused_rows_writes_no_file(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    block = write_block(storage, "rows-0", [("u", 0, 1, 1), ("u", 1, 1, 2)])
    parts = gather_all(storage, [block])
    assert sorted(len(part.files) for part in parts) == [0, 0, 1]
    (empty, *_) = [part for part in parts if not part.files]
    assert empty == Part([], [], 0, {}, ())
    assert len(storage.list("d", recursive=True)) == 1


def test_global_time_uses_the_boundaries_of_the_whole_log(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    config = CONFIG.model_copy(update={"split": "global_time"})
    gather_all(storage, [write_block(storage, "rows-0", LOG)], config, boundaries=Boundaries(2000, 3000))
    for path in storage.list("d/interactions"):
        for row in pq.read_table(storage.path(path)).to_pylist():
            assert row["splits"] == [int(time > 2000) + int(time > 3000) for time in row["times"]]


def test_lost_scratch_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"scratch/rows-00000-00000\.arrow: is missing or damaged"):
        read_batch(Storage(str(tmp_path)), "scratch/rows-00000-00000.arrow", 0)
    with pytest.raises(StorageError, match=r"scratch/rows-00000-00000\.arrow: is missing or damaged"):
        count_times(Storage(str(tmp_path)), "scratch/rows-00000-00000.arrow", 1, None)


@pytest.mark.parametrize("content", [b"", b"ARROW1", b"x" * 500])
def test_damaged_scratch_file_is_named_with_what_to_delete(tmp_path: Path, content: bytes) -> None:
    storage = Storage(str(tmp_path))
    storage.write("d/scratch/rows-0.arrow", content)
    expected = rf"rows-0\.arrow: is missing or damaged: .*; delete {tmp_path}/d/scratch and run the same command"
    with pytest.raises(StorageError, match=expected):
        read_batch(storage, "d/scratch/rows-0.arrow", 0)
    with pytest.raises(StorageError, match=expected):
        count_times(storage, "d/scratch/rows-0.arrow", 1, None)


@given(
    times=st.lists(st.integers(-50, 50), max_size=40),
    width=st.integers(1, 20),
    within=st.none() | st.tuples(st.integers(-50, 50), st.integers(-50, 50)),
)
def test_times_are_counted_as_a_loop_counts_them(
    tmp_path_factory: pytest.TempPathFactory, times: list[int], width: int, within: tuple[int, int] | None
) -> None:
    storage = Storage(str(tmp_path_factory.mktemp("times")))
    rows = [(f"u{at % 5}", 0, 1, time) for at, time in enumerate(times)]
    block = write_block(storage, "rows-0", rows, [{"user_id": "u", "reason": "null_item", "file": 0, "row": 1}])
    tree = json.loads(json.dumps(count_times(storage, block, width, within)))
    expected = Counter(time // width for time in times if within is None or within[0] <= time < within[1])
    assert dict(zip(tree["buckets"], tree["counts"], strict=True)) == expected


def test_named_rows_without_a_row_keep_their_file() -> None:
    table = pa.Table.from_pylist([{"reason": "unreadable_file", "file": 1}], REFUSED)
    assert named(table, FILES).to_pylist() == [
        dict(zip(QUARANTINE.names, [None] * 4 + ["unreadable_file", "logs/b.csv", None], strict=True))
    ]
