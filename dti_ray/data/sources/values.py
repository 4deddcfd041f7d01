"""Values of raw columns: as text, as valid UTF-8, and rows that are no rows put back into their places.

Stage: sources. In: Arrow columns as a file gave them. Out: the same values in a form that others may rely on.
Invariant: two values that a person would write alike become the same text, whatever their type: 242, 242.0 and "242".

    as_text([242.0, 2.5, null])  →  ["242", "2.5", null]
    good rows "a", "b" and a bad row at place 1  →  ["a", null, "b"], faults [null, "malformed_line", null]
"""

# pyarrow.compute makes its functions at run time, where no type checker sees them.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import types

from dti_ray.errors import Fault, InputError

ROW, FAULT = "row", "fault"
WRONG_FIELDS, MALFORMED, NOT_UTF8 = "wrong_number_of_fields", "malformed_line", "not_utf8"

TEXT_TYPES = (
    types.is_string, types.is_large_string, types.is_string_view,
    types.is_binary, types.is_large_binary, types.is_binary_view, types.is_fixed_size_binary,
)  # fmt: skip
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
MAX_EXACT = 2.0**63  # integral floats below this become an integer's text

Values = TypeVar("Values", pa.Array, pa.ChunkedArray)


def as_text(values: Values) -> Values:
    """Return values as strings; null stays null, and NaN becomes null.

    Integers are decimal, integral floats and decimals have no fraction, bool is true or false, times are ISO 8601,
    a list of texts is joined by spaces, and whatever else is nested becomes JSON.
    """
    if isinstance(values, pa.ChunkedArray):
        return pa.chunked_array([as_text(chunk) for chunk in values.chunks], pa.string())
    kind = values.type
    if types.is_dictionary(kind):
        return as_text(values.dictionary_decode())
    if types.is_floating(kind):
        return _float_text(values)
    if types.is_decimal(kind):
        return pc.replace_substring_regex(values.cast(pa.string()), r"\.0+$", "")
    if types.is_timestamp(kind):
        return pc.replace_substring(values.cast(pa.string()), " ", "T")
    if types.is_nested(kind):
        return pa.array([None if value is None else nested_text(value) for value in values.to_pylist()], pa.string())
    if types.is_fixed_size_binary(kind):
        return values.cast(pa.binary()).cast(pa.string())
    return values.cast(pa.string())


def nested_text(value: object) -> str:
    """Return a list of texts joined by spaces, anything else as JSON."""
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return " ".join(value)
    return json.dumps(value, ensure_ascii=False, default=str)


def scalar_text(value: object) -> str | None:
    """Return a value of Python's JSON reader as `as_text` would."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, int) and abs(value) >= MAX_EXACT:
        return str(value)
    return as_text(pa.array([value]))[0].as_py() if isinstance(value, (int, float)) else nested_text(value)


def decoded(column: pa.Array) -> tuple[pa.Array, np.ndarray | None]:
    """Return a column without dictionaries, its texts checked to be UTF-8.

    Returns:
        (the column; bytes are texts now, and null where they are none, where those are, or None for nowhere).
    """
    if types.is_dictionary(column.type):
        column = column.dictionary_decode()
    kind = column.type
    if not any(is_kind(kind) for is_kind in TEXT_TYPES):
        return column, None
    is_large = types.is_large_string(kind) or types.is_large_binary(kind)
    column = column.cast(pa.large_binary() if is_large else pa.binary())
    text = pa.large_string() if is_large else pa.string()
    try:
        return column.cast(text), None
    except pa.ArrowInvalid:
        bad = np.array([value is not None and not is_utf8(value) for value in column.to_pylist()])
        return pc.if_else(pa.array(bad), None, column).cast(text), bad


def is_utf8(value: bytes) -> bool:
    """Say whether bytes are valid UTF-8."""
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True


def is_encodable(value: str) -> bool:
    """Say whether a text is without lone surrogates, which stand for bytes that were no UTF-8."""
    return value.isascii() or not LONE_SURROGATE.search(value)


def marked(
    columns: Mapping[str, pa.Array], first_row: int, bad: Mapping[int, str] | None = None, rows: int | None = None
) -> pa.RecordBatch:
    """Put good rows and bad ones in their order, number them, and mark those whose text is not UTF-8.

    Args:
        columns: values of the good rows.
        first_row: number of the first row of all.
        bad: place among all rows → why that row is none.
        rows: number of good rows, needed only where there are no columns.
    """
    good = len(next(iter(columns.values()))) if columns else rows or 0
    faults = np.full(good + len(bad or {}), None, object)
    checked = {name: decoded(column) for name, column in columns.items()}
    if bad:
        places = np.ones(len(faults), np.bool_)
        for place, reason in bad.items():
            places[place], faults[place] = False, reason
        indices = np.where(places, np.cumsum(places) - 1, 0)
        take = pa.array(indices, pa.int64(), mask=~places)
        checked = {name: (column.take(take), _spread(mask, places)) for name, (column, mask) in checked.items()}
    masks = [mask for _, mask in checked.values() if mask is not None]
    arrays = {name: column for name, (column, _) in checked.items()}
    if masks:
        broken = np.logical_or.reduce(masks)
        faults[broken] = NOT_UTF8
        keep = pa.array(~broken)
        arrays = {name: pc.if_else(keep, column, None) for name, column in arrays.items()}
    arrays[ROW] = pa.array(np.arange(first_row, first_row + len(faults), dtype=np.int64))
    arrays[FAULT] = pa.array(faults, pa.string()) if bad or masks else pa.nulls(len(faults), pa.string())
    return pa.RecordBatch.from_arrays(list(arrays.values()), names=list(arrays))


def check_present(wanted: Iterable[str], found: Collection[str], where: str) -> None:
    """Hold a file's columns against those that are wanted, once more when it is read.

    Raises:
        InputError: one is missing.
    """
    missing = sorted(set(wanted).difference(found))
    if missing:
        raise InputError(Fault(where, f"has no column {', '.join(missing)}", hint=f"found {', '.join(found)}"))


def _spread(mask: np.ndarray | None, places: np.ndarray) -> np.ndarray | None:
    """Return a mask of the good rows as one of all rows."""
    if mask is None:
        return None
    whole = np.zeros(len(places), np.bool_)
    whole[places] = mask
    return whole


def _float_text(values: pa.Array) -> pa.Array:
    values = values.cast(pa.float32()) if types.is_float16(values.type) else values
    values = pc.if_else(pc.is_nan(values), None, values)
    is_whole = pc.and_(pc.equal(values, pc.floor(values)), pc.less(pc.abs(values), MAX_EXACT))
    whole = pc.cast(pc.if_else(is_whole, values, None), pa.int64()).cast(pa.string())
    return pc.if_else(is_whole, whole, values.cast(pa.string()))
