from __future__ import annotations

import zipfile
from pathlib import Path

import pyarrow as pa
import pytest

from dti_ray.config.schema import DataConfig
from dti_ray.data.sources import movielens
from dti_ray.data.sources.movielens import RAW_INTERACTIONS, fetch, locate, read_items
from dti_ray.errors import InputError
from dti_ray.storage import Storage

TINY = DataConfig(name="tiny")
ITEMS = [(1, "Toy Story", 1995, "Animation Comedy"), (2, 'The "NA"', "", "Drama")]


def silent(done: int, total: int | None) -> None:
    """Report progress to nobody."""


def read_log(config: DataConfig, storage: Storage) -> pa.Table:
    raw = locate(config, storage)
    return pa.Table.from_batches([batch for log in raw.logs for batch in raw.batches(log)])


def test_every_raw_value_stays_a_string(tmp_path: Path, write_raw) -> None:
    write_raw([("007", 1, "five", "8.8e8"), ("", 2, "", "")], ITEMS)
    table = read_log(TINY, Storage(str(tmp_path)))
    assert table.schema.equals(RAW_INTERACTIONS)
    assert table.to_pylist() == [
        {"user_id": "007", "item_id": "1", "label": "five", "time": "8.8e8"},
        {"user_id": "", "item_id": "2", "label": "", "time": ""},
    ]


def test_data_path_names_another_folder(tmp_path: Path, write_raw) -> None:
    folder = write_raw([(1, 1, 5, 10)], ITEMS)
    table = read_log(DataConfig(name="other", path=str(folder)), Storage(str(tmp_path / "root")))
    assert table["user_id"].to_pylist() == ["1"]


def test_all_logs_of_a_folder_are_read(tmp_path: Path, write_raw) -> None:
    folder = write_raw([(1, 1, 5, 10)], ITEMS)
    first = (folder / "tiny.inter").read_text()
    (folder / "later.inter").write_text(first.replace("\n1\t", "\n2\t"))
    table = read_log(TINY, Storage(str(tmp_path)))
    assert sorted(table["user_id"].to_pylist()) == ["1", "2"]


def test_items_keep_titles_and_empty_fields(tmp_path: Path, write_raw) -> None:
    write_raw([], ITEMS)
    items = read_items(Storage(str(tmp_path)), "raw/tiny/tiny.item")
    assert items.schema.equals(movielens.ITEMS)
    assert items.to_pylist() == [
        {"item_id": "1", "title": "Toy Story", "year": "1995", "genres": "Animation Comedy"},
        {"item_id": "2", "title": 'The "NA"', "year": "", "genres": "Drama"},
    ]


def test_wrong_path_is_named_with_what_it_holds(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere: holds 0 \*\.inter and 0 \*\.item files.*set data\.path"):
        locate(DataConfig(path=str(tmp_path / "nowhere")), Storage(str(tmp_path)))


def test_missing_raw_files_of_a_known_data_set_hint_at_the_command(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"raw/ml-100k: .*dti-ray data get ml-100k"):
        locate(DataConfig(), Storage(str(tmp_path)))


def test_missing_item_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"raw/tiny/tiny\.item: is missing"):
        read_items(Storage(str(tmp_path)), "raw/tiny/tiny.item")


def test_missing_columns_are_all_named_with_those_found(tmp_path: Path, write_raw) -> None:
    write_raw([], ITEMS, inter_heading="user_id:token\tfilm:token\trating:float")
    with pytest.raises(InputError) as error:
        locate(TINY, Storage(str(tmp_path)))
    assert [fault.problem for fault in error.value.faults] == [
        "has no column item_id",
        "has no column timestamp",
    ]
    assert all(fault.where.endswith("raw/tiny/tiny.inter") for fault in error.value.faults)
    assert error.value.faults[0].hint == "found user_id:token, film:token, rating:float"


def test_missing_label_column_is_named(tmp_path: Path, write_raw) -> None:
    write_raw([], ITEMS)
    with pytest.raises(InputError, match=r"tiny\.inter: has no column click; found .*rating:float"):
        locate(TINY.model_copy(update={"label_column": "click"}), Storage(str(tmp_path)))


def test_label_column_may_not_be_a_key(tmp_path: Path, write_raw) -> None:
    write_raw([], ITEMS)
    with pytest.raises(InputError, match=r"data\.label_column: got 'timestamp'"):
        locate(TINY.model_copy(update={"label_column": "timestamp"}), Storage(str(tmp_path)))


def test_missing_item_column_is_named(tmp_path: Path, write_raw) -> None:
    write_raw([], [], item_heading="item_id:token\tmovie_title:token_seq\tclass:token_seq")
    with pytest.raises(InputError, match=r"tiny\.item: has no column release_year; found item_id:token"):
        read_items(Storage(str(tmp_path)), "raw/tiny/tiny.item")


def test_logs_with_different_headings_are_refused(tmp_path: Path, write_raw) -> None:
    folder = write_raw([], ITEMS)
    heading = "user_id:float\titem_id:token\trating:float\ttimestamp:float\n"
    (folder / "zz.inter").write_text(heading)
    with pytest.raises(InputError, match=r"zz\.inter: has columns user_id:float.*expected user_id:token"):
        locate(TINY, Storage(str(tmp_path)))


@pytest.mark.parametrize(
    "content", [b"", b"item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n1\tx\n"]
)
def test_file_that_is_no_table_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.item").write_bytes(content)
    with pytest.raises(InputError, match=r"bad\.item: cannot be read as a table"):
        read_items(Storage(str(tmp_path)), "bad.item")


def test_unknown_name_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data\.name: got 'ml-1b'; expected one of ml-100k"):
        fetch(Storage(str(tmp_path)), "ml-1b", silent)


@pytest.fixture
def local_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Point pip at an empty folder instead of the package index, and the cache at another one."""
    index = tmp_path / "index"
    index.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return index


def test_failing_pip_is_reported_with_its_last_lines(tmp_path: Path, local_index: Path) -> None:
    with pytest.raises(InputError, match=r"recbole==1\.2\.1: pip could not download it .*No matching distribution"):
        fetch(Storage(str(tmp_path / "root")), "ml-100k", silent)
    assert not (tmp_path / "root").exists()


def test_wheel_with_another_hash_is_refused(tmp_path: Path, local_index: Path) -> None:
    info = "recbole-1.2.1.dist-info"
    with zipfile.ZipFile(local_index / "recbole-1.2.1-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: recbole\nVersion: 1.2.1\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    with pytest.raises(InputError, match=r"recbole==1\.2\.1: came with SHA-256 .*; expected 9c994820"):
        fetch(Storage(str(tmp_path / "root")), "ml-100k", silent)
    assert not list((tmp_path / "cache" / "dti_ray").iterdir())
    assert not (tmp_path / "root").exists()
