"""Times of a log: what unit or form a value is, what second it makes, and which mixtures are refused."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal
from zoneinfo import ZoneInfo

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dti_ray.config.data import DataConfig
from dti_ray.data.clock import PER_SECOND, UNITS, Example, Kind, read_times, unit_of, unit_of_parts
from dti_ray.data.scatter import Scattered
from dti_ray.errors import InputError

UTC = DataConfig()
BERLIN = DataConfig(time_zone="Europe/Berlin")
NOON = 1_709_294_400  # 2024-03-01 12:00 UTC


def read(values: pa.Array, config: DataConfig = UTC) -> list[tuple[int, str]]:
    times, kinds = read_times(values, config)
    assert (times.dtype, kinds.dtype, len(times), len(kinds)) == ("int64", "int8", len(values), len(values))
    return [
        (int(time) if kind else 0, Kind(kind).name.lower())
        for time, kind in zip(times.tolist(), kinds.tolist(), strict=True)
    ]


def read_text(text: str | None, config: DataConfig = UTC) -> tuple[int, str]:
    (found,) = read(pa.array([text], pa.string()), config)
    return found


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (0, "small"), (-1, "small"), (99_999_999, "small"), (-99_999_999, "small"),
        (100_000_000, "seconds"), (NOON, "seconds"), (99_999_999_999, "seconds"), (-NOON, "seconds"),
        (100_000_000_000, "millis"), (NOON * 10**3, "millis"), (10**14 - 1, "millis"),
        (10**14, "micros"), (NOON * 10**6, "micros"), (10**17 - 1, "micros"),
        (10**17, "nanos"), (NOON * 10**9 + 123_456_789, "nanos"), (9 * 10**18 - 1, "nanos"),
    ],
)  # fmt: skip
def test_unit_of_a_number_is_told_by_its_size_in_every_type(value: int, kind: str) -> None:
    assert read(pa.array([value, None], pa.int64())) == [(value, kind), (0, "bad")]
    assert read_text(f" {value} ") == (value, kind)
    if abs(value) < 2**53:
        assert read(pa.array([float(value)])) == [(value, kind)]
    assert read_text(str(value)) == (value, kind), "a text is as exact as an integer"


@pytest.mark.parametrize(
    "values",
    [
        pa.array([-(2**63)], pa.int64()),
        pa.array([2**63, 2**64 - 1], pa.uint64()),
        pa.array([math.nan, math.inf, -math.inf, 1e19, None]),
        pa.array([True, False]),
        pa.nulls(2),
        pa.array([5], pa.time32("s")),
        pa.array([5], pa.duration("s")),
        pa.array([[5]]),
    ],
    ids=lambda values: str(values.type),
)
def test_what_is_no_time_is_bad(values: pa.Array) -> None:
    assert read(values) == [(0, "bad")] * len(values)


def test_fractions_are_floored() -> None:
    assert read(pa.array([881250949.9, -0.5, 7.9])) == [(881250949, "seconds"), (-1, "small"), (7, "small")]
    assert read(pa.array([Decimal("881250949.90")])) == [(881250949, "seconds")]
    assert read(pa.array([7.5], pa.float32())) == [(7, "small")]
    assert [read_text(text)[0] for text in ("881250949.9", "8.812509499e8", "-.5", "+7.9", "+7")] == [
        881250949, 881250949, -1, 7, 7,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "second", "kind"),
    [
        ("2024-03-01T12:00:00Z", NOON, "zoned"),
        ("2024-03-01T12:00:00.999Z", NOON, "zoned"),
        ("2024-03-01 12:00:00 Z", NOON, "zoned"),
        ("2024-03-01T12:00Z", NOON, "zoned"),
        ("2024-03-01T13:00:00+01:00", NOON, "zoned"),
        ("2024-03-01 13:00:00 +0100", NOON, "zoned"),
        ("2024-03-01 13:00+01", NOON, "zoned"),
        ("2024-03-01T06:30:00.5-05:30", NOON, "zoned"),
        ("2024-03-01T12:00:00", NOON, "local"),
        (" 2024-03-01 12:00:00.123456789 ", NOON, "local"),
        ("2024-03-01 12:00", NOON, "local"),
        ("2024-03-01", NOON - 43_200, "local"),
        ("1969-12-31T23:59:59.5", -1, "local"),
        ("2024-02-29", NOON - 129_600, "local"),
    ],
)
def test_iso_8601_text_is_read(text: str, second: int, kind: str) -> None:
    assert read_text(text) == (second, kind)


@pytest.mark.parametrize(
    "text",
    [
        None, "", " ", "noon", "yesterday", "2024-02-30", "2023-02-29", "2024-13-01", "2024-00-10", "2024-03-01T25:00",
        "2024-03-01T12:60", "2024-03-01T12:00:61Z", "2024-03-01T12", "2024-3-1", "01.03.2024", "03/01/2024", "12:00",
        "2024-03-01+01:00", "2024-03-01Z", "2024-03-01T12:00 Europe/Berlin", "2024-03-01T12:00+99:99", "2024-03",
        "2024-W09-5", "1e300", "nan", "inf", "0x10", "1 000", "9999999999999999999", "0001-01-01T00:00:00+01:00x",
    ],
)  # fmt: skip
def test_text_that_is_no_time_is_bad_and_harms_no_other(text: str | None) -> None:
    column = pa.array(["2024-03-01T12:00:00Z", text, str(NOON), "2024-03-01", "0001-01-01T00:00:00+01:00"])
    found = read(column)
    assert found[1] == (0, "bad")
    assert [kind for _, kind in found[:4:2]] == ["zoned", "seconds"]
    assert found[3] == (NOON - 43_200, "local")


def test_large_text_and_typed_columns_agree() -> None:
    moments = [datetime(2024, 3, 1, 12), None, datetime(1969, 12, 31, 23, 59, 59)]
    expected = [(NOON, "local"), (0, "bad"), (-1, "local")]
    for unit in ("s", "ms", "us", "ns"):
        assert read(pa.array(moments, pa.timestamp(unit))) == expected
    assert read(pa.array(["2024-03-01 12:00", None, "1969-12-31 23:59:59"], pa.large_string())) == expected


def test_timestamps_below_a_second_are_floored() -> None:
    assert read(pa.array([-1, 1999], pa.timestamp("ms"))) == [(-1, "local"), (1, "local")]


def test_timestamp_with_a_zone_is_an_instant_whatever_the_configured_zone() -> None:
    values = pa.array([NOON * 1000], pa.timestamp("ms", "America/New_York"))
    assert read(values) == read(values, BERLIN) == [(NOON, "zoned")]
    assert read_text("2024-03-01T12:00:00Z", BERLIN) == (NOON, "zoned")


def test_days_are_midnight_in_the_configured_zone() -> None:
    for kind in (pa.date32(), pa.date64()):
        days = pa.array([date(2024, 3, 1), None], kind)
        assert read(days) == [(NOON - 43_200, "local"), (0, "bad")]
        assert read(days, BERLIN)[0] == (NOON - 43_200 - 3600, "local")


@pytest.mark.parametrize(
    ("text", "utc"),
    [
        ("2024-07-01 12:00", "2024-07-01 10:00:00"),
        ("2024-01-01 12:00", "2024-01-01 11:00:00"),
        ("2024-10-27 02:30", "2024-10-27 00:30:00"),  # there twice: the first
        ("2024-03-31 02:30", "2024-03-31 00:59:59"),  # never there: the last second before the gap
        ("2024-03-31 03:00", "2024-03-31 01:00:00"),
    ],
)
def test_times_without_a_zone_are_read_in_the_configured_one(text: str, utc: str) -> None:
    second = int(datetime.fromisoformat(utc + "+00:00").timestamp())
    assert read_text(text, BERLIN) == (second, "local")
    assert read(pa.array([datetime.fromisoformat(text)], pa.timestamp("s")), BERLIN) == [(second, "local")]


@given(
    moment=st.datetimes(datetime(1900, 1, 1), datetime(2100, 1, 1)),
    offset=st.integers(-14 * 60, 14 * 60),
    has_fraction=st.booleans(),
)
def test_iso_8601_equals_the_standard_library(moment: datetime, offset: int, has_fraction: bool) -> None:
    moment = moment if has_fraction else moment.replace(microsecond=0)
    zoned = moment.replace(tzinfo=timezone(timedelta(minutes=offset)))
    assert read_text(zoned.isoformat()) == (math.floor(zoned.timestamp()), "zoned")
    local = moment.replace(tzinfo=ZoneInfo("UTC"))
    assert read_text(moment.isoformat(" ")) == (math.floor(local.timestamp()), "local")


def test_a_column_may_hold_all_forms_for_unit_of_to_judge() -> None:
    texts = ["5", None, str(NOON), f"{NOON}000", "1e9", "2024-03-01", "2024-03-01T12:00Z", "x"]
    assert [kind for _, kind in read(pa.array(texts))] == [
        "small", "bad", "seconds", "millis", "seconds", "local", "zoned", "bad",
    ]  # fmt: skip


# The unit of a whole log.

EXAMPLES: dict[Kind, Example] = {
    Kind.SMALL: ("a.csv", 1, 7),
    Kind.SECONDS: ("a.csv", 2, NOON),
    Kind.MILLIS: ("b.csv", 3, NOON * 1000),
    Kind.MICROS: ("b.csv", 4, NOON * 10**6),
    Kind.NANOS: ("b.csv", 5, NOON * 10**9),
    Kind.ZONED: ("c.csv", 6, NOON),
    Kind.LOCAL: ("c.csv", 7, NOON),
}


def unit(config: DataConfig = UTC, **counts: int) -> int:
    named = {Kind[name.upper()]: count for name, count in counts.items()}
    return unit_of(named, {kind: EXAMPLES[kind] for kind in named}, config)


@pytest.mark.parametrize(
    ("counts", "divisor"),
    [
        ({}, 1), ({"small": 5}, 1), ({"seconds": 5}, 1), ({"seconds": 5, "small": 1}, 1), ({"millis": 5}, 10**3),
        ({"millis": 5, "small": 1}, 10**3), ({"micros": 5}, 10**6), ({"nanos": 5, "seconds": 0}, 10**9),
        ({"zoned": 3}, 1), ({"local": 3}, 1),
    ],
)  # fmt: skip
def test_one_unit_gives_what_makes_seconds_of_it(counts: dict[str, int], divisor: int) -> None:
    assert unit(**counts) == divisor


@pytest.mark.parametrize("name", ["s", "ms", "us", "ns"])
def test_stated_unit_decides_for_small_numbers(name: str) -> None:
    config = DataConfig.model_validate({"time_unit": name})
    assert unit(config, small=5) == PER_SECOND[UNITS[name]]
    assert unit(config, small=5, **{UNITS[name].name: 2}) == PER_SECOND[UNITS[name]]


def test_seconds_among_milliseconds_are_refused_with_an_example_of_each() -> None:
    with pytest.raises(InputError) as error:
        unit(seconds=2, millis=1_000, small=4)
    assert str(error.value) == (
        "times of the log: are mixed: 2 seconds (1709294400 in a.csv row 2), "
        "1,000 milliseconds (1709294400000 in b.csv row 3); expected one unit; "
        "bring the log to one unit, or set data.time_unit: rows of another one then go to quarantine"
    )


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ({"seconds": 1, "zoned": 2}, "1 seconds (1709294400 in a.csv row 2), 2 dates with a time zone "),
        ({"millis": 1, "local": 2}, "1 milliseconds (1709294400000 in b.csv row 3), 2 dates without a time zone "),
        ({"small": 1, "local": 2}, "1 small numbers (7 in a.csv row 1), 2 dates without a time zone "),
    ],
)
def test_numbers_among_dates_are_refused_with_an_example_of_each(counts: dict[str, int], words: str) -> None:
    with pytest.raises(InputError) as error:
        unit(**counts)
    assert f"times of the log: are mixed: {words}(2024-03-01T12:00:00" in str(error.value)
    assert str(error.value).endswith("; expected one unit; bring the log to one unit")


def test_dates_that_state_a_zone_and_others_need_the_zone_of_the_others() -> None:
    with pytest.raises(InputError) as error:
        unit(zoned=3, local=4)
    assert str(error.value) == (
        "times of the log: are mixed: 3 dates with a time zone (2024-03-01T12:00:00Z in c.csv row 6), "
        "4 dates without a time zone (2024-03-01T12:00:00 in c.csv row 7); expected one kind; "
        "set data.time_zone to the zone of those that state none, such as UTC"
    )
    assert unit(BERLIN, zoned=3, local=4) == 1


def test_parts_of_a_log_are_judged_together_by_the_first_row_of_a_kind() -> None:
    written = [
        Scattered(kinds={"SECONDS": 2}, first_of_kind={"SECONDS": ("a.csv", 2, NOON)}),
        Scattered(kinds={"SECONDS": 1}, first_of_kind={"SECONDS": ("b.csv", 0, NOON)}),
        Scattered(kinds={"MILLIS": 1}, first_of_kind={"MILLIS": ("b.csv", 3, NOON * 1000)}),
    ]
    parts = [Scattered(**json.loads(json.dumps(asdict(one)))) for one in written]
    assert unit_of_parts(parts[:2], UTC) == 1
    assert unit_of_parts(parts[2:], UTC) == 1000
    assert unit_of_parts([], UTC) == 1
    with pytest.raises(InputError, match=r"3 .*a\.csv.*1 .*b\.csv"):
        unit_of_parts(parts, UTC)
