from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import pytest

from dti_ray.config.schema import DataConfig
from dti_ray.data.checks import INTERACTIONS, QUARANTINE, check, item_table
from dti_ray.data.sources.movielens import ITEMS, RAW_INTERACTIONS
from dti_ray.errors import InputError

RATINGS = DataConfig()
CLICKS = DataConfig(label_column="click", label_threshold=None)
ITEM_IDS = pa.array(["10", "9"])  # the order of bytes


def raw(*rows: Sequence[str | None]) -> pa.Table:
    return pa.Table.from_pylist([dict(zip(RAW_INTERACTIONS.names, row, strict=True)) for row in rows], RAW_INTERACTIONS)


def reasons(config: DataConfig, *rows: Sequence[str | None]) -> list[str]:
    good, bad = check(raw(*rows), config, ITEM_IDS)
    assert len(good) + len(bad) == len(rows)
    return bad["reason"].to_pylist()


def test_good_rows_become_item_index_label_and_seconds() -> None:
    rows = [("u", "9", "4", "7"), ("u", "10", "3", "7.9"), ("v", "9", " 3.5 ", "8e8")]
    good, bad = check(raw(*rows), RATINGS, ITEM_IDS)
    assert good.schema.equals(INTERACTIONS)
    assert [tuple(row.values()) for row in good.to_pylist()] == [
        ("u", 1, 1, 7),
        ("u", 0, 0, 7),
        ("v", 1, 1, 800_000_000),
    ]
    assert bad.schema.equals(QUARANTINE)
    assert len(bad) == 0


@pytest.mark.parametrize("user", ["", " ", None])
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
    assert reasons(CLICKS, ("u", "9", label, "7")) == ["label_not_0_or_1"]


def test_clicks_are_read_as_they_are() -> None:
    good, _ = check(raw(("u", "9", "1", "7"), ("u", "9", "0.0", "8"), ("u", "9", "1.0", "9")), CLICKS, ITEM_IDS)
    assert good["label"].to_pylist() == [1, 0, 1]


@pytest.mark.parametrize("time", ["yesterday", "", None, "1e300"])
def test_time_that_is_no_number_of_seconds_is_refused(time: str | None) -> None:
    assert reasons(RATINGS, ("u", "9", "4", time)) == ["time_not_numeric"]


def test_item_that_the_catalogue_lacks_is_refused() -> None:
    assert reasons(RATINGS, ("u", "11", "4", "7")) == ["item_not_in_catalogue"]


def test_refused_rows_keep_their_raw_values_and_their_first_reason() -> None:
    rows = [("", "", "x", "y"), ("u", "", "x", "y"), ("u", "11", "x", "y"), ("u", "11", "4", "y")]
    _, bad = check(raw(*rows), RATINGS, ITEM_IDS)
    found = [tuple(row.values()) for row in bad.to_pylist()]
    expected = ["null_user", "null_item", "rating_not_numeric", "time_not_numeric"]
    assert found == [(*row, reason) for row, reason in zip(rows, expected, strict=True)]


def test_no_rows_are_no_fault() -> None:
    good, bad = check(raw(), RATINGS, ITEM_IDS)
    assert (len(good), len(bad)) == (0, 0)


def test_catalogue_is_sorted_by_the_bytes_of_its_ids() -> None:
    items = pa.table([["9", "10", "é"], ["a", None, "c"], ["", "", ""], ["", "", ""]], schema=ITEMS)
    table = item_table(items)
    assert table["item_id"].to_pylist() == ["10", "9", "é"]
    assert table["title"].to_pylist() == ["", "a", "c"]


def test_catalogue_with_empty_and_repeated_ids_is_refused() -> None:
    with pytest.raises(InputError) as error:
        item_table(pa.table({"item_id": ["1", None, "2", "2"]}))
    assert [fault.problem for fault in error.value.faults] == [
        "is empty in 1 rows",
        "1 ids are there more than once, the first is '2'",
    ]
