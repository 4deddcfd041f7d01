"""Every reason for which a row is refused, columns of every type, and the catalogue's order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dti_ray.config.data import DataConfig
from dti_ray.data.checks import INTERACTIONS, MALFORMED_TEXT, REFUSED, Checked, check, item_table
from dti_ray.data.clock import Kind
from dti_ray.errors import InputError

RATINGS = DataConfig()
CLICKS = DataConfig(label="click")
TWO = DataConfig(label="played / length >= 0.5")
ITEM_IDS = pa.array(["10", "9"])  # the order of bytes

Row = Sequence[str | None]


def raw(*rows: Row, labels: Sequence[str] = ("rating",), first: int = 1, faults: Sequence[str | None] = ()) -> pa.Table:
    """Return a batch of text columns as a reader gives it."""
    names = ["user_id", "item_id", *(f"label.{label}" for label in labels), "time"]
    columns = {name: pa.array([row[at] for row in rows], pa.string()) for at, name in enumerate(names)}
    numbers = pa.array(range(first, first + len(rows)), pa.int64())
    return pa.table({**columns, "row": numbers, "fault": pa.array(faults or [None] * len(rows), pa.string())})


def typed(**columns: pa.Array | pa.ChunkedArray) -> pa.Table:
    """Return a batch with columns of any type."""
    rows = len(columns["user_id"])
    numbers = {"row": pa.array(range(1, rows + 1), pa.int64()), "fault": pa.nulls(rows, pa.string())}
    return pa.table({name.replace("label_", "label."): column for name, column in (columns | numbers).items()})


def reasons(config: DataConfig, *rows: Row, labels: Sequence[str] = ("rating",)) -> list[str]:
    checked = check(raw(*rows, labels=labels), 0, config, ITEM_IDS)
    assert len(checked.good) + len(checked.refused) == len(rows)
    return checked.refused["reason"].to_pylist()


def tuples(table: pa.Table) -> list[tuple[Any, ...]]:
    return [tuple(row.values()) for row in table.to_pylist()]


def test_good_rows_become_item_index_label_time_file_and_row() -> None:
    rows = [("u", "9", "4", "7"), ("u", "10", "3", "7.9"), ("v", "9", " 3.5 ", "881250949")]
    checked = check(raw(*rows, first=11), 3, RATINGS, ITEM_IDS)
    assert checked.good.schema.equals(INTERACTIONS)
    assert tuples(checked.good) == [
        ("u", 1, 1, 7, 3, 11),
        ("u", 0, 0, 7, 3, 12),
        ("v", 1, 1, 881_250_949, 3, 13),
    ]
    assert checked.kinds.tolist() == [Kind.SMALL, Kind.SMALL, Kind.SECONDS]
    assert checked.refused.schema.equals(REFUSED)
    assert len(checked.refused) == 0


@pytest.mark.parametrize("user", ["", " ", "\t\u2003", None])
def test_null_user_is_refused(user: str | None) -> None:
    assert reasons(RATINGS, (user, "9", "4", "7")) == ["null_user"]


@pytest.mark.parametrize("item", ["", " ", None])
def test_null_item_is_refused(item: str | None) -> None:
    assert reasons(RATINGS, ("u", item, "4", "7")) == ["null_item"]


@pytest.mark.parametrize("label", ["good", "", None, "nan", "inf", "1e999", "4,5", "0x4", "."])
def test_rating_that_is_no_number_is_refused_under_the_column_s_name(label: str | None) -> None:
    assert reasons(RATINGS, ("u", "9", label, "7")) == ["rating_not_numeric"]


@pytest.mark.parametrize("label", ["2", "0.5", "-1", "yes", "", None])
def test_click_other_than_0_or_1_is_refused(label: str | None) -> None:
    assert reasons(CLICKS, ("u", "9", label, "7"), labels=["click"]) == ["label_not_0_or_1"]


def test_clicks_are_read_as_they_are() -> None:
    rows = [("u", "9", "1", "7"), ("u", "9", "0.0", "8"), ("u", "9", "true", "9")]
    assert check(raw(*rows, labels=["click"]), 0, CLICKS, ITEM_IDS).good["label"].to_pylist() == [1, 0, 1]


@pytest.mark.parametrize("time", ["yesterday", "", None, "1e300", "2024-02-30"])
def test_time_that_is_none_is_refused(time: str | None) -> None:
    assert reasons(RATINGS, ("u", "9", "4", time)) == ["time_not_understood"]


@pytest.mark.parametrize("item", ["11", "9 ", "٩", "09", "9.0"])
def test_item_that_the_catalogue_lacks_is_refused(item: str) -> None:
    assert reasons(RATINGS, ("u", item, "4", "7")) == ["item_not_in_catalogue"]


def test_rows_of_another_unit_than_the_stated_one_are_refused() -> None:
    config = DataConfig(time_unit="ms")
    times = ["1709294400", "1709294400000", "7", "2024-03-01T12:00:00Z", "noon"]
    checked = check(raw(*(("u", "9", "4", time) for time in times)), 0, config, ITEM_IDS)
    assert checked.good["time"].to_pylist() == [1_709_294_400_000, 7]
    found = list(zip(checked.refused["time"].to_pylist(), checked.refused["reason"].to_pylist(), strict=True))
    assert found == [
        ("1709294400", "time_not_in_ms"),
        ("2024-03-01T12:00:00Z", "time_not_in_ms"),
        ("noon", "time_not_understood"),
    ]


def test_refused_rows_keep_their_raw_values_their_place_and_their_first_reason() -> None:
    rows = [
        ("", "", "x", "y"),
        ("u", "", "x", "y"),
        ("u", "11", "x", "y"),
        ("u", "11", "4", "y"),
        ("u", "11", "4", "7"),
    ]
    checked = check(raw(*rows, first=100), 2, RATINGS, ITEM_IDS)
    expected = ["null_user", "null_item", "rating_not_numeric", "time_not_understood", "item_not_in_catalogue"]
    assert tuples(checked.refused) == [
        (*row, reason, 2, 100 + at) for at, (row, reason) in enumerate(zip(rows, expected, strict=True))
    ]


def test_refused_label_of_several_columns_says_them_all() -> None:
    rows = [("u", "9", "3", "0", "7"), ("u", "9", None, "x", "7"), ("u", "9", "3", "4", "7")]
    checked = check(raw(*rows, labels=["played", "length"]), 0, TWO, ITEM_IDS)
    assert len(checked.good) == 1
    found = list(zip(checked.refused["reason"].to_pylist(), checked.refused["label"].to_pylist(), strict=True))
    assert found == [("label_not_finite", "played=3, length=0"), ("played_not_numeric", "played=, length=x")]


def test_row_that_its_reader_marked_keeps_that_reason() -> None:
    rows = [("u", "9", "4", "7"), (None, None, None, None), ("u", "9", "4", "8"), ("u", "9", "4", "9")]
    faults = [None, "wrong_number_of_fields", "not_utf8", None]
    checked = check(raw(*rows, faults=faults), 0, RATINGS, ITEM_IDS)
    assert checked.good["row"].to_pylist() == [1, 4]
    assert checked.refused["reason"].to_pylist() == ["wrong_number_of_fields", "not_utf8"]
    assert checked.refused["row"].to_pylist() == [2, 3]
    assert len(checked.kinds) == 2


def test_refused_texts_are_cut() -> None:
    long = "ü" * 10_000_000
    checked = check(raw((long, "9", long, "7"), ("u", long, "4", long)), 0, RATINGS, ITEM_IDS)
    (first, second) = checked.refused.to_pylist()
    assert (first["user_id"], first["label"]) == ("ü" * MALFORMED_TEXT, "ü" * MALFORMED_TEXT)
    assert (second["item_id"], second["time"]) == ("ü" * MALFORMED_TEXT, "ü" * MALFORMED_TEXT)


def test_long_user_of_a_good_row_is_kept_whole() -> None:
    long = "u" * 10_000
    assert check(raw((long, "9", "4", "7")), 0, RATINGS, ITEM_IDS).good["user_id"].to_pylist() == [long]


def test_ids_of_any_type_are_the_text_that_a_person_would_write() -> None:
    checked = check(
        typed(
            user_id=pa.array([7.0, 7.5, math.nan, None, -0.0]),
            item_id=pa.array([9, 10, 9, 9, None], pa.uint16()),
            label_rating=pa.array([4, 3, 4, 4, 4], pa.int8()),
            time=pa.array([1, 2, 3, 4, 5], pa.uint32()),
        ),
        0, RATINGS, ITEM_IDS,
    )  # fmt: skip
    assert tuples(checked.good) == [("7", 1, 1, 1, 0, 1), ("7.5", 0, 0, 2, 0, 2)]
    assert checked.refused["reason"].to_pylist() == ["null_user", "null_user", "null_item"]


@pytest.mark.parametrize(
    ("users", "text"),
    [
        (pa.array(["u", "v"], pa.large_string()), ["u", "v"]),
        (pa.array(["u", "v"]).dictionary_encode(), ["u", "v"]),
        (pa.chunked_array([pa.array(["u"]).dictionary_encode(), pa.array(["v"]).dictionary_encode()]), ["u", "v"]),
        (pa.array([True, False]), ["true", "false"]),
        (pa.array([2**63 - 1, -5]), ["9223372036854775807", "-5"]),
        (pa.array([Decimal("7.00"), Decimal("7.50")]), ["7", "7.50"]),
    ],
    ids=lambda value: str(value.type) if isinstance(value, pa.Array | pa.ChunkedArray) else "",
)
def test_user_columns_of_many_types(users: pa.Array, text: list[str]) -> None:
    table = typed(user_id=users, item_id=pa.array(["9", "9"]), label_rating=pa.array([4, 4]), time=pa.array([1, 2]))
    assert check(table, 0, RATINGS, ITEM_IDS).good["user_id"].to_pylist() == text


def test_typed_labels_and_times() -> None:
    moments = [datetime(2024, 3, 1, 12, tzinfo=UTC), None]
    config = DataConfig(label="event in ('click', 'buy') and not is_bot")
    table = typed(
        user_id=pa.array(["u", "u"]),
        item_id=pa.array(["9", "9"]),
        label_event=pa.array(["buy", "buy"]).dictionary_encode(),
        label_is_bot=pa.array([False, False]),
        time=pa.array(moments, pa.timestamp("us", "UTC")),
    )
    checked = check(table, 0, config, ITEM_IDS)
    assert tuples(checked.good) == [("u", 1, 1, 1_709_294_400, 0, 1)]
    assert checked.kinds.tolist() == [Kind.ZONED]
    assert tuples(checked.refused) == [("u", "9", "event=buy, is_bot=false", None, "time_not_understood", 0, 2)]


def test_no_rows_are_no_fault() -> None:
    checked = check(raw(), 0, RATINGS, ITEM_IDS)
    assert (len(checked.good), len(checked.refused), len(checked.kinds)) == (0, 0, 0)


def test_empty_catalogue_refuses_all_items() -> None:
    checked = check(raw(("u", "9", "4", "7")), 0, RATINGS, pa.array([], pa.string()))
    assert checked.refused["reason"].to_pylist() == ["item_not_in_catalogue"]


cell = st.sampled_from(["u", "9", "10", "4", "7", "", None, "x", "2024-03-01", "1709294400000"])


@given(rows=st.lists(st.tuples(cell, cell, cell, cell), max_size=12), data=st.data())
def test_every_row_is_in_one_table_and_batches_change_nothing(rows: list[Row], data: st.DataObject) -> None:
    config = DataConfig(time_unit=data.draw(st.sampled_from([None, "s", "ms"])))
    whole = check(raw(*rows), 0, config, ITEM_IDS)
    assert sorted(whole.good["row"].to_pylist() + whole.refused["row"].to_pylist()) == list(range(1, len(rows) + 1))
    cut = data.draw(st.integers(0, len(rows)))
    parts = [
        check(raw(*part, first=first), 0, config, ITEM_IDS) for part, first in ((rows[:cut], 1), (rows[cut:], cut + 1))
    ]
    assert pa.concat_tables(part.good for part in parts).equals(whole.good)
    assert pa.concat_tables(part.refused for part in parts).equals(whole.refused)
    assert np.concatenate([part.kinds for part in parts]).tolist() == whole.kinds.tolist()
    assert isinstance(whole, Checked)


def test_catalogue_is_sorted_by_the_bytes_of_its_ids() -> None:
    items = pa.table({"item_id": ["9", "10", "é", "Z", "a"], "title": ["a", None, "c", "", "d"], "year": pa.nulls(5)})
    table = item_table(items)
    assert table["item_id"].to_pylist() == ["10", "9", "Z", "a", "é"]
    assert table["title"].to_pylist() == ["", "a", "", "d", "c"]
    assert table["year"].to_pylist() == [""] * 5


def test_catalogue_with_empty_and_repeated_ids_is_refused() -> None:
    with pytest.raises(InputError) as error:
        item_table(pa.table({"item_id": ["1", None, "2", "2", "", "3", "2"]}))
    assert [fault.problem for fault in error.value.faults] == [
        "is empty in 2 rows",
        "1 ids are there more than once, the first is '2'",
    ]
