from __future__ import annotations

import gzip
import json
import pickle
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet as pq

from dti_ray.config.data import DataConfig
from dti_ray.data.sources import locate, parquet, raw
from dti_ray.data.sources.raw import Piece, RawLog
from dti_ray.errors import InputError
from dti_ray.storage import Storage

COLUMNS = {"user": "uid", "item": "sku", "time": "at"}
HEADING = ("uid", "sku", "at", "clicked", "name")
ROWS = [("u1", "7", "10", "1", "Lamp"), ("u2", "8", "20", "0", "Chair, red"), ("u1", "8", "30", "1", "Chair, red")]


def config(path: Path | str, **changes: object) -> DataConfig:
    tree = {"source": "tabular", "path": str(path), "label": "clicked", "columns": COLUMNS}
    return DataConfig.model_validate({**tree, **changes})


def find(path: Path | str, **changes: object) -> RawLog:
    return locate(config(path, **changes), Storage("unused"))


def rows(log: RawLog, *names: str) -> list[tuple[object, ...]]:
    batches = [batch for piece in log.pieces() for batch in log.batches(piece)]
    return [tuple(row[name] for name in names) for batch in batches for row in batch.to_pylist()]


def save(path: Path, heading: Sequence[str] = HEADING, values: Sequence[Sequence[object]] = ROWS) -> Path:
    """Write a table in the format that the file's name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    name = path.name.removesuffix(".gz")
    if name.endswith((".parquet", ".pq")):
        table = [dict(zip(heading, row, strict=True)) for row in values]
        pq.write_table(pa.Table.from_pylist(table, pa.schema([(name, pa.string()) for name in heading])), path)
        return path
    delimiter = "\t" if name.endswith(".tsv") else ","
    if name.endswith((".csv", ".tsv")):
        quoted = [delimiter.join(f'"{value}"' for value in row) for row in [heading, *values]]
        text = "\n".join(quoted)
    else:
        text = "\n".join(json.dumps(dict(zip(heading, row, strict=True))) for row in values)
    path.write_bytes(gzip.compress(text.encode()) if path.name.endswith(".gz") else text.encode())
    return path


EVERY_FORMAT = ["a.parquet", "a.pq", "a.csv", "a.CSV.gz", "a.tsv", "a.jsonl", "a.ndjson.gz", "a.json"]


@pytest.mark.parametrize("name", EVERY_FORMAT)
def test_every_format_gives_the_same_rows_by_the_mapping(tmp_path: Path, name: str) -> None:
    name = name.lower()
    save(tmp_path / "logs" / name)
    expected = [(u, i, t, y, row, None) for row, (u, i, t, y, _) in enumerate(ROWS, start=1)]
    for path in (tmp_path / "logs", tmp_path / "logs" / name):
        log = find(path)
        assert rows(log, "user_id", "item_id", "time", "label.clicked", "row", "fault") == expected
        assert [piece.rows for piece in log.pieces()] == [3]


@pytest.mark.parametrize("catalogue", EVERY_FORMAT)
def test_a_catalogue_may_have_another_format_than_the_log(tmp_path: Path, catalogue: str) -> None:
    save(tmp_path / "log.csv")
    path = save(tmp_path / "items" / catalogue.lower(), ("asin", "name", "note"), [("7", "Lamp", ""), ("8", "NA", "x")])
    log = find(tmp_path / "log.csv", catalogue=str(path), columns=COLUMNS | {"catalogue_item": "asin"})
    items = pickle.loads(pickle.dumps(log)).read_catalogue()
    assert items is not None
    assert items.to_pylist() == [
        {"item_id": "7", "name": "Lamp", "note": ""},
        {"item_id": "8", "name": "NA", "note": "x"},
    ]
    assert log.catalogue == (str(path),)
    assert log.item_columns == {}


def test_items_of_the_catalogue_become_text_as_in_the_log(tmp_path: Path) -> None:
    save(tmp_path / "log.csv")
    table = {"sku": [7.0, 8.0], "price": [2.5, 3.0], "tags": [["a"], ["b", "c"]], "blob": [b"x", b"y"], "n": [1, None]}
    pq.write_table(pa.table(table), tmp_path / "items.parquet")
    chosen = find(tmp_path, catalogue=f"{tmp_path}/items.parquet", columns=COLUMNS | {"text": ["tags", "price"]})
    assert chosen.read_catalogue().to_pylist() == [
        {"item_id": "7", "tags": "a", "price": "2.5"},
        {"item_id": "8", "tags": "b c", "price": "3"},
    ]
    everything = find(tmp_path, catalogue=f"{tmp_path}/items.parquet")
    assert everything.read_catalogue().column_names == ["item_id", "price", "n"]
    assert everything.files == ("log.csv",)  # the catalogue in the log's folder is no log


def test_without_a_catalogue_the_log_holds_the_items(tmp_path: Path) -> None:
    save(tmp_path / "log.csv", (*HEADING, "row"), [(*row, "x") for row in ROWS])
    log = find(tmp_path, columns=COLUMNS | {"text": ["name", "row"]})
    assert log.read_catalogue is None
    assert log.catalogue == ()
    (piece,) = log.pieces()
    (batch,) = log.item_batches(piece)
    assert batch.schema.names == ["item_id", "name", "row"]
    assert batch.to_pylist()[1] == {"item_id": "8", "name": "Chair, red", "row": "x"}
    assert find(tmp_path).item_columns == {"item_id": "sku"}


def test_a_label_may_name_several_columns_and_share_them(tmp_path: Path) -> None:
    save(tmp_path / "log.csv")
    log = find(tmp_path, label="clicked == 1 and at > 15 and `sku` != 'x'")
    assert log.columns == {
        "user_id": "uid", "item_id": "sku", "time": "at",
        "label.clicked": "clicked", "label.at": "at", "label.sku": "sku",
    }  # fmt: skip
    assert rows(log, "time", "label.at")[0] == ("10", "10")


@pytest.mark.parametrize("delimiter", [",", ";", "|", "\t"])
def test_the_delimiter_is_found_in_the_heading(tmp_path: Path, delimiter: str) -> None:
    lines = [delimiter.join(row[:4]) for row in [HEADING, *ROWS]]
    (tmp_path / "log.csv").write_text("\n".join(lines))
    assert rows(find(tmp_path), "user_id", "time")[2] == ("u1", "30")


def test_partition_folders_and_zips_are_just_folders(tmp_path: Path) -> None:
    save(tmp_path / "logs" / "date=2024-01-02" / "a.csv")
    save(tmp_path / "logs" / "date=2024-01-01" / "a.csv.gz")
    (tmp_path / "logs" / "_SUCCESS").touch()
    assert find(tmp_path / "logs").files == ("date=2024-01-01/a.csv.gz", "date=2024-01-02/a.csv")
    with zipfile.ZipFile(tmp_path / "logs.zip", "w") as archive:
        archive.write(tmp_path / "logs" / "date=2024-01-02" / "a.csv", "inside/a.csv")
    assert len(rows(find(tmp_path / "logs.zip"), "user_id")) == 3


def test_columns_may_stand_in_another_order_in_each_file(tmp_path: Path) -> None:
    save(tmp_path / "a.csv")
    save(tmp_path / "b.csv", HEADING[::-1], [row[::-1] for row in ROWS])
    assert rows(find(tmp_path), "user_id", "time") == [(row[0], row[2]) for row in ROWS * 2]


@pytest.mark.parametrize("name", ["a.parquet", "a.csv", "a.jsonl"])
def test_all_missing_columns_are_told_at_once_with_what_was_meant(tmp_path: Path, name: str) -> None:
    save(tmp_path / "logs" / name)
    save(tmp_path / "logs" / f"b{name}")
    save(tmp_path / "items.csv", ("asin", "name"), [])
    wrong = {"user": "user_id", "item": "SKU", "time": "at", "text": ["title"]}
    with pytest.raises(InputError) as error:
        find(tmp_path / "logs", label="click > 0", columns=wrong, catalogue=f"{tmp_path}/items.csv")
    first, where = "(as in 1 more); ", f"{tmp_path}/logs/{name}"
    assert str(error.value).splitlines() == [
        f"{where}: has no column 'user_id', which data.columns.user names {first}did you mean 'uid'? "
        "it has uid, sku, at, clicked, name",
        f"{where}: has no column 'SKU', which data.columns.item names {first}did you mean 'sku'? "
        "it has uid, sku, at, clicked, name",
        f"{where}: has no column 'click', which data.label names {first}did you mean 'clicked'? "
        "it has uid, sku, at, clicked, name",
        f"{tmp_path}/items.csv: has no column 'SKU', which data.columns.item names; it has asin, name",
        f"{tmp_path}/items.csv: has no column 'title', which data.columns.text names; it has asin, name",
    ]


def test_nested_and_double_columns_are_refused_where_one_value_is_needed(tmp_path: Path) -> None:
    pq.write_table(pa.table({"uid": [["a"]], "sku": [1], "at": [1], "clicked": [1]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"nested values \(list<.*\) in column 'uid', which data\.columns\.user"):
        find(tmp_path)
    (tmp_path / "a.parquet").unlink()
    (tmp_path / "a.csv").write_text("uid,sku,at,clicked,at\n")
    with pytest.raises(InputError, match=r"has 2 columns 'at', which data\.columns\.time names"):
        find(tmp_path)


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        ([], "holds no table; expected files that end with .*; it holds no file"),
        (["a.txt", "b.xlsx"], "holds no table; .*it holds a.txt, b.xlsx"),
        (["a.csv", "b.parquet"], "holds files of several formats: a.csv, b.parquet; expected files of one format"),
        (["a.csv", "b.tsv.gz"], "holds files of several formats: a.csv, b.tsv.gz"),
    ],
)
def test_a_folder_without_one_format_is_refused(tmp_path: Path, names: list[str], problem: str) -> None:
    (tmp_path / "logs").mkdir()
    for name in names:
        (tmp_path / "logs" / name).touch()
    with pytest.raises(InputError, match=problem):
        find(tmp_path / "logs")


def test_parquet_within_a_zip_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "logs.zip", "w") as archive:
        archive.write(save(tmp_path / "a.parquet"), "a.parquet")
    with pytest.raises(InputError, match=r"logs\.zip: holds Parquet within a zip.*unpack it"):
        find(tmp_path / "logs.zip")


def test_damaged_files_stop_or_wait_for_their_reader(tmp_path: Path) -> None:
    whole = save(tmp_path / "logs" / "a.parquet").read_bytes()
    for name, content in (("b", whole[:-20]), ("c", b""), ("d", b"no parquet" * 100)):
        (tmp_path / "logs" / f"{name}.parquet").write_bytes(content)
    with pytest.raises(InputError) as error:
        find(tmp_path / "logs")
    assert [fault.where[-9:] for fault in error.value.faults] == ["b.parquet", "c.parquet", "d.parquet"]
    log = find(tmp_path / "logs", on_bad_file="quarantine")
    pieces = log.pieces()
    assert [(piece.file, piece.rows, piece.row_groups) for piece in pieces] == [
        (0, 3, (0, 1)),
        (1, 0, None),
        (2, 0, None),
        (3, 0, None),
    ]
    for piece in pieces[1:]:
        with pytest.raises(InputError, match=rf"{'abcd'[piece.file]}\.parquet: is damaged"):
            list(log.batches(piece))


def test_a_gzip_that_breaks_off_gives_its_first_rows_and_then_the_error(tmp_path: Path) -> None:
    whole = save(tmp_path / "a.csv.gz", values=[(f"u{i}", str(i * i), str(i), "1", "x") for i in range(10_000)])
    whole.write_bytes(whole.read_bytes()[:-2000])
    log = find(tmp_path)
    (piece,) = log.pieces()
    assert piece.rows == 0
    with pytest.raises(InputError, match=r"a\.csv\.gz: is damaged: .*ended before the end-of-stream marker"):
        list(log.batches(piece))


def test_a_file_that_vanishes_after_the_check_is_missing(tmp_path: Path) -> None:
    paths = [save(tmp_path / name) for name in ("a.csv", "b.csv")]
    log = find(tmp_path)
    paths[1].unlink()
    assert [piece.rows for piece in log.pieces()] == [3, 0]
    with pytest.raises(InputError, match=r"b\.csv: is missing"):
        list(log.batches(Piece(1, 3)))
    paths[0].write_text("other,heading\n")
    with pytest.raises(InputError, match=r"a\.csv: has no column at, clicked, sku, uid; found other, heading"):
        list(log.batches(Piece(0, 3)))


def test_a_catalogue_with_rows_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "log.csv")
    (tmp_path / "items.csv").write_bytes(b"sku,name\n1,a\n2\n3,\xff\n4,5,6\n")
    log = find(tmp_path / "log.csv", catalogue=f"{tmp_path}/items.csv")
    with pytest.raises(InputError, match=r"items\.csv: .*\(2 wrong_number_of_fields, 1 not_utf8\), the first is row 2"):
        log.read_catalogue()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 9), max_size=12), st.integers(1, 20))
def test_pieces_of_a_parquet_file_are_the_file(
    tmp_path_factory: pytest.TempPathFactory, groups: list[int], piece_rows: int
) -> None:
    path = tmp_path_factory.mktemp("pieces") / "a.parquet"
    table = pa.table({name: list(range(sum(groups))) for name in ("uid", "sku", "at", "clicked")})
    table = table.cast(pa.schema([(name, pa.int64()) for name in table.column_names]))
    with pq.ParquetWriter(path, table.schema) as writer:
        for start, size in zip(_starts(groups), groups, strict=True):
            writer.write_table(table.slice(start, size))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(raw, "PIECE_ROWS", piece_rows)
        patch.setattr(parquet, "BATCH_ROWS", 4)
        log = find(path)
        pieces = log.pieces()
        found = [[row for batch in log.batches(piece) for row in batch.to_pylist()] for piece in pieces]
    assert [row["user_id"] for part in found for row in part] == list(range(sum(groups)))
    assert [row["row"] for part in found for row in part] == list(range(1, sum(groups) + 1))
    assert [piece.rows for piece in pieces] == [len(part) for part in found]
    assert all(piece.rows <= max(piece_rows, *groups) for piece in pieces if groups)


def _starts(sizes: Sequence[int]) -> list[int]:
    return [sum(sizes[:i]) for i in range(len(sizes))]


def test_a_located_log_travels_to_another_process(tmp_path: Path) -> None:
    save(tmp_path / "a.csv")
    log = find(tmp_path)
    copy = pickle.loads(pickle.dumps(log))
    assert rows(copy, "user_id", "row") == rows(log, "user_id", "row")
