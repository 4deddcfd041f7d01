"""`prepare` with bad input and bad luck: what is refused in which words, and what a second attempt does again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
import ray
from pyarrow import parquet as pq

from dti_ray.cli import main
from dti_ray.config import load_config
from dti_ray.data.interactions import Dataset, open_dataset
from dti_ray.data.prepare import prepare
from dti_ray.data.ray_jobs import Watch
from dti_ray.errors import InputError, StorageError
from dti_ray.storage import FileEntry, Storage
from tests.logs import contents, cut, learnt, make_log, quarantined, tabular, write_lines, write_log

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("ray_cluster")]

HEADING = ("user_id", "item_id", "rating", "timestamp")
PIECES = 6
SHARDS = ["data.shard_interactions=200"]  # four of them for 800 interactions


def noted(root: Path) -> list[str]:
    """Return what a `Noting` storage wrote below a data set, but for states and what is written last."""
    paths = (root / "writes").read_text().split() if (root / "writes").exists() else []
    return sorted(path.removeprefix("datasets/tiny/") for path in paths if path.endswith((".arrow", ".parquet")))


def noting(root: Path, before: Callable[[str], None] = lambda _path: None) -> Storage:
    """Return a storage that notes each path that is written, in any process; `before` may fail instead."""

    class Noting(Storage):
        def write(self, path: str, content: bytes) -> FileEntry:
            self.attempt("written", path, lambda: before(path))
            entry = super().write(path, content)
            with (root / "writes").open("a") as file:
                file.write(path + "\n")
            return entry

    return Noting(str(root))


def failing_at(name: str) -> Callable[[str], None]:
    def fail(path: str) -> None:
        if path.endswith(name):
            raise OSError(28, "No space left on device")

    return fail


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Six files of a log, without one bad row."""
    for number, part in enumerate(cut(make_log(800), PIECES)):
        write_log(tmp_path / "raw" / f"{number}.csv", part)
    return tmp_path / "raw"


@pytest.fixture
def whole(tmp_path: Path, raw: Path) -> dict[str, bytes]:
    """What one undisturbed attempt makes of the log."""
    return contents(prepare(tabular(raw, *SHARDS), Storage(str(tmp_path / "undisturbed"))))


# Attempts that break, and the one after.


def test_second_attempt_writes_only_what_the_first_did_not_finish(
    tmp_path: Path, raw: Path, whole: dict[str, bytes]
) -> None:
    config = tabular(raw, *SHARDS)
    with pytest.raises(StorageError, match=r"part-00002\.parquet: cannot be written: .*No space left on device"):
        prepare(config, noting(tmp_path, failing_at("interactions/part-00002.parquet")))
    written = noted(tmp_path)
    assert {f"scratch/rows-0000{piece}-00000.arrow" for piece in range(PIECES)} <= set(written)
    assert "interactions/part-00002.parquet" not in written
    with pytest.raises(InputError, match="is no complete data set"):
        open_dataset(Storage(str(tmp_path)), "tiny")

    finished = {path.name for path in (tmp_path / "datasets/tiny/scratch").glob("shard-*.json")}
    (tmp_path / "writes").unlink()
    assert contents(prepare(config, noting(tmp_path))) == whole
    again = noted(tmp_path)
    shards = {
        f"interactions/part-0000{shard}.parquet" for shard in range(4) if f"shard-0000{shard}.json" not in finished
    }
    assert {path for path in again if not path.startswith("quarantine/")} == shards | {"items.parquet"}
    assert "interactions/part-00002.parquet" in again


def test_finished_pieces_are_not_read_again(tmp_path: Path, raw: Path, whole: dict[str, bytes]) -> None:
    config, steps = tabular(raw, *SHARDS), []
    with pytest.raises(StorageError):
        prepare(config, noting(tmp_path, failing_at("scratch/rows-00003-00000.arrow")))
    left = PIECES - len(list((tmp_path / "datasets/tiny/scratch").glob("rows-*.json")))
    assert 1 <= left < PIECES
    dataset = prepare(config, Storage(str(tmp_path)), Watch(lambda *step: steps.append(step)))
    assert steps[0] == ("rows", 0, left), "no item is collected again either"
    assert contents(dataset) == whole


@pytest.mark.parametrize("change", ["file", "touched", "configuration", "catalogue", "added"])
def test_attempt_starts_anew_where_its_input_changed(tmp_path: Path, raw: Path, change: str) -> None:
    catalogue = write_log(tmp_path / "items.csv", pa.table({"item_id": range(12), "title": ["x"] * 12}))
    config = tabular(raw, *SHARDS, f"data.catalogue={catalogue}")
    with pytest.raises(StorageError):
        prepare(config, noting(tmp_path, failing_at("part-00002.parquet")))
    if change == "file":
        write_log(raw / "3.csv", make_log(90, seed=7))
    elif change == "touched":
        os.utime(raw / "3.csv", (1, 1))
    elif change == "added":
        write_log(raw / "9.csv", make_log(90, seed=7))
    elif change == "catalogue":
        write_log(catalogue, pa.table({"item_id": range(-1, 12), "title": ["x"] * 13}))
    else:
        config = tabular(raw, *SHARDS, f"data.catalogue={catalogue}", "data.label=rating > 1")
    (tmp_path / "writes").unlink()
    dataset = prepare(config, noting(tmp_path))
    assert sum(path.startswith("scratch/rows-") for path in noted(tmp_path)) == PIECES + (change == "added")
    assert contents(dataset) == contents(prepare(config, Storage(str(tmp_path / "fresh"))))


def test_what_stands_in_an_unfinished_folder_is_deleted(tmp_path: Path, raw: Path, whole: dict[str, bytes]) -> None:
    storage = Storage(str(tmp_path))
    for name in ("interactions/part-00009.parquet", "scratch/rows-00000-00009.arrow", "scratch/rows-00000.json"):
        storage.write(f"datasets/tiny/{name}", b"half")
    assert contents(prepare(tabular(raw, *SHARDS), storage)) == whole


def test_scratch_that_was_left_beside_a_manifest_is_deleted(tmp_path: Path, raw: Path, whole: dict[str, bytes]) -> None:
    storage = Storage(str(tmp_path))
    prepare(tabular(raw, *SHARDS), storage)
    storage.write("datasets/tiny/scratch/rows-00000.json", b"{}")
    assert contents(prepare(tabular(raw, *SHARDS), storage)) == whole


@pytest.mark.parametrize(
    "file", ["scratch/rows-00001-00000.arrow", "rows-00002.json", "interactions/part-00002.parquet"]
)
def test_worker_that_dies_after_a_write_changes_nothing(
    tmp_path: Path, raw: Path, whole: dict[str, bytes], file: str
) -> None:
    class Deadly(Storage):
        def write(self, path: str, content: bytes) -> FileEntry:
            entry = super().write(path, content)
            if path.endswith(file) and not self.exists("died"):
                super().write("died", b"once")
                os._exit(1)
            return entry

    dataset = prepare(tabular(raw, *SHARDS), Deadly(str(tmp_path)))
    assert dataset.storage.exists("died")
    assert contents(dataset) == whole


def test_killed_command_leaves_nothing_complete_and_the_same_command_ends_with_the_same_bytes(tmp_path: Path) -> None:
    for number, part in enumerate(cut(make_log(3000), 60)):
        write_log(tmp_path / "raw" / f"{number:02d}.csv", part)
    config, root = tabular(tmp_path / "raw"), tmp_path / "root"
    address = ray.get_runtime_context().gcs_address
    command = [
        sys.executable, "-m", "dti_ray.cli", "prepare", "data.name=tiny", "data.source=tabular",
        f"data.path={tmp_path / 'raw'}", f"cluster.address={address}", "--root", str(root), "--json",
    ]  # fmt: skip
    running = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    scratch, deadline = root / "datasets" / "tiny" / "scratch", time.monotonic() + 60
    while len(list(scratch.glob("rows-*.json"))) < 6 and time.monotonic() < deadline:
        assert running.poll() is None, "it ended before it could be killed"
        time.sleep(0.002)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    assert 6 <= len(list(scratch.glob("rows-*.json"))) < 60, "killed in mid-run"
    with pytest.raises(InputError, match="is no complete data set"):
        open_dataset(Storage(str(root)), "tiny")
    with pytest.raises(SystemExit, match="0"):
        main(command[3:])
    dataset = open_dataset(Storage(str(root)), "tiny")
    assert contents(dataset) == contents(prepare(config, Storage(str(tmp_path / "fresh"))))


# Rows and files that are bad.


@pytest.mark.parametrize(
    ("rows", "counts"),
    [
        ([], "none, the raw files hold no row"),
        (
            [("u", 1, 3, 5), ("u", 2, 3, 5), ("v", 1, 3, 5)],
            "3 user_with_too_few_interactions; the refused rows are in ",
        ),
        ([(" ", 1, 3, 5), ("u", 1, "x", 5), ("u", 1, 3, 5)], "1 null_user, 1 rating_not_numeric, 1 user_with_too_few"),
    ],
)
def test_empty_data_set_is_refused_with_the_counts(tmp_path: Path, rows: list[object], counts: str) -> None:
    path = write_lines(tmp_path / "log.csv", HEADING, *rows)
    for split in ("user_time", "global_time"):
        config = tabular(path, "data.max_bad_fraction=1", f"data.split={split}", f"data.name={split}")
        with pytest.raises(InputError, match=f"no interaction is left; quarantined: {counts}"):
            prepare(config, Storage(str(tmp_path)))


@pytest.mark.parametrize("split", ["user_time", "global_time"])
def test_share_in_which_no_user_is_says_so(tmp_path: Path, split: str) -> None:
    path = write_lines(tmp_path / "log.csv", HEADING, *(("u", item, 4, item) for item in range(9)))
    config = tabular(path, "data.user_fraction=1e-9", f"data.split={split}")
    with pytest.raises(InputError, match="quarantined: none, no user was drawn"):
        prepare(config, Storage(str(tmp_path)))


def test_too_many_bad_rows_are_told_by_the_three_commonest_reasons_with_examples(tmp_path: Path) -> None:
    good = [("u", item, 4, 1_700_000_000 + item) for item in range(10)]
    bad = [
        *(("u", 1, "good", 5 + at) for at in range(5)),
        *(("", 1, 3, at) for at in range(3)),
        ("u", 1, 3, "noon"), ("u", 1, 3, "noon"), ("u", 1),
    ]  # fmt: skip
    first = write_lines(tmp_path / "raw" / "a.csv", HEADING, *good, *bad[:4])
    second = write_lines(tmp_path / "raw" / "b.csv", HEADING, *bad[4:])
    with pytest.raises(InputError) as error:
        prepare(tabular(tmp_path / "raw"), Storage(str(tmp_path)))
    assert str(error.value) == (
        f"{tmp_path}/datasets/tiny: 11 of 21 rows are bad (52.4%): "
        f"rating_not_numeric 5 times, such as {first} row 11 (user='u' item='1' label='good' time='5'), "
        f"{first} row 12 (user='u' item='1' label='good' time='6'), "
        f"{first} row 13 (user='u' item='1' label='good' time='7'); "
        f"null_user 3 times, such as {second} row 2 (user='' item='1' label='3' time='0'), "
        f"{second} row 3 (user='' item='1' label='3' time='1'), {second} row 4 (user='' item='1' label='3' time='2'); "
        f"time_not_understood 2 times, such as {second} row 5 (user='u' item='1' label='3' time='noon'), "
        f"{second} row 6 (user='u' item='1' label='3' time='noon'); "
        "expected at most 10.0% (data.max_bad_fraction); mend the log or the mapping"
    )
    steps: list[tuple[str, int, int]] = []
    config = tabular(tmp_path / "raw", "data.max_bad_fraction=0.6")
    dataset = prepare(config, Storage(str(tmp_path)), Watch(lambda *step: steps.append(step)))
    assert (dataset.interactions, sum(dataset.quarantined.values())) == (10, 11)
    assert steps == [("shard", 0, 1), ("shard", 1, 1)], "what was read need not be read again for this"


def test_short_users_and_duplicates_do_not_count_as_bad(tmp_path: Path) -> None:
    rows = [("u", item, 4, 1_700_000_000 + item) for item in range(5)]
    path = write_lines(tmp_path / "log.csv", HEADING, *rows, *rows, ("v", 1, 4, 1_700_000_000))
    dataset = prepare(tabular(path, "data.max_bad_fraction=0"), Storage(str(tmp_path)))
    assert dataset.quarantined == {"duplicate_event": 5, "user_with_too_few_interactions": 1}


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-50])


def corrupt(path: Path) -> None:
    """Change a byte in the last page of ratings, as a bad disk would."""
    column = pq.read_metadata(path).row_group(1).column(2)
    content = bytearray(path.read_bytes())
    content[(column.dictionary_page_offset or column.data_page_offset) + column.total_compressed_size - 2] ^= 0xFF
    path.write_bytes(bytes(content))


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("has_catalogue", [True, False])
@pytest.mark.parametrize("damage", [truncated, corrupt, empty])
def test_damaged_parquet_among_good_ones_stops_or_is_left_out_whole(
    tmp_path: Path, damage: Callable[[Path], None], has_catalogue: bool
) -> None:
    parts = cut(make_log(600), 3)
    for number, part in enumerate(parts):
        path = tmp_path / "raw" / f"{number}.parquet"
        path.parent.mkdir(exist_ok=True)
        pq.write_table(part, path, row_group_size=100, write_page_checksum=True)
    bad = tmp_path / "raw" / "1.parquet"
    damage(bad)
    overrides = ["data.min_interactions=1"]
    if has_catalogue:
        items = write_log(tmp_path / "items.csv", pa.table({"item_id": range(12), "title": ["x"] * 12}))
        overrides.append(f"data.catalogue={items}")
    storage = Storage(str(tmp_path))
    with pytest.raises(InputError, match=r"raw/1\.parquet: is damaged: .*data\.on_bad_file=quarantine"):
        prepare(tabular(tmp_path / "raw", *overrides), storage)
    with pytest.raises(InputError, match="is no complete data set"):
        open_dataset(storage, "tiny")

    dataset = prepare(tabular(tmp_path / "raw", *overrides, "data.on_bad_file=quarantine"), storage)
    assert dataset.quarantined == {"unreadable_file": 1}
    assert [(row["reason"], row["file"], row["row"]) for row in quarantined(dataset)] == [
        ("unreadable_file", str(bad), None)
    ]
    good = tmp_path / "good"
    for number in (0, 2):
        write_log(good / f"{number}.parquet", parts[number])
    assert learnt(dataset) == learnt(prepare(tabular(good, *overrides), Storage(str(good))))


def test_log_of_damaged_files_alone_is_refused(tmp_path: Path) -> None:
    path = write_log(tmp_path / "raw" / "log.parquet", make_log(100))
    corrupted = path.read_bytes()
    path.write_bytes(corrupted[:-9])
    items = write_log(tmp_path / "items.csv", pa.table({"item_id": range(12)}))
    config = tabular(tmp_path / "raw", f"data.catalogue={items}", "data.on_bad_file=quarantine")
    with pytest.raises(InputError) as error:
        prepare(config, Storage(str(tmp_path)))
    assert "no interaction is left; quarantined: 1 unreadable_file" in str(error.value)


def test_catalogue_with_an_id_twice_is_refused_before_any_row_is_read(tmp_path: Path, raw: Path) -> None:
    items = write_lines(tmp_path / "items.csv", "item_id,title", "1,a", "2,b", "1,c", ",d")
    with pytest.raises(InputError) as error:
        prepare(tabular(raw, f"data.catalogue={items}"), noting(tmp_path))
    assert [str(fault) for fault in error.value.faults] == [
        "item catalogue: item_id: is empty in 1 rows; expected an id",
        "item catalogue: item_id: 1 ids are there more than once, the first is '1'; expected one row per item",
    ]
    assert noted(tmp_path) == []
    assert not (tmp_path / "datasets").exists()


def test_malformed_lines_of_any_place_are_quarantined_and_silent(
    tmp_path: Path, write_raw, capfd: pytest.CaptureFixture[str]
) -> None:
    rows: list[tuple[object, ...]] = [(at % 50, at % 5, 4, 1_700_000_000 + at) for at in range(150_000)]
    rows[70_000] = (1, 2, 3)
    folder = write_raw([*rows, (1, 2, 3, 4, 5)], [(item, "x", 1990, "y") for item in range(5)])
    dataset = prepare(load_config([], ["data.name=tiny"]), Storage(str(tmp_path)))
    assert (dataset.interactions, dataset.quarantined) == (149_999, {"wrong_number_of_fields": 2})
    places = [(row["file"], row["row"]) for row in quarantined(dataset)]
    assert places == [(f"{folder}/tiny.inter", 70_001), (f"{folder}/tiny.inter", 150_001)]
    assert capfd.readouterr() == ("", "")


# Faults of storage and of the code itself.


def test_error_of_storage_reaches_the_caller_as_itself(tmp_path: Path, raw: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "datasets").write_text("a file where a folder must be")
    with pytest.raises(StorageError, match="cannot be written") as error:
        prepare(tabular(raw), Storage(str(root)))
    assert type(error.value) is StorageError


def test_scratch_file_that_is_lost_is_named(tmp_path: Path, raw: Path) -> None:
    class Losing(Storage):
        def write(self, path: str, content: bytes) -> FileEntry:
            entry = super().write(path, content)
            if path.endswith("scratch/rows-00002-00000.arrow"):
                self.delete(path)
            return entry

    with pytest.raises(StorageError, match=r"datasets/tiny/scratch/rows-00002-00000\.arrow: is missing or damaged: "):
        prepare(tabular(raw), Losing(str(tmp_path)))


def test_unexpected_error_carries_the_trace_that_ray_data_logs(
    tmp_path: Path, raw: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    class Broken(Storage):
        def write(self, path: str, content: bytes) -> FileEntry:
            if path.endswith("rows-00001-00000.arrow"):
                raise ZeroDivisionError(f"{len(content)} bytes for {path}")
            return super().write(path, content)

    with pytest.raises(ZeroDivisionError) as error:
        prepare(tabular(raw), Broken(str(tmp_path)))
    (note,) = error.value.__notes__
    assert "scatter.py" in note, "frames inside the task"
    assert capfd.readouterr() == ("", "")


def test_shard_that_was_changed_later_is_found_by_the_next_prepare(tmp_path: Path, raw: Path) -> None:
    dataset: Dataset = prepare(tabular(raw), Storage(str(tmp_path)))
    shard = tmp_path / "datasets/tiny" / dataset.segments[0].shard
    content = bytearray(shard.read_bytes())
    content[200] ^= 1
    shard.write_bytes(content)
    with pytest.raises(StorageError, match=r"part-00000\.parquet: has hash .*was changed after it was written"):
        prepare(tabular(raw), Storage(str(tmp_path)))
