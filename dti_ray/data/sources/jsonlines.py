"""JSON Lines: one object per line, read by Python's own parser.

Stage: sources. In: blocks of whole lines. Out: batches with the wanted columns, `row` and `fault`.
Invariant: each line that is not blank is one row; a line that is no object is marked, and hides no other. A column's
type may differ from block to block (integers, then floats): whoever compares values turns them to text first. An
integer of any length keeps its digits, and a text that looks like a date stays a text. Arrow's parser promises neither,
and damaged input can make it crash the process (as of version 26).

    {"user": 1, "tags": ["a", "b"]}     row 1   1     "a b"   null
    {"user": 2                          row 2   null  null    malformed_line
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from dti_ray.data.sources import lines
from dti_ray.data.sources.values import MALFORMED, NOT_UTF8, is_encodable, is_utf8, marked, nested_text, scalar_text
from dti_ray.errors import Fault, InputError
from dti_ray.storage import Storage

BATCH_ROWS = 1 << 16
SAMPLE_LINES, SAMPLE_BYTES = 5_000, 2 << 20
EXACT_IN_FLOAT = 2.0**53
INT64 = range(-(2**63), 2**63)


def headings(storage: Storage, file: str) -> list[tuple[str, pa.DataType | None]]:
    """Return the keys of a file's first lines in order of appearance, each with a type where values are nested.

    Raises:
        InputError: the file is missing or damaged, or no line is an object; StorageError: it cannot be reached.
    """
    found: dict[str, pa.DataType | None] = {}
    is_read, seen = False, 0
    with lines.stream(storage, file) as (source, _):
        for _ in range(SAMPLE_LINES):
            line = source.readline(lines.LINE_BYTES)
            seen += len(line)
            tree = parsed(line.removeprefix(lines.BOM))
            for key, value in (tree or {}).items():
                found[key] = _nested(value) or found.get(key)
            is_read |= tree is not None
            if not line or seen > SAMPLE_BYTES:
                break
    if seen and not is_read:
        problem, expected = "holds no JSON object in its first lines", "JSON Lines: one object on each line"
        raise InputError(Fault(storage.display(file), problem, expected))
    return list(found.items())


def batches(storage: Storage, file: str, columns: Mapping[str, str]) -> Iterator[pa.RecordBatch]:
    """Yield a file's rows, at most `BATCH_ROWS` of a block together; see `formats.batches`.

    A key that no line has gives nulls.
    """
    wanted, first_row = sorted(set(columns.values())), 1
    for block in lines.blocks(storage, file):
        found = lines.split(block)
        for start in range(0, len(found), BATCH_ROWS):
            good, bad = _rows(found[start : start + BATCH_ROWS], wanted)
            batch = marked({name: good[key] for name, key in columns.items()}, first_row, bad, good.num_rows)
            first_row += len(batch)
            yield batch


def parsed(line: bytes) -> dict[str, Any] | None:
    """Return a line's object, or None where it is none; bytes that are no UTF-8 become lone surrogates."""
    try:
        tree = json.loads(line.decode(errors="surrogateescape"))
    except (ValueError, RecursionError):
        return None
    return tree if isinstance(tree, dict) else None


def _rows(found: Sequence[bytes], wanted: Sequence[str]) -> tuple[pa.RecordBatch, dict[int, str]]:
    """Return the wanted values of the good lines, and place → fault of the bad ones."""
    text = b",".join(found)
    trees = _together(text, found)
    bad = {place: MALFORMED for place, tree in enumerate(trees) if tree is None}
    good = [tree for tree in trees if tree is not None]
    values = [_without_nests([tree.get(key) for tree in good]) for key in wanted]
    if not is_utf8(text) or b"\\ud" in text or b"\\uD" in text:
        places = [place for place in range(len(trees)) if place not in bad]
        broken = {i for column in values for i, value in enumerate(column) if _is_broken(value)}
        bad |= {places[i]: NOT_UTF8 for i in broken}
        values = [[value for i, value in enumerate(column) if i not in broken] for column in values]
    return pa.RecordBatch.from_arrays([_column(column) for column in values], names=list(wanted)), bad


def _together(text: bytes, found: Sequence[bytes]) -> list[dict[str, Any] | None]:
    """Parse lines as one array, which takes a third of the time, and one by one where that does not succeed."""
    try:
        trees = json.loads(f"[{text.decode(errors='surrogateescape')}]")
    except (ValueError, RecursionError):
        trees = []
    if len(trees) == len(found) and all(type(tree) is dict for tree in trees):
        return trees
    return [parsed(line) for line in found]


def _without_nests(values: list[Any]) -> list[Any]:
    """Return values with text in place of lists and objects."""
    if not {list, dict} & set(map(type, values)):
        return values
    return [nested_text(value) if isinstance(value, (list, dict)) else value for value in values]


def _column(values: list[Any]) -> pa.Array:
    """Return values of one JSON type as that type, of several as text."""
    kinds = set(map(type, values)) - {type(None)}
    if kinds == {str}:
        return pa.array(values, pa.string())
    if kinds == {bool} or not kinds:
        return pa.array(values, pa.bool_() if kinds else pa.null())
    ints = [value for value in values if type(value) is int]
    if kinds == {int} and min(ints) in INT64 and max(ints) in INT64:
        return pa.array(values, pa.int64())
    if kinds == {float} or (kinds == {int, float} and all(abs(value) < EXACT_IN_FLOAT for value in ints)):
        return pa.array(values, pa.float64())
    return pa.array([scalar_text(value) for value in values], pa.string())


def _is_broken(value: object) -> bool:
    return isinstance(value, str) and not is_encodable(value)


def _nested(value: object) -> pa.DataType | None:
    if isinstance(value, dict):
        return pa.struct([])
    return pa.list_(pa.null()) if isinstance(value, list) else None
