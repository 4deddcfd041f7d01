"""Good rows and refused rows: every value of a raw log is looked at once, here.

Stage: between sources and interactions. In: a table of `RAW_INTERACTIONS` (strings), an ItemTable.
Out: rows of `INTERACTIONS` and rows of `QUARANTINE`; the catalogue in its final order.
Invariant: each raw row is in exactly one of the two tables, a refused one with its first reason; nothing
here depends on how the rows were divided into batches.

    user_id item_id label  time          INTERACTIONS  196  1  0  881250949
    "196"   "242"   "3"    "881250949"
    "196"   "302"   "good" "881250950"   QUARANTINE    196  302  good  881250950  rating_not_numeric
"""

# pyarrow.compute makes its functions at run time, where no type checker sees them.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from dti_ray.config.schema import DataConfig
from dti_ray.data.sources.movielens import RAW_INTERACTIONS
from dti_ray.errors import Fault, InputError

# Checked rows: `item` is the index into the sorted ItemTable, `label` 0 or 1, `time` in seconds.
INTERACTIONS = pa.schema([("user_id", pa.string()), ("item", pa.int32()), ("label", pa.int8()), ("time", pa.int64())])
QUARANTINE = RAW_INTERACTIONS.append(pa.field("reason", pa.string()))

NUMBER = r"^-?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?$"
MAX_TIME_S = 2.0**53  # whole seconds above this are no longer exact in float64


def item_table(items: pa.Table) -> pa.Table:
    """Return the catalogue sorted by item_id, no value null: the order that item indices refer to.

    Raises:
        InputError: an item has no id, or an id is there twice.
    """
    filled = [pc.fill_null(pc.cast(column, pa.string()), "") for column in items.columns]
    table = pa.table(filled, names=items.column_names).sort_by("item_id").combine_chunks()
    ids = table["item_id"].to_numpy()
    twice = ids[1:][ids[1:] == ids[:-1]]
    faults = []
    if len(ids) and ids[0] == "":
        faults.append(Fault("item catalogue: item_id", f"is empty in {int((ids == '').sum())} rows", "an id"))
    if len(twice):
        problem = f"{len(twice)} ids are there more than once, the first is {twice[0]!r}"
        faults.append(Fault("item catalogue: item_id", problem, "one row per item"))
    if faults:
        raise InputError(*faults)
    return table


def check(raw: pa.Table, config: DataConfig, item_ids: pa.Array) -> tuple[pa.Table, pa.Table]:
    """Split raw rows into good ones and refused ones; both keep the order of the input.

    A row is refused for the first of: null_user, null_item, `<label column>_not_numeric` (with
    `label_threshold: null` label_not_0_or_1), time_not_numeric (also beyond 2^53), item_not_in_catalogue.
    An id of spaces counts as null. Times are cut to whole seconds.

    Args:
        raw: columns of `RAW_INTERACTIONS`.
        config: where the label comes from.
        item_ids: the ItemTable's ids, in its order.

    Returns:
        (rows as `INTERACTIONS`, rows as `QUARANTINE`).
    """
    text = raw.select(RAW_INTERACTIONS.names).cast(RAW_INTERACTIONS).combine_chunks()
    label, seconds = _numbers(text["label"]), _numbers(text["time"])
    item = pc.index_in(text["item_id"], value_set=item_ids)
    if config.label_threshold is None:
        bad_label, clicked = ~np.isin(label, (0.0, 1.0)), label == 1.0
        label_reason = "label_not_0_or_1"
    else:
        bad_label, clicked = ~np.isfinite(label), label > config.label_threshold
        label_reason = f"{config.label_column}_not_numeric"
    refused = {
        "null_user": _is_blank(text["user_id"]),
        "null_item": _is_blank(text["item_id"]),
        label_reason: bad_label,
        "time_not_numeric": ~(np.abs(seconds) <= MAX_TIME_S),  # NaN compares false
        "item_not_in_catalogue": pc.is_null(item).to_numpy(),
    }
    reason = np.select(list(refused.values()), range(1, len(refused) + 1), default=0)
    good, bad = reason == 0, np.flatnonzero(reason)
    columns = [
        text["user_id"].filter(pa.array(good)),
        item.filter(pa.array(good)),
        pa.array(clicked[good]),
        pa.array(np.floor(seconds[good])),
    ]
    reasons = pa.array(np.array(list(refused))[reason[bad] - 1], pa.string())
    return (
        pa.table(columns, INTERACTIONS.names).cast(INTERACTIONS),
        text.take(bad).append_column("reason", reasons).cast(QUARANTINE),
    )


def _numbers(text: pa.ChunkedArray) -> NDArray[np.float64]:
    """Return float64 values, NaN where the text is not a number in plain or scientific notation."""
    trimmed = pc.utf8_trim_whitespace(text)
    is_number = pc.match_substring_regex(trimmed, NUMBER)
    return pc.cast(pc.if_else(is_number, trimmed, None), pa.float64()).to_numpy()


def _is_blank(text: pa.ChunkedArray) -> NDArray[np.bool_]:
    return pc.fill_null(pc.equal(pc.utf8_trim_whitespace(text), ""), True).to_numpy()
