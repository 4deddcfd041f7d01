from __future__ import annotations

import datetime
import gzip
import json
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet as pq

from dti_ray.data.sources import formats, lines
from dti_ray.data.sources.formats import Format, Layout, as_text
from dti_ray.errors import InputError
from dti_ray.storage import Storage

CSV, JSONL, PARQUET = Format("csv"), Format("jsonl"), Format("parquet")
Row = dict[str, object]


def read(path: Path, form: Format, **columns: str) -> list[Row]:
    batches = formats.batches(Storage(str(path.parent)), path.name, form, columns)
    return [row for batch in batches for row in batch.to_pylist()]


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(gzip.compress(content, 1) if path.name.endswith(".gz") else content)
    return path


def good(row: int, **values: object) -> Row:
    return {**values, "row": row, "fault": None}


def bad(row: int, fault: str, *names: str) -> Row:
    return {**dict.fromkeys(names), "row": row, "fault": fault}


@pytest.mark.parametrize(
    ("values", "text"),
    [
        (pa.array([7, None]), ["7", None]),
        (pa.array([242.0, 2.5, float("nan"), -0.0, 1e300]), ["242", "2.5", None, "0", "1e+300"]),
        (pa.array([242.0, 0.1], pa.float32()), ["242", "0.1"]),
        (pa.array([2**63 - 1, -(2**63)]), ["9223372036854775807", "-9223372036854775808"]),
        (pa.array([2**64 - 1], pa.uint64()), ["18446744073709551615"]),
        (pa.array([True, False]), ["true", "false"]),
        (pa.array(["007", ""], pa.large_string()), ["007", ""]),
        (pa.array(["a", "b", "a"]).dictionary_encode(), ["a", "b", "a"]),
        (pa.array([Decimal("242.00"), Decimal("2.50")]), ["242", "2.50"]),
        (pa.array([datetime.datetime(2024, 1, 2, 3)], pa.timestamp("s")), ["2024-01-02T03:00:00"]),
        (pa.array([datetime.date(2024, 1, 2)]), ["2024-01-02"]),
        (pa.array([["a", "b"], [], None]), ["a b", "", None]),
        (pa.array([{"a": 1}, None]), ['{"a": 1}', None]),
        (pa.nulls(1), [None]),
    ],
    ids=lambda value: str(value.type) if isinstance(value, pa.Array) else "",
)
def test_a_value_becomes_the_text_that_a_person_would_write(values: pa.Array, text: list[str | None]) -> None:
    assert as_text(values).to_pylist() == text
    assert as_text(values).type == pa.string()
    assert as_text(pa.chunked_array([values, values])).to_pylist() == text * 2


# Delimited text


def test_every_field_of_a_csv_file_stays_text(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", b'\xef\xbb\xbfuser,"the item",t\r\n007,"a, ""b""",NA\r\n,"two\nlines",\r\n')
    assert read(path, CSV, u="user", i="the item", t="t", again="user") == [
        good(1, u="007", i='a, "b"', t="NA", again="007"),
        good(2, u="", i="two\nlines", t="", again=""),
    ]


def test_lines_that_are_no_rows_are_marked_and_hide_no_other(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", b"u,t\n1,2\n3\n\n5,\xff\n6,7,8\xff\n\xfe,9\n10,11")
    assert read(path, CSV, u="u", t="t") == [
        good(1, u="1", t="2"),
        bad(2, "wrong_number_of_fields", "u", "t"),
        bad(3, "not_utf8", "u", "t"),
        bad(4, "wrong_number_of_fields", "u", "t"),
        bad(5, "not_utf8", "u", "t"),
        good(6, u="10", t="11"),
    ]


def test_bytes_that_are_no_text_only_matter_in_columns_that_are_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", b"u,t,note\n1,2,\xff\n")
    assert read(path, CSV, u="u", t="t") == [good(1, u="1", t="2")]


def test_columns_without_a_heading_are_named_by_the_layout(tmp_path: Path) -> None:
    form = Format("csv", Layout(":", quoting=False, names=("u", "", "i", "", "t")))
    assert read(write(tmp_path / "a.dat", b'1::"2::3\n4::5\n'), form, u="u", t="t", i="i") == [
        good(1, u="1", t="3", i='"2'),
        bad(2, "wrong_number_of_fields", "u", "t", "i"),
    ]


def test_a_stray_quotation_mark_swallows_no_other_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", b'u,t\n1,2\n3,"4\n5,6\n7,12" disk\n8,"9\n10,11\n')
    assert read(path, CSV, u="u", t="t") == [
        good(1, u="1", t="2"),
        good(2, u="3", t='"4'),
        good(3, u="5", t="6"),
        good(4, u="7", t='12" disk'),
        good(5, u="8", t='"9'),
        good(6, u="10", t="11"),
    ]


def test_two_stray_quotation_marks_do_not_pair_up_over_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", b'u,t,x\n"1,2,3\n4,5,\xff\n7,8",9\n"a\nb",5,6\n')
    assert read(path, CSV, u="u", t="t", x="x") == [
        good(1, u='"1', t="2", x="3"),
        bad(2, "not_utf8", "u", "t", "x"),
        good(3, u="7", t='8"', x="9"),
        good(4, u="a\nb", t="5", x="6"),
    ]


@pytest.mark.parametrize("block", [7, 20, 1 << 20])
def test_where_blocks_are_cut_changes_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    content = b'u,t\n1,"a\nb\n\nc"\n2\n3,""\n\n4,"x ""y"" \nz"\n\xff,5\n6,7'
    expected = [
        good(1, u="1", t="a\nb\n\nc"),
        bad(2, "wrong_number_of_fields", "u", "t"),
        good(3, u="3", t=""),
        good(4, u="4", t='x "y" \nz'),
        bad(5, "not_utf8", "u", "t"),
        good(6, u="6", t="7"),
    ]
    monkeypatch.setattr(lines, "BLOCK_BYTES", block)
    for name in ("a.csv", "a.csv.gz"):
        assert read(write(tmp_path / name, content), CSV, u="u", t="t") == expected


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from(["good", "short", "long", "bytes", "bad bytes", "blank", "quoted"])), st.integers(1, 60)
)
def test_each_row_of_a_csv_file_keeps_its_number(
    tmp_path_factory: pytest.TempPathFactory, kinds: list[str], block: int
) -> None:
    text = {"good": b"%d,x", "short": b"%d", "long": b"%d,x,y", "blank": b"", "quoted": b'%d,"\n"'}
    text |= {"bytes": b"%d,\xff", "bad bytes": b"%d,\xff,y"}
    rows = [(kind, i) for i, kind in enumerate(kinds)]
    body = b"\n".join(text[kind] % i if kind != "blank" else b"" for kind, i in rows)
    path = write(tmp_path_factory.mktemp("csv") / "a.csv", b"u,t\n" + body)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "BLOCK_BYTES", block)
        found = read(path, CSV, u="u")
    kept = [(kind, i) for kind, i in rows if kind != "blank"]
    faults = dict.fromkeys(("short", "long", "bad bytes"), "wrong_number_of_fields")
    assert found == [
        {"u": None if kind in faults else str(i), "row": row, "fault": faults.get(kind)}
        for row, (kind, i) in enumerate(kept, start=1)
    ]


@pytest.mark.parametrize("form", [CSV, JSONL])
def test_a_text_field_of_ten_megabytes_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: Format) -> None:
    monkeypatch.setattr(lines, "BLOCK_BYTES", 1 << 20)
    text = "ä" * (5 << 20)
    table = {"csv": f'u,t\n1,"{text}"\n2,b\n', "jsonl": f'{{"u": 1, "t": "{text}"}}\n{{"u": 2, "t": "b"}}\n'}
    rows = read(write(tmp_path / "a", table[form.kind].encode()), form, t="t")
    assert [row["t"] for row in rows] == [text, "b"]


def test_a_file_without_line_ends_is_refused_before_it_fills_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "BLOCK_BYTES", 1 << 18)
    monkeypatch.setattr(lines, "LINE_BYTES", 1 << 20)
    path = write(tmp_path / "a.csv", b"u,t\n" + b"x" * (2 << 20))
    with pytest.raises(InputError, match=r"a\.csv: has a line of more than 1 MB"):
        read(path, CSV, u="u")


@pytest.mark.parametrize("content", [b"", b"\n\n"])
def test_a_csv_file_without_a_heading_is_named(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(InputError, match=r"a\.csv: is empty; expected a heading"):
        read(write(tmp_path / "a.csv", content), CSV, u="u")


def test_heading_alone_gives_no_row(tmp_path: Path) -> None:
    assert read(write(tmp_path / "a.csv", b"u,t"), CSV, u="u") == []


# JSON Lines


def test_json_values_keep_their_types(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"u": 1, "d": "2024-01-02", "b": true}\n\n{"u": 2}\r\n{"x": 1}\n')
    (batch,) = formats.batches(Storage(str(tmp_path)), "a.jsonl", JSONL, {"u": "u", "d": "d", "b": "b"})
    assert batch.schema.types == [pa.int64(), pa.string(), pa.bool_(), pa.int64(), pa.string()]
    assert read(path, JSONL, u="u", d="d", b="b") == [
        good(1, u=1, d="2024-01-02", b=True),
        good(2, u=2, d=None, b=None),
        good(3, u=None, d=None, b=None),
    ]


@pytest.mark.parametrize(
    "line",
    [b'{"u": 2', b"5", b"[1]", b"null", b'{"u": 2} {"u": 3}', b'{"u": 1,', b"not json", b"[" * 100_000],
)
def test_a_line_that_is_no_object_is_marked(tmp_path: Path, line: bytes) -> None:
    path = write(tmp_path / "a.jsonl", b'{"u": 1}\n' + line + b'\n{"u": 4}\n')
    assert read(path, JSONL, u="u") == [good(1, u=1), bad(2, "malformed_line", "u"), good(3, u=4)]


@pytest.mark.parametrize("value", [b'"\xff"', b'"\\ud800"', b'["\xff", "a"]'])
def test_json_text_that_is_no_utf8_is_marked(tmp_path: Path, value: bytes) -> None:
    path = write(tmp_path / "a.jsonl", b'{"u": "a", "\xfe": 1}\n{"u": ' + value + b"}\n")
    assert read(path, JSONL, u="u") == [good(1, u="a"), bad(2, "not_utf8", "u")]


def test_integers_of_any_length_keep_their_digits(tmp_path: Path) -> None:
    ids = [b"9007199254740993", b"123456789012345678901234567890", b"2.5", b'"x"']
    for some in (ids[:1], ids[:2], ids[:3], ids):
        path = write(tmp_path / "a.jsonl", b"\n".join(b'{"u": %s}' % one for one in some))
        batches = list(formats.batches(Storage(str(tmp_path)), path.name, JSONL, {"u": "u"}))
        texts = [text for batch in batches for text in as_text(batch["u"]).to_pylist()]
        assert texts == [one.decode().strip('"') for one in some]


def test_nested_json_becomes_text(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b'{"t": ["a", "b"]}\n{"t": {"c": [1, null]}}\n{"t": []}\n{"t": 2.0}\n')
    assert [row["t"] for row in read(path, JSONL, t="t")] == ["a b", '{"c": [1, null]}', "", "2"]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from(["1", "2.5", '"a"', '"2024-01-02"', "null", "true", "[1]", '"\\ud800"', "{", ""])),
    st.integers(1, 80),
)
def test_json_rows_are_the_same_for_any_block(
    tmp_path_factory: pytest.TempPathFactory, values: list[str], block: int
) -> None:
    body = "\n".join(f'{{"u": {value}}}' if value else "" for value in values)
    path = write(tmp_path_factory.mktemp("json") / "a.jsonl", body.encode())
    columns = {"u": "u"}
    storage = Storage(str(path.parent))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "BLOCK_BYTES", block)
        batches = list(formats.batches(storage, path.name, JSONL, columns))
    found = [text for batch in batches for text in as_text(batch["u"]).to_pylist()]
    rows = [row for batch in batches for row in batch["row"].to_pylist()]
    faults = [fault for batch in batches for fault in batch["fault"].to_pylist()]
    text = {"null": None, '"a"': "a", '"2024-01-02"': "2024-01-02", '"\\ud800"': None, "{": None, "[1]": "[1]"}
    kept = [value for value in values if value]
    assert found == [text.get(value, value) for value in kept]
    assert rows == list(range(1, len(kept) + 1))
    assert faults == [{'"\\ud800"': "not_utf8", "{": "malformed_line"}.get(value) for value in kept]


CSV_SHREDS = [b'"', b",", b"\n", b"\r\n", b"a", b"1", b"\xff", b'""', "ä".encode(), b"\x00", b" "]
JSON_SHREDS = [b"{", b"}", b'"u"', b":", b"2.5", b",", b"\n", b"[", b"]", b"null", b"\xff", b'"\\ud800"', b'{"u": 1}\n']


@settings(max_examples=150, deadline=None)
@given(
    st.one_of(
        st.tuples(st.just(CSV), st.lists(st.sampled_from(CSV_SHREDS), max_size=40)),
        st.tuples(st.just(JSONL), st.lists(st.sampled_from(JSON_SHREDS), max_size=40)),
    ),
    st.integers(1, 30),
)
def test_no_rubbish_breaks_a_text_reader(
    tmp_path_factory: pytest.TempPathFactory, content: tuple[Format, list[bytes]], block: int
) -> None:
    form, shreds = content
    path = write(tmp_path_factory.mktemp("rubbish") / "a", (b"u,v\n" if form == CSV else b"") + b"".join(shreds))
    for size in (block, 1 << 20):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lines, "BLOCK_BYTES", size)
            found = read(path, form, u="u")
        assert [row["row"] for row in found] == list(range(1, len(found) + 1))


# Parquet


def test_parquet_keeps_its_types_and_decodes_dictionaries(tmp_path: Path) -> None:
    table = pa.table(
        {
            "u": pa.array(["a", "b"]).dictionary_encode(),
            "i": pa.array([1, None], pa.uint32()),
            "t": pa.array([0, 1], pa.timestamp("ms", "UTC")),
            "y": pa.array([0.5, float("nan")]),
            "s": pa.array(["x", None], pa.large_string()),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    columns = {name: name for name in table.column_names}
    (batch,) = formats.batches(Storage(str(tmp_path)), "a.parquet", PARQUET, columns)
    assert batch.schema.types[:5] == [pa.string(), *table.schema.types[1:]]
    assert batch["row"].to_pylist() == [1, 2]
    assert batch["i"].to_pylist() == [1, None]


def test_parquet_text_that_is_no_utf8_is_marked(tmp_path: Path) -> None:
    raw = pa.array([b"a", b"\xff", None], pa.binary())
    as_string = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    pq.write_table(pa.table({"u": as_string, "i": [1, 2, 3], "b": raw}), tmp_path / "a.parquet")
    for name in ("u", "b"):
        assert read(tmp_path / "a.parquet", PARQUET, u=name, i="i") == [
            good(1, u="a", i=1),
            bad(2, "not_utf8", "u", "i"),
            good(3, u=None, i=3),
        ]


def test_a_corrupt_page_is_told_by_its_checksum(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table({"u": list(range(1000))})
    pq.write_table(table, path, compression="none", use_dictionary=False, write_page_checksum=True)
    content = bytearray(path.read_bytes())
    content[2000] ^= 1  # within the page: the number that it changes would be as good as any
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"a\.parquet: is damaged: .*CRC"):
        read(path, PARQUET, u="u")


def test_headings_are_found_in_every_format(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    pq.write_table(pa.table({"a": [1], "b": [["x"]]}), tmp_path / "a.parquet")
    write(tmp_path / "a.csv", b'\n"a",b\n1,2\n')
    write(tmp_path / "a.jsonl", b'oops\n{"a": 1}\n' + json.dumps({"b": ["x"], "a": 2}).encode())
    names = {form.kind: formats.headings(storage, f"a.{form.kind}", form) for form in (PARQUET, CSV, JSONL)}
    assert {kind: [name for name, _ in found] for kind, found in names.items()} == {kind: ["a", "b"] for kind in names}
    assert [pa.types.is_nested(dict(names[kind])["b"]) for kind in ("parquet", "jsonl")] == [True, True]


def test_json_that_is_one_array_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.json", b'[{"a": 1},\n{"a": 2}]\n')
    with pytest.raises(InputError, match=r"a\.json: holds no JSON object in its first lines; expected JSON Lines"):
        formats.headings(Storage(str(tmp_path)), "a.json", JSONL)


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz"])
def test_rows_of_large_text_files_are_estimated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    rng = np.random.default_rng(0)
    path = write(tmp_path / name, b"u,t\n" + b"".join(b"%06d,1\n" % i for i in rng.integers(0, 10**6, 400_000)))
    storage = Storage(str(tmp_path))
    assert formats.count(storage, path.name, CSV) == 400_000
    monkeypatch.setattr(lines, "COUNTED_BYTES", 3 << 20)
    assert formats.count(storage, path.name, CSV) == pytest.approx(400_000, rel=0.25)
