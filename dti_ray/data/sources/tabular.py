"""Any log in Parquet, delimited text or JSON Lines: a mapping in the configuration says which column means what.

Stage: sources. In: `data.path`, `data.catalogue`, `data.columns`, `data.label`. Out: a `RawLog`.
Invariant: the format is found by the names of the files, all of one; without a catalogue the log itself holds the
items: their ids, and their texts where `columns.text` names some.

    path: s3://logs/2024          date=2024-01-01/0.parquet, date=2024-01-02/0.parquet     all are read
    catalogue: items.csv          asin,name,brand    →   item_id (columns.catalogue_item: asin), name, brand
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import pyarrow as pa

from dti_ray.config.data import DataConfig
from dti_ray.config.label import parse_label
from dti_ray.data.sources import delimited, formats, headings
from dti_ray.data.sources.files import MEMBER, ZIP, Place, place
from dti_ray.data.sources.formats import ENDINGS, Format, Kind, Layout
from dti_ray.data.sources.headings import Wanted
from dti_ray.data.sources.raw import FAULT, ITEM, LABEL, ROW, TIME, USER, RawLog
from dti_ray.data.sources.values import as_text
from dti_ray.errors import Fault, InputError
from dti_ray.storage import Storage

SHOWN_FILES = 5
EXPECTED = "files that end with .parquet, .csv, .tsv, .jsonl, .ndjson or .json, the text ones also with .gz"


def locate(config: DataConfig, _storage: Storage) -> RawLog:
    """Find the files of `data.path` and `data.catalogue` and check their columns; the root has no part in it.

    Raises:
        InputError: a file or a column is missing, the formats are mixed, or (unless `on_bad_file` is quarantine) a
            file is damaged; StorageError: a place cannot be reached.
    """
    assert config.path is not None
    log, columns = place(config.path, "data.path"), config.columns
    wanted = [
        Wanted(columns.user, "data.columns.user"),
        Wanted(columns.item, "data.columns.item"),
        Wanted(columns.time, "data.columns.time"),
        *(Wanted(heading, "data.label") for heading in parse_label(config.label).columns),
    ]
    names = {USER: columns.user, ITEM: columns.item, TIME: columns.time}
    names |= {LABEL + heading: heading for heading in parse_label(config.label).columns}
    skip_damaged = config.on_bad_file == "quarantine"
    if config.catalogue is None:
        files, form = tables(log)
        wanted += [Wanted(heading, "data.columns.text", may_nest=True) for heading in columns.text]
        headings.check(log.storage, files, form, wanted, skip_damaged)
        items = {"item_id": columns.item} | {heading: heading for heading in columns.text}
        return RawLog(log.storage, files, form, names, item_columns=items)
    items = place(config.catalogue, "data.catalogue")
    files, form = tables(_without(log, items))
    item_files, item_form = tables(items)
    item_wanted = [Wanted(columns.catalogue_item or columns.item, _item_key(config))]
    item_wanted += [Wanted(heading, "data.columns.text", may_nest=True) for heading in columns.text]
    headings.together(
        partial(headings.check, log.storage, files, form, wanted, skip_damaged),
        partial(headings.check, items.storage, item_files, item_form, item_wanted, skip_damaged=False),
    )
    mapping = _item_columns(config, items.storage, item_files, item_form)
    read = partial(read_tables, items.storage, item_files, item_form, mapping)
    shown = tuple(map(items.storage.display, item_files))
    return RawLog(log.storage, files, form, names, shown, read_catalogue=read)


def tables(found: Place) -> tuple[tuple[str, ...], Format]:
    """Return the files of a place that hold tables, and their format by their names.

    Raises:
        InputError: there are none, or they are of several formats.
    """
    files = tuple(file for file in found.files if formats.ending(file) in ENDINGS)
    if not files:
        held = ", ".join(found.files[:SHOWN_FILES]) or "no file"
        raise InputError(Fault(found.name, "holds no table", EXPECTED, f"it holds {held}"))
    kinds: set[Kind] = {ENDINGS[formats.ending(file)] for file in files}
    endings = {formats.ending(file): file for file in files}
    if len(kinds) > 1 or {"csv", "tsv"} <= endings.keys():
        held = ", ".join(endings[name] for name in sorted(endings))
        raise InputError(Fault(found.name, f"holds files of several formats: {held}", "files of one format"))
    (kind,) = kinds
    if kind == "parquet" and any(f"{ZIP}{MEMBER}" in file for file in files):
        raise InputError(Fault(found.name, "holds Parquet within a zip", "Parquet files as such", "unpack it"))
    return files, Format(kind, _layout(found.storage, files)) if kind == "csv" else Format(kind)


def read_tables(storage: Storage, files: Sequence[str], form: Format, columns: Mapping[str, str]) -> pa.Table:
    """Return the wanted columns of some files as one table of strings, in their order; see `read_batches`."""
    schema = pa.schema([(name, pa.string()) for name in columns])
    return pa.Table.from_batches(read_batches(storage, files, form, columns), schema)


def read_batches(
    storage: Storage, files: Sequence[str], form: Format, columns: Mapping[str, str]
) -> Iterator[pa.RecordBatch]:
    """Yield the wanted columns of some files as strings.

    Args:
        storage: where the files lie.
        files: their names.
        form: how they are laid out.
        columns: name in the batch → heading in the files.

    Raises:
        InputError: a file is missing or damaged, or has rows that cannot be read; StorageError: it cannot be reached.
    """
    numbered = {str(i): heading for i, heading in enumerate(columns.values())}  # a column may be named "row"
    for file in files:
        for batch in formats.batches(storage, file, form, numbered):
            _refuse_faults(storage.display(file), batch)
            yield pa.RecordBatch.from_arrays([as_text(batch[name]) for name in numbered], names=list(columns))


def _refuse_faults(where: str, batch: pa.RecordBatch) -> None:
    if batch[FAULT].null_count == len(batch):
        return
    bad = [(row, fault) for row, fault in zip(batch[ROW].to_pylist(), batch[FAULT].to_pylist(), strict=True) if fault]
    counts = ", ".join(f"{count} {fault}" for fault, count in Counter(fault for _, fault in bad).most_common())
    problem = f"has rows that cannot be read ({counts}), the first is row {bad[0][0]}"
    raise InputError(Fault(where, problem, hint="mend the catalogue"))


def _layout(storage: Storage, files: Sequence[str]) -> Layout:
    """Guess the delimiter from the first heading that can be read."""
    for file in files:
        try:
            return Layout(delimited.guess_delimiter(delimited.first_line(storage, file)))
        except InputError:  # told by whoever checks the headings
            continue
    return Layout()


def _item_key(config: DataConfig) -> str:
    return "data.columns.item" if config.columns.catalogue_item is None else "data.columns.catalogue_item"


def _item_columns(config: DataConfig, storage: Storage, files: Sequence[str], form: Format) -> dict[str, str]:
    """Return name in the ItemTable → heading in the catalogue; without `columns.text`, of all that can be text."""
    item = config.columns.catalogue_item or config.columns.item
    texts = config.columns.text
    if not texts:
        found = formats.headings(storage, files[0], form)
        texts = tuple(name for name, kind in found if headings.is_plain(kind) and name not in (item, "item_id"))
        headings.check(storage, files, form, [Wanted(name, f"the first file, {files[0]},") for name in texts], False)
    return {"item_id": item} | {heading: heading for heading in texts if heading != "item_id"}


def _without(log: Place, items: Place) -> Place:
    """Leave a catalogue out of a log that it lies in."""
    own = {items.storage.path(file) for file in items.files}
    return Place(log.storage, tuple(file for file in log.files if log.storage.path(file) not in own), log.name)
