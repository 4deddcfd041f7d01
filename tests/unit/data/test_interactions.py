from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet as pq

from dti_ray.config.schema import DataConfig
from dti_ray.data.checks import INTERACTIONS
from dti_ray.data.interactions import (
    SEQUENCES,
    SPLITS,
    Boundaries,
    Dataset,
    Segment,
    UserSequences,
    global_boundaries,
    open_dataset,
    read_all,
    read_segment,
    sequences,
    write_shard,
)
from dti_ray.errors import InputError, StorageError
from dti_ray.storage import Storage

ITEM_IDS = pa.array(["a", "b", "c"])
ANY_LENGTH = DataConfig(min_interactions=1)
HALF = DataConfig(min_interactions=1, train_fraction=0.5, valid_fraction=0.25)

Row = tuple[str, int, int, int]
rows_strategy = st.lists(
    st.tuples(st.sampled_from(["u", "v", "ü"]), st.integers(0, 2), st.integers(0, 1), st.integers(0, 3)),
    max_size=30,
)


def good(rows: list[Row]) -> pa.Table:
    return pa.Table.from_pylist([dict(zip(INTERACTIONS.names, row, strict=True)) for row in rows], INTERACTIONS)


def reference(rows: list[Row], config: DataConfig) -> tuple[dict[str, list[tuple[int, int, int, int]]], Counter]:
    """Do with loops what `sequences` does with sorts."""
    users: dict[str, list[tuple[int, int, int, int]]] = {}
    refused: Counter = Counter()
    for user in sorted({row[0] for row in rows}, key=str.encode):
        kept: dict[tuple[int, int], int] = {}
        for time, item, label in sorted((row[3], row[1], row[2]) for row in rows if row[0] == user):
            if (time, item) in kept:
                refused["duplicate_event"] += 1
            else:
                kept[time, item] = label
        if len(kept) < config.min_interactions:
            refused["user_with_too_few_interactions"] += len(kept)
            continue
        first = int(config.train_fraction * len(kept) + 1e-9)
        second = int((config.train_fraction + config.valid_fraction) * len(kept) + 1e-9)
        users[user] = [
            (item, label, time, int(at >= first) + int(at >= second))
            for at, ((time, item), label) in enumerate(kept.items())
        ]
    return users, refused


def as_lists(table: pa.Table) -> dict[str, list[tuple[int, int, int, int]]]:
    return {
        row["user_id"]: list(zip(row["items"], row["labels"], row["times"], row["splits"], strict=True))
        for row in table.to_pylist()
    }


def test_worked_example() -> None:
    table, refused = sequences(good([("u", 1, 1, 7), ("u", 0, 0, 7), ("u", 2, 1, 3), ("u", 0, 1, 9)]), ITEM_IDS, HALF)
    assert table.schema.equals(SEQUENCES)
    assert as_lists(table) == {"u": [(2, 1, 3, 0), (0, 0, 7, 0), (1, 1, 7, 1), (0, 1, 9, 2)]}
    assert len(refused) == 0


@given(rows=rows_strategy, fewest=st.integers(1, 5))
def test_sequences_equal_the_slow_reference(rows: list[Row], fewest: int) -> None:
    config = HALF.model_copy(update={"min_interactions": fewest})
    table, refused = sequences(good(rows), ITEM_IDS, config)
    users, reasons = reference(rows, config)
    assert as_lists(table) == users
    assert list(as_lists(table)) == list(users)
    assert Counter(refused["reason"].to_pylist()) == reasons
    assert sum(map(len, users.values())) + len(refused) == len(rows)


@given(rows=rows_strategy, data=st.data())
def test_order_of_the_input_changes_nothing(rows: list[Row], data: st.DataObject) -> None:
    shuffled = data.draw(st.permutations(rows))
    table, refused = sequences(good(rows), ITEM_IDS, HALF)
    other_table, other_refused = sequences(good(shuffled), ITEM_IDS, HALF)
    assert table.equals(other_table)
    assert refused.equals(other_refused)


@given(rows=rows_strategy, until=st.tuples(st.integers(0, 3), st.integers(0, 3)).map(sorted))
def test_global_time_splits_at_the_boundaries(rows: list[Row], until: list[int]) -> None:
    config = ANY_LENGTH.model_copy(update={"split": "global_time"})
    table, _ = sequences(good(rows), ITEM_IDS, config, Boundaries(*until))
    for user in as_lists(table).values():
        assert [split for *_, split in user] == [int(t > until[0]) + int(t > until[1]) for _, _, t, _ in user]


@pytest.mark.parametrize(("length", "expected"), [(1, (0, 0, 1)), (5, (4, 0, 1)), (10, (7, 1, 2)), (19, (13, 2, 4))])
def test_user_time_splits_floor_the_shares(length: int, expected: tuple[int, int, int]) -> None:
    config = DataConfig(min_interactions=1, train_fraction=0.7, valid_fraction=0.1)  # 0.7 + 0.1 < 0.8 in floats
    if length == 5:
        config = ANY_LENGTH
    table, _ = sequences(good([("u", 0, 0, time) for time in range(length)]), ITEM_IDS, config)
    assert tuple(np.bincount(UserSequences.from_table(table).splits, minlength=3)) == expected


def test_duplicates_keep_one_and_quarantine_the_rest_as_understood() -> None:
    table, refused = sequences(good([("u", 1, 1, 7), ("u", 1, 0, 7), ("u", 1, 1, 8)]), ITEM_IDS, ANY_LENGTH)
    assert [row[:3] for row in as_lists(table)["u"]] == [(1, 0, 7), (1, 1, 8)]
    assert [tuple(row.values()) for row in refused.to_pylist()] == [("u", "b", "1", "7", "duplicate_event")]


def test_user_with_too_few_interactions_is_refused_after_duplicates_are_gone() -> None:
    config = DataConfig(min_interactions=2)
    rows = [("u", 1, 1, 7), ("u", 1, 1, 7), ("v", 0, 1, 1), ("v", 0, 1, 2)]
    table, refused = sequences(good(rows), ITEM_IDS, config)
    assert table["user_id"].to_pylist() == ["v"]
    assert refused["reason"].to_pylist() == ["user_with_too_few_interactions", "duplicate_event"]


def test_boundaries_are_the_earliest_seconds_that_hold_the_shares() -> None:
    times = np.array([5, 1, 1, 1, 2, 3, 4, 6, 7, 8])
    assert global_boundaries(times, DataConfig()) == Boundaries(train_until=6, valid_until=7)
    half = DataConfig(train_fraction=0.25, valid_fraction=0.15)
    assert global_boundaries(times, half) == Boundaries(train_until=1, valid_until=2)


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    """A data set of users with 1 to 9 interactions in segments of at least 10."""
    storage = Storage(str(tmp_path))
    rows = [(f"u{length}", at % 3, at % 2, at) for length in range(1, 10) for at in range(length)]
    table, _ = sequences(good(rows), ITEM_IDS, ANY_LENGTH)
    file, segments = write_shard(storage, "datasets/d", "interactions/part-00000.parquet", table, 10)
    targets = (30, 5, 10)
    made = Dataset(storage, "d", 9, 45, 3, 0.5, targets, {"null_user": 1}, tuple(segments), {"name": "d"})
    storage.write_manifest("datasets/d", [file], made.manifest())
    return made


def test_row_groups_end_with_the_user_that_fills_them(dataset: Dataset) -> None:
    # users of 1 2 3 4 | 5 6 | 7 8 | 9 interactions
    assert [(s.row_group, s.users, s.interactions) for s in dataset.segments] == [
        (0, 4, 10),
        (1, 2, 11),
        (2, 2, 15),
        (3, 1, 9),
    ]
    assert all(sum(segment.targets) == segment.interactions for segment in dataset.segments)


def test_segments_one_by_one_are_all_users(dataset: Dataset) -> None:
    whole = read_all(dataset)
    parts = [read_segment(dataset, segment) for segment in dataset.segments]
    assert whole.user_ids.tolist() == [f"u{length}" for length in range(1, 10)]
    assert np.diff(whole.offsets).tolist() == list(range(1, 10))
    for name in ("user_ids", "items", "labels", "times", "splits"):
        np.testing.assert_array_equal(np.concatenate([getattr(part, name) for part in parts]), getattr(whole, name))
    for segment, part in zip(dataset.segments, parts, strict=True):
        assert np.bincount(part.splits, minlength=len(SPLITS)).tolist() == list(segment.targets)


def test_user_sequences_have_the_documented_types(dataset: Dataset) -> None:
    users = read_all(dataset)
    found = [getattr(users, name).dtype.name for name in ("offsets", "items", "labels", "times", "splits")]
    assert found == ["int64", "int32", "int8", "int64", "int8"]


def test_slice_of_a_table_gives_only_its_users(dataset: Dataset) -> None:
    table, _ = sequences(good([("u", 0, 1, 1), ("v", 1, 0, 2), ("v", 2, 0, 3)]), ITEM_IDS, ANY_LENGTH)
    users = UserSequences.from_table(table.slice(1))
    assert (users.user_ids.tolist(), users.offsets.tolist(), users.items.tolist()) == (["v"], [0, 2], [1, 2])


def test_opened_data_set_equals_the_written_one(dataset: Dataset) -> None:
    opened = open_dataset(dataset.storage, "d")
    assert opened == dataset
    assert isinstance(opened.segments[0], Segment)


def test_data_set_without_manifest_is_refused_with_the_command(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"datasets/d: is no complete data set.*dti-ray prepare"):
        open_dataset(Storage(str(tmp_path)), "d")


def test_data_set_of_another_version_is_refused(dataset: Dataset) -> None:
    body = dataset.manifest() | {"schema_version": 99}
    dataset.storage.write_manifest("datasets/d", [], body)
    with pytest.raises(InputError, match=r"manifest\.json: has schema version 99; expected 1"):
        open_dataset(dataset.storage, "d")


def test_missing_shard_is_named(dataset: Dataset) -> None:
    dataset.storage.delete(f"datasets/d/{dataset.segments[0].shard}")
    with pytest.raises(StorageError, match=r"part-00000\.parquet: is missing; expected \d+ bytes"):
        open_dataset(dataset.storage, "d")


def test_damaged_page_is_found_when_it_is_read(dataset: Dataset) -> None:
    path = f"datasets/d/{dataset.segments[0].shard}"
    labels = pq.read_metadata(dataset.storage.path(path)).row_group(1).column(2)
    content = bytearray(dataset.storage.read(path))
    content[labels.data_page_offset + labels.total_compressed_size - 2] ^= 0xFF
    dataset.storage.write(path, bytes(content))
    with pytest.raises(StorageError, match=r"part-00000\.parquet: cannot be read: .*CRC"):
        read_segment(open_dataset(dataset.storage, "d"), dataset.segments[1])
