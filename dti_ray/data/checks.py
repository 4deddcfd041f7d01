"""Good rows and refused rows: every value of a raw log is looked at once, here.

Stage: between sources and interactions. In: rows as a `RawLog` delivers them, an ItemTable.
Out: rows of `INTERACTIONS` and rows of `REFUSED`; the catalogue in its final order.
Invariant: each raw row is in exactly one of the two tables, a refused one with its first reason; nothing
here depends on how the rows were divided into batches.

    user_id item_id label.rating time        row     INTERACTIONS  196  1  0  881250949    row 1
    196     242     3            881250949   1
    196     302     good         881250950   2       REFUSED       196  302  good  881250950  rating_not_numeric  row 2
"""

# pyarrow.compute makes its functions at run time, where no type checker sees them.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from dti_ray.config.data import DataConfig
from dti_ray.config.label import Label, parse_label
from dti_ray.data.clock import UNITS, Kind, read_times
from dti_ray.data.labels import clicks
from dti_ray.data.sources.raw import FAULT, ITEM, LABEL, ROW, TIME, USER
from dti_ray.data.sources.values import as_text
from dti_ray.errors import Fault, InputError

# Checked rows: `item` is the index into the sorted ItemTable, `label` 0 or 1, `time` in the log's own unit.
INTERACTIONS = pa.schema(
    [
        ("user_id", pa.string()),
        ("item", pa.int32()),
        ("label", pa.int8()),
        ("time", pa.int64()),
        ("file", pa.int32()),
        ("row", pa.int64()),
    ]
)
TEXTS = ("user_id", "item_id", "label", "time")
REFUSED = pa.schema(
    [*((name, pa.string()) for name in TEXTS), ("reason", pa.string()), ("file", pa.int32()), ("row", pa.int64())]
)
MALFORMED_TEXT = 200  # characters of a refused value that are kept


@dataclass(frozen=True, eq=False)
class Checked:
    """Some rows of one file after the check.

    Attributes:
        good: rows as `INTERACTIONS`.
        refused: rows as `REFUSED`.
        kinds: `Kind` of each good row's time, int8.
    """

    good: pa.Table
    refused: pa.Table
    kinds: NDArray[np.int8]


def item_table(items: pa.Table) -> pa.Table:
    """Return the catalogue sorted by item_id, no value null: the order that item indices refer to.

    Raises:
        InputError: an item has no id, or an id is there twice.
    """
    filled = [pc.fill_null(pc.cast(column, pa.string()), "") for column in items.columns]
    table = pa.table(filled, names=items.column_names).sort_by("item_id").combine_chunks()
    ids = table["item_id"].to_numpy()
    twice = sorted(set(ids[1:][ids[1:] == ids[:-1]]) - {""})
    faults = []
    if len(ids) and ids[0] == "":
        faults.append(Fault("item catalogue: item_id", f"is empty in {int((ids == '').sum())} rows", "an id"))
    if twice:
        problem = f"{len(twice)} ids are there more than once, the first is {twice[0]!r}"
        faults.append(Fault("item catalogue: item_id", problem, "one row per item"))
    if faults:
        raise InputError(*faults)
    return table


def check(raw: pa.Table, file: int, config: DataConfig, item_ids: pa.Array) -> Checked:
    """Split the raw rows of one file into good ones and refused ones; both keep the order of the input.

    A row is refused for the first of: what its reader found (`fault`), null_user, null_item, what `labels` says of
    the label's columns, time_not_understood (with `data.time_unit` also time_not_in_<unit>), item_not_in_catalogue.
    An id of spaces counts as null.

    Args:
        raw: columns of a `RawLog` batch.
        file: index into its files.
        config: how label and time are read.
        item_ids: the ItemTable's ids, in its order.
    """
    label = parse_label(config.label)
    columns = {name: _array(raw[name]) for name in raw.column_names}
    user, item_id = as_text(columns[USER]), as_text(columns[ITEM])
    clicked, no_label = clicks(label, {name: columns[LABEL + name] for name in label.columns})
    time, kind = read_times(columns[TIME], config)
    item = pc.index_in(item_id, value_set=item_ids)
    masks = {
        "null_user": _is_blank(user),
        "null_item": _is_blank(item_id),
        **no_label,
        "time_not_understood": kind == Kind.BAD,
        **_other_unit(kind, config),
        "item_not_in_catalogue": pc.is_null(item).to_numpy(zero_copy_only=False),
    }
    reason = np.select(list(masks.values()), range(1, len(masks) + 1), default=0)
    readable = pc.is_null(columns[FAULT]).to_numpy(zero_copy_only=False)
    good = readable & (reason == 0)
    kept = pa.array(good)
    places = {"file": pa.array(np.full(int(good.sum()), file, np.int32)), "row": columns[ROW].filter(kept)}
    values = [user.filter(kept), item.filter(kept), pa.array(clicked[good]), pa.array(time[good])]
    table = pa.table([*values, *places.values()], INTERACTIONS.names).cast(INTERACTIONS)
    if good.all():
        return Checked(table, REFUSED.empty_table(), kind)
    bad = np.flatnonzero(~good)
    texts = {"user_id": user, "item_id": item_id, "label": _label_text(label, columns), "time": as_text(columns[TIME])}
    words = pa.array(np.array(["", *masks])[reason[bad]], pa.string())
    refused = {
        **{name: pc.utf8_slice_codeunits(text.take(bad), 0, MALFORMED_TEXT) for name, text in texts.items()},
        "reason": pc.coalesce(columns[FAULT].take(bad), words),
        "file": pa.array(np.full(len(bad), file, np.int32)),
        "row": columns[ROW].take(bad),
    }
    return Checked(table, pa.table(refused, schema=REFUSED), kind[good])


def _array(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    combined = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return combined.dictionary_decode() if pa.types.is_dictionary(combined.type) else combined


def _other_unit(kind: NDArray[np.int8], config: DataConfig) -> dict[str, NDArray[np.bool_]]:
    if config.time_unit is None:
        return {}
    return {f"time_not_in_{config.time_unit}": ~np.isin(kind, (Kind.SMALL, UNITS[config.time_unit]))}


def _is_blank(text: pa.Array) -> NDArray[np.bool_]:
    return pc.fill_null(pc.equal(pc.utf8_trim_whitespace(text), ""), True).to_numpy(zero_copy_only=False)


def _label_text(label: Label, columns: dict[str, pa.Array]) -> pa.Array:
    """Return what a label's columns hold, as one text a row."""
    texts = [as_text(columns[LABEL + name]) for name in label.columns]
    if len(texts) == 1:
        return texts[0]
    said = [
        pc.binary_join_element_wise(name, pc.fill_null(text, ""), "=")
        for name, text in zip(label.columns, texts, strict=True)
    ]
    return pc.binary_join_element_wise(*said, ", ")
