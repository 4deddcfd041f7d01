from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from pyarrow import parquet as pq

from dti_ray.config.load import load_config
from dti_ray.config.schema import RunConfig
from dti_ray.data.interactions import Dataset, open_dataset, read_all, read_items, read_segment
from dti_ray.data.prepare import prepare
from dti_ray.data.sources.movielens import fetch
from dti_ray.errors import InputError, StorageError
from dti_ray.storage import FileEntry, Storage

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("ray_cluster")]

PREPARED = {f"datasets/tiny/{file}" for file in ("manifest.json", "items.parquet", "interactions/part-00000.parquet")}
ITEMS = [(item, f"Film {item}", 1990 + item, "Drama") for item in range(1, 13)]
GOOD = [(user, item, item % 5 + 1, 100 * user + item // 2) for user in range(1, 8) for item in range(1, user + 5)]
BAD = [
    ("", 1, 3, 5),
    (1, "", 3, 5),
    (1, 1, "good", 5),
    (1, 1, 3, "noon"),
    (1, 99, 3, 5),
    (2, 1, 2, 200),  # an event of GOOD again
    ("lone", 1, 3, 5),
]
REASONS = {
    "duplicate_event": 1,
    "item_not_in_catalogue": 1,
    "null_item": 1,
    "null_user": 1,
    "rating_not_numeric": 1,
    "time_not_numeric": 1,
    "user_with_too_few_interactions": 1,
}


def tiny(*overrides: str) -> RunConfig:
    return load_config([], ["data.name=tiny", *overrides])


def contents(dataset: Dataset) -> dict[str, bytes]:
    return {path: dataset.storage.read(path) for path in dataset.storage.list(dataset.folder, recursive=True)}


def silent(done: int, total: int | None) -> None:
    """Report progress to nobody."""


def quarantined(dataset: Dataset) -> list[dict[str, str]]:
    files = [path for path in contents(dataset) if "/quarantine/" in path]
    return [row for path in files for row in pq.read_table(dataset.storage.path(path)).to_pylist()]


def test_good_rows_are_laid_down_and_bad_ones_counted(tmp_path: Path, write_raw) -> None:
    write_raw([*GOOD, *BAD], ITEMS)
    dataset = prepare(tiny(), Storage(str(tmp_path)))
    users = read_all(dataset)
    assert (dataset.users, dataset.interactions, dataset.items) == (7, len(GOOD), 12)
    assert users.user_ids.tolist() == [str(user) for user in range(1, 8)]
    assert sum(dataset.targets) == len(GOOD) == len(users.items)
    assert dataset.targets == tuple(np.bincount(users.splits, minlength=3))
    assert dataset.label_rate == pytest.approx(np.mean([row[2] > 3 for row in GOOD]))
    assert dataset.quarantined == REASONS
    assert Counter(row["reason"] for row in quarantined(dataset)) == REASONS
    assert {
        "user_id": "1",
        "item_id": "1",
        "label": "good",
        "time": "5",
        "reason": "rating_not_numeric",
    } in quarantined(dataset)


def test_item_indices_point_into_the_stored_catalogue(tmp_path: Path, write_raw) -> None:
    write_raw(GOOD, ITEMS)
    dataset = prepare(tiny(), Storage(str(tmp_path)))
    ids = read_items(dataset)["item_id"].to_pylist()
    users = read_all(dataset)
    assert ids == sorted(str(item[0]) for item in ITEMS)
    first = [(int(ids[i]), int(t)) for i, t in zip(users.items[:5], users.times[:5], strict=True)]
    assert first == [(row[1], row[3]) for row in GOOD[:5]]


@pytest.mark.parametrize("split", ["user_time", "global_time"])
def test_data_set_is_the_same_for_shuffled_rows_and_several_files(tmp_path: Path, write_raw, split: str) -> None:
    rows = [*GOOD, *BAD]
    folder = write_raw(rows, ITEMS)
    config = tiny("data.shard_interactions=20", "data.segment_interactions=8", f"data.split={split}")
    first = prepare(config, Storage(str(tmp_path)))
    before = contents(first)
    assert len({segment.shard for segment in first.segments}) > 1

    first.storage.delete(first.folder)
    shuffled = [rows[at] for at in np.random.default_rng(0).permutation(len(rows))]
    write_raw(shuffled[:30], ITEMS)
    (folder / "tiny.inter").rename(folder / "second.inter")
    write_raw([], ITEMS)
    (folder / "tiny.inter").rename(folder / "heading_alone.inter")
    write_raw(shuffled[30:], ITEMS)
    assert contents(prepare(config, Storage(str(tmp_path)))) == before


@pytest.mark.parametrize("file", ["scratch/00000-00001.arrow", "interactions/part-00002.parquet"])
def test_worker_that_dies_after_a_write_changes_nothing(tmp_path: Path, write_raw, file: str) -> None:
    class Deadly(Storage):
        def write(self, path: str, content: bytes) -> FileEntry:
            entry = super().write(path, content)
            if path.endswith(file) and not self.exists("died"):
                super().write("died", b"once")
                os._exit(1)
            return entry

    write_raw([(row % 50, row % 12 + 1, row % 5 + 1, 880_000_000 + row) for row in range(80_000)], ITEMS)
    config = tiny("data.shard_interactions=20_000")  # the log is two blocks, the data set four shards
    first = prepare(config, Storage(str(tmp_path)))
    before = contents(first)
    first.storage.delete(first.folder)
    assert contents(prepare(config, Deadly(str(tmp_path)))) == before
    assert first.storage.exists("died")
    assert (first.interactions, len({segment.shard for segment in first.segments})) == (80_000, 4)


def test_shards_hold_every_user_once_and_segments_are_row_groups(tmp_path: Path, write_raw) -> None:
    write_raw(GOOD, ITEMS)
    config = tiny("data.shard_interactions=20", "data.segment_interactions=8")
    dataset = prepare(config, Storage(str(tmp_path)))
    users = [user for s in dataset.segments for user in read_segment(dataset, s).user_ids.tolist()]
    assert sorted(users) == [str(user) for user in range(1, 8)]
    assert users == read_all(dataset).user_ids.tolist()


def test_global_time_puts_the_oldest_interactions_into_training(tmp_path: Path, write_raw) -> None:
    write_raw(GOOD, ITEMS)
    dataset = prepare(tiny("data.split=global_time", "data.train_fraction=0.5"), Storage(str(tmp_path)))
    users = read_all(dataset)
    train, valid, test = (users.times[users.splits == split] for split in range(3))
    assert train.max() < valid.min() <= valid.max() < test.min()
    assert len(train) >= 0.5 * len(GOOD)


def test_existing_data_set_is_opened_and_not_written_again(tmp_path: Path, write_raw) -> None:
    folder = write_raw(GOOD, ITEMS)
    storage = Storage(str(tmp_path))
    dataset = prepare(tiny(), storage)
    (folder / "tiny.inter").unlink()
    again = prepare(tiny("optim.lr=0.1"), storage)
    assert again == dataset


def test_existing_data_set_with_another_configuration_is_refused(tmp_path: Path, write_raw) -> None:
    write_raw(GOOD, ITEMS)
    storage = Storage(str(tmp_path))
    prepare(tiny(), storage)
    with pytest.raises(InputError) as error:
        prepare(tiny("data.label_threshold=2", "data.min_interactions=6"), storage)
    assert [str(fault).partition(" as in ")[0] for fault in error.value.faults] == [
        "data.label_threshold: got 2.0; expected 3.0",
        "data.min_interactions: got 6; expected 5",
    ]
    assert all(fault.hint == "choose another data.name" for fault in error.value.faults)
    assert open_dataset(storage, "tiny").data_config["min_interactions"] == 5


def test_what_a_broken_attempt_left_is_deleted(tmp_path: Path, write_raw) -> None:
    write_raw(GOOD, ITEMS)
    storage = Storage(str(tmp_path))
    storage.write("datasets/tiny/interactions/part-00009.parquet", b"half")
    storage.write("datasets/tiny/scratch/00000-00009.arrow", b"half")
    assert contents(prepare(tiny(), storage)).keys() == PREPARED


@pytest.mark.parametrize(
    ("rows", "counts"),
    [
        ([], "none, the raw files hold no row"),
        (
            [("", 1, 3, 5), (1, 1, "x", 5), (1, 1, 3, 5)],
            "1 null_user, 1 rating_not_numeric, 1 user_with_too_few",
        ),
    ],
)
def test_empty_data_set_is_refused_with_the_counts(tmp_path: Path, write_raw, rows, counts: str) -> None:
    write_raw(rows, ITEMS)
    storage = Storage(str(tmp_path))
    with pytest.raises(InputError, match=f"no interaction is left; quarantined: {counts}"):
        prepare(tiny(), storage)
    assert storage.read_manifest("datasets/tiny") is None


def test_global_time_of_bad_rows_alone_is_refused_too(tmp_path: Path, write_raw) -> None:
    write_raw([("", 1, 3, 5)], ITEMS)
    with pytest.raises(InputError, match="quarantined: 1 null_user"):
        prepare(tiny("data.split=global_time"), Storage(str(tmp_path)))


def test_malformed_line_is_named(tmp_path: Path, write_raw) -> None:
    write_raw([*GOOD, (1, 2, 3)], ITEMS)
    # the heading is read in one block with the rest of so small a file
    with pytest.raises(InputError, match=r"tiny\.inter: cannot be read as a table: .*Expected 4 columns, got 3"):
        prepare(tiny(), Storage(str(tmp_path)))


def test_malformed_line_far_down_is_named(tmp_path: Path, write_raw, capfd) -> None:
    rows = [(1, 2, 3, time) for time in range(150_000)]
    write_raw([*rows, (1, 2, 3)], ITEMS)
    with pytest.raises(InputError, match=r"tiny\.inter: cannot be read as a table: .*Expected 4 columns, got 3"):
        prepare(tiny(), Storage(str(tmp_path)))
    assert capfd.readouterr() == ("", ""), "the error says all"


def test_error_inside_a_task_reaches_the_caller_as_itself(tmp_path: Path, write_raw) -> None:
    raw = write_raw(GOOD, ITEMS)
    root = tmp_path / "root"
    root.mkdir()
    (root / "datasets").write_text("a file where a folder must be")
    with pytest.raises(StorageError, match="cannot be written") as error:
        prepare(tiny(f"data.path={raw}"), Storage(str(root)))
    assert type(error.value) is StorageError


def test_scratch_file_that_is_lost_is_named(tmp_path: Path, write_raw) -> None:
    class Losing(Storage):
        def write(self, path: str, content: bytes) -> FileEntry:
            entry = super().write(path, content)
            if "/scratch/" in path:
                self.delete(path)
            return entry

    write_raw(GOOD, ITEMS)
    with pytest.raises(StorageError, match=r"datasets/tiny/scratch/00000-00000\.arrow: cannot be read: "):
        prepare(tiny(), Losing(str(tmp_path)))


def test_unexpected_error_carries_the_trace_that_ray_data_logs(tmp_path: Path, write_raw, capfd) -> None:
    class Broken(Storage):
        def write(self, path: str, content: bytes) -> FileEntry:
            raise ZeroDivisionError(f"{len(content)} bytes for {path}")

    write_raw(GOOD, ITEMS)
    with pytest.raises(ZeroDivisionError) as error:
        prepare(tiny(), Broken(str(tmp_path)))
    (note,) = error.value.__notes__
    assert "Full stack trace" in note
    assert "streaming_executor.py" in note, "frames inside Ray Data"
    assert capfd.readouterr() == ("", "")


def test_movielens_100k_is_read_whole(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    steps: list[tuple[int, int | None]] = []

    def on_progress(done: int, total: int | None) -> None:
        steps.append((done, total))

    assert fetch(storage, "ml-100k", on_progress) == f"{tmp_path}/raw/ml-100k"
    assert steps[-1] == (2_130_151, 2_130_151)
    steps.clear()
    assert fetch(storage, "ml-100k", on_progress) == f"{tmp_path}/raw/ml-100k"
    assert steps == [], "it was there already"

    dataset = prepare(RunConfig(), storage)
    assert (dataset.interactions, dataset.users, dataset.items) == (100_000, 943, 1_682)
    assert dataset.label_rate == pytest.approx(0.554, abs=5e-4)
    assert dataset.quarantined == {}
    assert sum(dataset.targets) == 100_000
    assert all(s.interactions >= 1024 for s in dataset.segments[:-1])


def test_changed_raw_files_are_fetched_again(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    fetch(storage, "ml-100k", silent)
    before = storage.read("raw/ml-100k/ml-100k.item")
    storage.write("raw/ml-100k/ml-100k.item", b"changed")
    fetch(storage, "ml-100k", silent)
    assert storage.read("raw/ml-100k/ml-100k.item") == before
