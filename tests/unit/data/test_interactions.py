"""A data set on disk: segments, the manifest that makes it complete, and damage that is found."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet as pq

from dti_ray.data.interactions import (
    ITEMS_FILE,
    SCHEMA_VERSION,
    SEQUENCES,
    SPLITS,
    Dataset,
    Segment,
    UserSequences,
    log2_histogram,
    open_dataset,
    read_all,
    read_items,
    read_segment,
    segment_columns,
    segments_of,
    split_by_weight,
    verify_dataset,
    write_shard,
)
from dti_ray.errors import InputError, StorageError
from dti_ray.storage import FileEntry, Storage

counts = st.integers(0, 10**12)
shards = st.lists(
    st.lists(st.tuples(counts, counts, st.tuples(counts, counts, counts)), min_size=1, max_size=5), max_size=5
)


SHARD = "interactions/part-00000.parquet"


def users(lengths: list[int]) -> pa.Table:
    """Return users u0, u1, … with so many interactions, one a second: the last for test, the one before to validate."""
    rows = []
    for at, length in enumerate(lengths):
        order = list(range(length))
        splits = [max(0, i + 3 - length) for i in order]
        rows.append((f"u{at}", [i % 3 for i in order], [i % 2 for i in order], order, splits))
    return pa.Table.from_pylist([dict(zip(SEQUENCES.names, row, strict=True)) for row in rows], SEQUENCES)


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    """A data set of users with 1 to 9 interactions in segments of at least 10."""
    storage = Storage(str(tmp_path))
    file, segments = write_shard(storage, "datasets/d", SHARD, users(list(range(1, 10))), 10)
    pq.write_table(pa.table({"item_id": ["a", "b", "c"]}), tmp_path / "items.parquet")
    items = storage.write(f"datasets/d/{ITEMS_FILE}", (tmp_path / "items.parquet").read_bytes())
    made = Dataset(
        storage, "d", 9, 45, 3, 0.5, (28, 8, 9), {"null_user": 1}, tuple(segments), {"name": "d"},
        log2_histogram(np.arange(1, 10)), (3,),
    )  # fmt: skip
    files = [file, FileEntry(ITEMS_FILE, items.size_bytes, items.sha256)]
    storage.write_manifest("datasets/d", files, made.manifest())
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
    assert whole.user_ids.tolist() == [f"u{at}" for at in range(9)]
    assert np.diff(whole.offsets).tolist() == list(range(1, 10))
    for name in ("user_ids", "items", "labels", "times", "splits"):
        np.testing.assert_array_equal(np.concatenate([getattr(part, name) for part in parts]), getattr(whole, name))
    for segment, part in zip(dataset.segments, parts, strict=True):
        assert np.bincount(part.splits, minlength=len(SPLITS)).tolist() == list(segment.targets)


def test_user_sequences_have_the_documented_types(dataset: Dataset) -> None:
    whole = read_all(dataset)
    found = [getattr(whole, name).dtype.name for name in ("offsets", "items", "labels", "times", "splits")]
    assert found == ["int64", "int32", "int8", "int64", "int8"]


def test_slice_of_a_table_gives_only_its_users(dataset: Dataset) -> None:
    part = UserSequences.from_table(users([1, 2, 3]).slice(1, 1))
    assert (part.user_ids.tolist(), part.offsets.tolist(), part.items.tolist()) == (["u1"], [0, 2], [0, 1])


def test_opened_data_set_equals_the_written_one(dataset: Dataset) -> None:
    opened = open_dataset(dataset.storage, "d")
    assert opened == dataset
    assert isinstance(opened.segments[0], Segment)
    assert read_items(opened)["item_id"].to_pylist() == ["a", "b", "c"]
    verify_dataset(opened)


@given(
    parts=shards,
    numbers=st.lists(counts, min_size=3, max_size=3),
    rate=st.floats(0, 1),
    quarantined=st.dictionaries(st.text(min_size=1), counts, max_size=3),
    histograms=st.tuples(st.lists(counts, max_size=40), st.lists(counts, max_size=20)),
)
def test_manifest_gives_back_every_data_set(
    parts: list[list[tuple[int, int, tuple[int, int, int]]]],
    numbers: list[int],
    rate: float,
    quarantined: dict[str, int],
    histograms: tuple[list[int], list[int]],
) -> None:
    segments = tuple(
        Segment(f"interactions/part-{shard:05d}.parquet", group, *values)
        for shard, groups in enumerate(parts)
        for group, values in enumerate(groups)
    )
    config = {"name": "d", "columns": {"text": ["a", "b"]}, "path": None, "train_fraction": 0.8}
    made = Dataset(
        Storage("."), "d", numbers[0], numbers[1], numbers[2], rate, (1, 2, 3), quarantined, segments, config,
        tuple(histograms[0]), tuple(histograms[1]),
    )  # fmt: skip
    tree = json.loads(json.dumps(made.manifest()))
    assert tree["schema_version"] == SCHEMA_VERSION
    assert Dataset.parse(made.storage, [], tree) == made
    assert list(segments_of(segment_columns(segments))) == list(segments)


def test_manifest_has_few_bytes_per_segment() -> None:
    segments = [
        Segment(f"interactions/part-{at // 1000:05d}.parquet", at % 1000, 9, 1050, (840, 100, 110))
        for at in range(5000)
    ]
    assert len(json.dumps(segment_columns(segments))) < 30 * len(segments)


@given(st.lists(st.integers(1, 2**40), max_size=50), st.integers(0, 40))
def test_histogram_counts_by_the_power_of_two_reached(lengths: list[int], power: int) -> None:
    lengths += [2**power, 2**power - 1 or 1]
    expected = [0] * (max(lengths).bit_length())
    for length in lengths:
        expected[length.bit_length() - 1] += 1
    assert log2_histogram(np.array(lengths, np.int64)) == tuple(expected)


def test_histogram_of_nothing_is_empty_and_an_empty_text_counts_as_one_word() -> None:
    assert log2_histogram(np.array([], np.int64)) == ()
    assert log2_histogram(np.array([0, 1, 2, 3, 4], np.int64)) == (2, 2, 1)


def test_data_set_without_manifest_is_refused_with_the_command(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"datasets/d: is no complete data set.*dti-ray prepare"):
        open_dataset(Storage(str(tmp_path)), "d")


@pytest.mark.parametrize("version", [1, 99, None])
def test_data_set_of_another_version_is_refused(dataset: Dataset, version: int | None) -> None:
    body = dataset.manifest() | {"schema_version": version}
    dataset.storage.write_manifest("datasets/d", [], body)
    with pytest.raises(
        InputError, match=rf"manifest\.json: has schema version {version}; expected 2; delete the folder"
    ):
        open_dataset(dataset.storage, "d")


def test_every_missing_or_truncated_file_is_named_at_once(dataset: Dataset) -> None:
    content = dataset.storage.read(f"datasets/d/{SHARD}")
    dataset.storage.write(f"datasets/d/{SHARD}", content[:-1])
    dataset.storage.delete(f"datasets/d/{ITEMS_FILE}")
    with pytest.raises(StorageError) as error:
        open_dataset(dataset.storage, "d")
    assert [(fault.where.rpartition("/")[2], fault.problem) for fault in error.value.faults] == [
        ("part-00000.parquet", f"has {len(content) - 1} bytes"),
        ("items.parquet", "is missing"),
    ]
    assert error.value.faults[0].expected == f"{len(content)} bytes as in the manifest"


def test_shard_of_other_content_and_the_same_size_is_named(dataset: Dataset) -> None:
    path = f"datasets/d/{SHARD}"
    before = dataset.storage.read(path)
    table = pq.read_table(pa.BufferReader(before))
    labels = table["labels"].combine_chunks()
    other = pa.ListArray.from_arrays(labels.offsets, pa.array(1 - labels.flatten().to_numpy(), pa.int8()))
    write_shard(dataset.storage, "datasets/d", SHARD, table.set_column(2, "labels", other), 10)
    assert len(dataset.storage.read(path)) == len(before)
    opened = open_dataset(dataset.storage, "d")
    assert read_all(opened).labels.tolist() != labels.flatten().to_pylist(), "it is valid Parquet"
    with pytest.raises(StorageError, match=r"part-00000\.parquet: has hash [0-9a-f]{12}… and \d+ bytes; expected "):
        verify_dataset(opened)


@pytest.mark.parametrize("place", [0, 100, -3])
def test_shard_with_one_changed_byte_is_named(dataset: Dataset, place: int) -> None:
    path = f"datasets/d/{SHARD}"
    content = bytearray(dataset.storage.read(path))
    content[place] ^= 0xFF
    dataset.storage.write(path, bytes(content))
    with pytest.raises(StorageError, match=r"part-00000\.parquet: has hash .* was changed after it was written"):
        verify_dataset(open_dataset(dataset.storage, "d"))


def test_shard_that_vanished_after_it_was_opened_is_named(dataset: Dataset) -> None:
    opened = open_dataset(dataset.storage, "d")
    dataset.storage.delete(f"datasets/d/{SHARD}")
    with pytest.raises(StorageError, match=r"part-00000\.parquet: cannot be read"):
        verify_dataset(opened)
    with pytest.raises(StorageError, match=r"part-00000\.parquet: cannot be read"):
        read_segment(opened, opened.segments[0])


def test_damaged_page_is_found_when_it_is_read(dataset: Dataset) -> None:
    path = f"datasets/d/{SHARD}"
    labels = pq.read_metadata(dataset.storage.path(path)).row_group(1).column(2)
    content = bytearray(dataset.storage.read(path))
    content[labels.data_page_offset + labels.total_compressed_size - 2] ^= 0xFF
    dataset.storage.write(path, bytes(content))
    with pytest.raises(StorageError, match=r"part-00000\.parquet: cannot be read: .*CRC"):
        read_segment(dataset, dataset.segments[1])
    opened = open_dataset(dataset.storage, "d")
    with pytest.raises(StorageError, match=r"part-00000\.parquet: has hash .* as in its manifest"):
        read_segment(opened, dataset.segments[1])
    assert len(read_segment(opened, dataset.segments[0]).items) == 10, "the other pages are whole"


@given(st.lists(st.integers(0, 9)), st.floats(0.5, 20))
def test_neighbours_of_some_weight_lie_together_and_none_is_lost(weights: list[int], least: float) -> None:
    parts = list(split_by_weight(weights, int, least))
    assert [weight for part in parts for weight in part] == weights
    assert all(sum(part) >= least > sum(part[:-1]) for part in parts[:-1])
    assert all(sum(part[:-1]) < least for part in parts)
