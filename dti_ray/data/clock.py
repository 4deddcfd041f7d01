"""Times of a log: which unit they are in, and what second that makes.

Stage: part of checks. In: a column of numbers, timestamps or ISO 8601 text. Out: whole numbers in the log's own unit
and what `Kind` each is; from the counts of all kinds, the one unit of the log.
Invariant: a log has one unit and one way to state zones; whatever could be read in two ways is refused, with an
example of either, and never guessed row by row.

    881250949           → 881250949, SECONDS            2024-03-01T12:00:00+01:00 → 1709290800, ZONED
    1709290800123       → 1709290800123, MILLIS         2024-03-01 12:00          → 1709294400, LOCAL
"""

# pyarrow.compute makes its functions at run time, where no type checker sees them.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import datetime
from enum import IntEnum
from typing import Protocol
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from dti_ray.config.data import DataConfig
from dti_ray.errors import Fault, InputError


class Kind(IntEnum):
    """What a time is, by its size or its form."""

    BAD = 0
    SMALL = 1  # a number that could be in any unit
    SECONDS = 2
    MILLIS = 3
    MICROS = 4
    NANOS = 5
    ZONED = 6  # a date that says its offset
    LOCAL = 7  # a date that does not


UNITS = {"s": Kind.SECONDS, "ms": Kind.MILLIS, "us": Kind.MICROS, "ns": Kind.NANOS}
PER_SECOND = {Kind.SECONDS: 1, Kind.MILLIS: 10**3, Kind.MICROS: 10**6, Kind.NANOS: 10**9}
# A number of 1e8 to 1e11 is a second of the years 1973 to 5138, one 1,000 times as large such a millisecond, ...
FIRST_OF_KIND = np.array([10**8, 10**11, 10**14, 10**17], np.int64)
WORDS = {
    Kind.SMALL: "small numbers",
    Kind.SECONDS: "seconds", Kind.MILLIS: "milliseconds", Kind.MICROS: "microseconds", Kind.NANOS: "nanoseconds",
    Kind.ZONED: "dates with a time zone", Kind.LOCAL: "dates without a time zone",
}  # fmt: skip

WHOLE = r"^-?([0-9]{1,18}|[0-8][0-9]{18})$"  # fits into int64
DECIMAL = r"^[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?$"
DAY, CLOCK = r"[0-9]{4}-[0-9]{2}-[0-9]{2}", r"[T ][0-9]{2}:[0-9]{2}(:[0-9]{2})?"
OFFSET = r" ?(Z|[-+][0-9]{2}(:?[0-9]{2})?)"
MAX_EXACT = 2.0**53  # whole numbers above this are no longer exact in float64

Example = tuple[str, int, int]  # file, row, value: the first of its kind


class Timed(Protocol):
    """Part of a log, counted; it may have been written as JSON meanwhile.

    Attributes:
        kinds: name of a `Kind` → rows.
        first_of_kind: name of a kind → the first such row.
    """

    kinds: dict[str, int]
    first_of_kind: dict[str, Example]


def read_times(values: pa.Array, config: DataConfig) -> tuple[NDArray[np.int64], NDArray[np.int8]]:
    """Return int64 values, floored, and their `Kind`; dates are in seconds, numbers in the log's own unit."""
    if pa.types.is_timestamp(values.type) or pa.types.is_date(values.type):
        return _dates(values, config)
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        return _texts(pc.utf8_trim_whitespace(values), config)
    if pa.types.is_integer(values.type):
        if pa.types.is_uint64(values.type):
            values = pc.if_else(pc.less(values, pa.scalar(2**63, pa.uint64())), values, None)
        known = pc.is_valid(values).to_numpy(zero_copy_only=False)
        return _sized(pc.cast(pc.fill_null(values, 0), pa.int64()).to_numpy(), known)
    if pa.types.is_floating(values.type) or pa.types.is_decimal(values.type):
        return _floats(pc.cast(values, pa.float64(), safe=False).to_numpy(zero_copy_only=False))
    return np.zeros(len(values), np.int64), np.zeros(len(values), np.int8)


def unit_of_parts(parts: Iterable[Timed], config: DataConfig) -> int:
    """Return the divisor that makes seconds of a log's times, by what all of its parts hold.

    Raises:
        InputError: as of `unit_of`.
    """
    counts: Counter[Kind] = Counter()
    examples: dict[Kind, Example] = {}
    for part in parts:
        counts.update({Kind[name]: count for name, count in part.kinds.items()})
        for name, (file, row, value) in part.first_of_kind.items():
            examples.setdefault(Kind[name], (file, row, value))
    return unit_of(counts, examples, config)


def unit_of(counts: Mapping[Kind, int], examples: Mapping[Kind, Example], config: DataConfig) -> int:
    """Return the divisor that makes seconds of a log's times.

    Args:
        counts: kind → rows.
        examples: kind → the first such row.
        config: says the unit where the user does.

    Raises:
        InputError: units are mixed, or only some dates state a zone and `data.time_zone` says nothing of the others.
    """
    found = sorted(kind for kind, count in counts.items() if count and kind > Kind.SMALL)
    numbers, dates = [k for k in found if k < Kind.ZONED], [k for k in found if k >= Kind.ZONED]
    hint = "bring the log to one unit"
    if numbers and not dates and config.time_unit is None:
        hint = "bring the log to one unit, or set data.time_unit: rows of another one then go to quarantine"
    if len(numbers) > 1 or ((numbers or counts.get(Kind.SMALL)) and dates):
        said = [*(numbers or [Kind.SMALL]), *dates]
        raise InputError(Fault("times of the log", _mixture(said, counts, examples), "one unit", hint))
    if len(dates) > 1 and config.time_zone is None:
        hint = "set data.time_zone to the zone of those that state none, such as UTC"
        raise InputError(Fault("times of the log", _mixture(dates, counts, examples), "one kind", hint))
    if dates:
        return 1
    stated = [UNITS[config.time_unit]] if config.time_unit is not None else numbers
    return PER_SECOND[stated[0]] if stated else 1


def _mixture(kinds: list[Kind], counts: Mapping[Kind, int], examples: Mapping[Kind, Example]) -> str:
    parts = []
    for kind in kinds:
        file, row, value = examples[kind]
        said = f"{np.datetime64(value, 's')}" if kind >= Kind.ZONED else f"{value}"
        said += "Z" if kind == Kind.ZONED else ""
        parts.append(f"{counts[kind]:,} {WORDS[kind]} ({said} in {file} row {row})")
    return "are mixed: " + ", ".join(parts)


def _sized(values: NDArray[np.int64], known: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int8]]:
    """Tell the unit of whole numbers by their size."""
    size = np.abs(values)
    kind = (Kind.SMALL + np.searchsorted(FIRST_OF_KIND, size, side="right")).astype(np.int8)
    return values, np.where(known & (size >= 0), kind, np.int8(Kind.BAD))  # abs of the lowest int64 is negative


def _floats(values: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.int8]]:
    known = np.abs(values) < 2.0**63  # NaN compares false
    return _sized(np.floor(np.where(known, values, 0.0)).astype(np.int64), known)


def _dates(values: pa.Array, config: DataConfig) -> tuple[NDArray[np.int64], NDArray[np.int8]]:
    """Return seconds of a column of timestamps or days."""
    known = pc.is_valid(values).to_numpy(zero_copy_only=False)
    zoned = pa.types.is_timestamp(values.type) and values.type.tz is not None
    unit = values.type.unit if pa.types.is_timestamp(values.type) else "s"
    if not zoned:
        values = pc.cast(values, pa.timestamp(unit))
        values = pc.assume_timezone(values, config.time_zone or "UTC", ambiguous="earliest", nonexistent="earliest")
    per_second = PER_SECOND[UNITS[unit]]
    ticks = pc.fill_null(pc.cast(values, pa.int64()), 0).to_numpy()
    kind = np.where(known, Kind.ZONED if zoned else Kind.LOCAL, Kind.BAD).astype(np.int8)
    return ticks // per_second, kind


def _texts(text: pa.Array, config: DataConfig) -> tuple[NDArray[np.int64], NDArray[np.int8]]:
    """Read numbers and dates; a column may hold both, which `unit_of` then refuses."""
    whole = pc.match_substring_regex(text, WHOLE)
    values, kind = read_times(pc.cast(pc.if_else(whole, text, None), pa.int64()), config)
    rest = kind == Kind.BAD
    if rest.any():
        others = text.filter(pa.array(rest))
        numeric = pc.match_substring_regex(others, DECIMAL)
        floats = _floats(pc.cast(pc.if_else(numeric, others, None), pa.float64()).to_numpy(zero_copy_only=False))
        dates = _date_texts(others, config)
        is_date = dates[1] != Kind.BAD
        values, kind = values.copy(), kind.copy()
        values[rest], kind[rest] = (np.where(is_date, d, f) for d, f in zip(dates, floats, strict=True))
    return values, kind


def _date_texts(text: pa.Array, config: DataConfig) -> tuple[NDArray[np.int64], NDArray[np.int8]]:
    short = pc.replace_substring_regex(text, r"\.[0-9]+", "")  # below a second
    is_date = pc.fill_null(pc.match_substring_regex(short, f"^{DAY}({CLOCK}({OFFSET})?)?$"), False)
    zoned = pc.fill_null(pc.match_substring_regex(short, f"^{DAY}{CLOCK}{OFFSET}$"), False)
    plain = pc.if_else(is_date, pc.replace_substring_regex(short, r" (Z|[-+])", r"\1"), None)
    with_zone = _parse(pc.if_else(zoned, plain, None), pa.timestamp("s", "UTC"))
    without = _parse(pc.if_else(zoned, None, plain), pa.timestamp("s"))
    (a, a_kind), (b, b_kind) = _dates(with_zone, config), _dates(without, config)
    return np.where(a_kind, a, b), np.where(a_kind, a_kind, b_kind)


def _parse(text: pa.Array, kind: pa.DataType) -> pa.Array:
    """Cast text of the right form; days that no calendar has become null."""
    try:
        return pc.cast(text, kind)
    except pa.ArrowInvalid:
        return pa.array([None if value is None else _instant(value, kind.tz) for value in text.to_pylist()], kind)


def _instant(text: str, zone: str | None) -> datetime | None:
    try:
        found = datetime.fromisoformat(text)
        return found.astimezone(ZoneInfo("UTC")) if zone is not None else found
    except (ValueError, OverflowError):  # the second: beyond the years 1 to 9999
        return None
