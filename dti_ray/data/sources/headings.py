"""Schemas before work: every file's columns are held against those that are wanted, and all faults told at once.

Stage: sources. In: files and the columns that the configuration names. Out: nothing, or one error with every fault.
Invariant: no row is read before each file has its columns; a fault names the file, what it has, the configuration's
key, and the column that was probably meant.

    logs/a.csv: has no column 'user_id', which data.columns.user names; did you mean 'userId'? it has userId, item, ts
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa
from pyarrow import types

from dti_ray.data.sources import formats
from dti_ray.data.sources.formats import Format
from dti_ray.data.sources.raw import OPEN_FILES
from dti_ray.errors import Fault, InputError
from dti_ray.storage import Storage

Columns = list[tuple[str, "pa.DataType | None"]]
SHOWN_COLUMNS = 30


@dataclass(frozen=True)
class Wanted:
    """A column that a source needs.

    Attributes:
        heading: its name in the files.
        key: the configuration's key that asks for it.
        may_nest: whether lists and structs will do: a text can be made of them.
    """

    heading: str
    key: str
    may_nest: bool = False


def check(storage: Storage, files: Sequence[str], form: Format, wanted: Sequence[Wanted], skip_damaged: bool) -> None:
    """Hold the columns of all files against those wanted.

    Args:
        storage: where the files lie.
        files: their names.
        form: how they are laid out.
        wanted: the columns.
        skip_damaged: leave files that cannot be read to those who read them later.

    Raises:
        InputError: with one fault per missing column (files that lack the same one share it) and per damaged file.
    """
    missing: dict[tuple[str, str], list[tuple[str, Columns]]] = {}
    damaged: list[Fault] = []
    for file, columns in zip(files, read_all(storage, files, form), strict=True):
        if isinstance(columns, InputError):
            damaged += columns.faults
            continue
        for column in wanted if columns else ():  # an empty JSON Lines file has no row, hence no column
            problem = _problem(column, columns)
            if problem:
                missing.setdefault((column.heading, problem), []).append((storage.display(file), columns))
    faults = [] if skip_damaged else damaged
    faults += [_fault(heading, problem, at) for (heading, problem), at in missing.items()]
    if faults:
        raise InputError(*faults)


def read_all(storage: Storage, files: Sequence[str], form: Format) -> list[Columns | InputError]:
    """Return the columns of each file, or what is wrong with it.

    Raises:
        StorageError: a file cannot be reached.
    """

    def read(file: str) -> Columns | InputError:
        try:
            return formats.headings(storage, file, form)
        except InputError as error:
            return error

    with ThreadPoolExecutor(OPEN_FILES) as pool:
        return list(pool.map(read, files))


def together(*checks: Callable[[], object]) -> None:
    """Run several checks and raise the faults of all of them as one error."""
    faults: list[Fault] = []
    for run in checks:
        try:
            run()
        except InputError as error:
            faults += error.faults
    if faults:
        raise InputError(*faults)


def is_plain(kind: pa.DataType | None) -> bool:
    """Say whether a column holds one text, number or time per row."""
    return kind is None or not (types.is_nested(kind) or types.is_binary(kind) or types.is_large_binary(kind))


def _problem(column: Wanted, columns: Columns) -> str:
    found = [kind for name, kind in columns if name == column.heading]
    if not found:
        return f"has no column {column.heading!r}, which {column.key} names"
    if len(found) > 1:
        return f"has {len(found)} columns {column.heading!r}, which {column.key} names"
    if found[0] is not None and types.is_nested(found[0]) and not column.may_nest:
        return f"has nested values ({found[0]}) in column {column.heading!r}, which {column.key} names"
    return ""


def _fault(heading: str, problem: str, at: list[tuple[str, Columns]]) -> Fault:
    where, columns = at[0]
    names = [name for name, _ in columns]
    more = f" (as in {len(at) - 1} more)" if len(at) > 1 else ""
    shown = ", ".join(names[:SHOWN_COLUMNS]) + (", …" if len(names) > SHOWN_COLUMNS else "")
    meant = near(heading, names) if heading not in names else ""
    return Fault(where, problem + more, hint=f"{meant}it has {shown}")


def near(name: str, known: Sequence[str]) -> str:
    """Return "did you mean …? " with the known name that is nearest, or an empty text."""
    plain = {_plain(one): one for one in known}
    found = difflib.get_close_matches(_plain(name), plain, n=1)
    return f"did you mean {plain[found[0]]!r}? " if found else ""


def _plain(name: str) -> str:
    return "".join(filter(str.isalnum, name)).lower()
