"""From checked rows to users: each user's interactions in time order, every one marked with its split.

Stage: after checks. In: rows of `INTERACTIONS`, all of those of some users. Out: `SEQUENCES` (one row per user) and
refused rows.
Invariants: a user's interactions are ordered by (time, item index), time in the log's own unit, which is (time,
item_id) because the ItemTable is sorted: a total order, the same for any order of the input; afterwards times are whole
seconds; no row is lost: each is in a sequence or refused.

    user item label time          train_fraction 0.5, valid_fraction 0.25
    u    b    1     7             user_id items      labels     times      splits
    u    a    0     7        →    u       [c,a,b,a]  [1,0,1,1]  [3,7,7,9]  [0,0,1,2]
    u    c    1     3
    u    a    1     9
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
from dti_ray.data.checks import REFUSED
from dti_ray.data.interactions import SEQUENCES

ROUNDING = 1e-9  # 0.7 + 0.1 is a little less than 0.8
DUPLICATE, TOO_FEW = "duplicate_event", "user_with_too_few_interactions"


@dataclass(frozen=True)
class Boundaries:
    """Last second of the training and of the validation split, for `split: global_time`."""

    train_until: int
    valid_until: int


def boundary_ranks(interactions: int, config: DataConfig) -> tuple[int, int]:
    """Return the ranks (from 0, by time) of the last interaction of training and of validation."""
    shares = (config.train_fraction, config.train_fraction + config.valid_fraction)
    train, valid = (max(int(np.ceil(share * interactions - ROUNDING)) - 1, 0) for share in shares)
    return train, valid


def sequences(
    good: pa.Table, item_ids: pa.Array, config: DataConfig, per_second: int = 1, boundaries: Boundaries | None = None
) -> tuple[pa.Table, pa.Table]:
    """Order each user's interactions, refuse duplicates and short users, and mark the splits.

    Of rows with equal user, item and second the one with the lowest label is kept, the first of them if there are
    several; the others are refused as duplicate_event. Users with fewer than `min_interactions` after that are refused
    as user_with_too_few_interactions. Refused rows hold label and time as they were understood.

    Args:
        good: all interactions of some users, as `INTERACTIONS`, in the order of files and rows.
        item_ids: the ItemTable's ids, in its order.
        config: how to split, and how short a user may be.
        per_second: what the log's times are divided by.
        boundaries: needed by `split: global_time`.

    Returns:
        (`SEQUENCES` sorted by user_id, `REFUSED` sorted by (user, time, item)).
    """
    users, user = _numbered(good["user_id"])
    item, label, time = (good[name].to_numpy() for name in ("item", "label", "time"))
    order = _order(user, time, item)
    user, item, label, second = user[order], item[order], label[order], time[order] // per_second
    duplicate = _duplicates(user, second, item, label)
    counts = np.bincount(user[~duplicate], minlength=len(users))
    is_long = counts >= config.min_interactions
    kept = ~duplicate & is_long[user]
    splits = _splits(second[kept], counts[is_long], config, boundaries)
    offsets = pa.array(np.concatenate([[0], np.cumsum(counts[is_long])]), pa.int32())
    flat = (item[kept], label[kept], second[kept], splits)
    lists = [pa.ListArray.from_arrays(offsets, pa.array(values)) for values in flat]
    table = pa.table([users.filter(pa.array(is_long)), *lists], schema=SEQUENCES)
    if kept.all():
        return table, REFUSED.empty_table()
    lost = np.flatnonzero(~kept)
    places = good.select(["file", "row"]).take(pa.array(order[lost]))
    refused = {
        "user_id": users.take(pa.array(user[lost])),
        "item_id": item_ids.take(pa.array(item[lost])),
        "label": pc.cast(pa.array(label[lost]), pa.string()),
        "time": pc.cast(pa.array(second[lost]), pa.string()),
        "reason": pa.array(np.where(duplicate[lost], DUPLICATE, TOO_FEW), pa.string()),
        "file": places["file"],
        "row": places["row"],
    }
    return table, pa.table(refused, schema=REFUSED)


def _numbered(user_ids: pa.ChunkedArray) -> tuple[pa.Array, NDArray[np.int32]]:
    """Return the distinct users in the order of their ids, and each row's index into them."""
    encoded = user_ids.combine_chunks().dictionary_encode()
    order = pc.sort_indices(encoded.dictionary)
    rank = np.empty(len(order), np.int32)
    rank[order.to_numpy()] = np.arange(len(order), dtype=np.int32)
    return encoded.dictionary.take(order), rank[encoded.indices.to_numpy()]


def _order(user: NDArray[np.int32], time: NDArray[np.int64], item: NDArray[np.int32]) -> NDArray[np.int64]:
    """Return the rows ordered by (user, time, item); equal ones stay as they were."""
    order = np.lexsort((time, user))
    rows = _tied(user[order], time[order])  # few, as a rule: only they need the third key
    within = order[rows]
    order[rows] = within[np.lexsort((item[within], time[within], user[within]))]
    return order


def _duplicates(
    user: NDArray[np.int32], second: NDArray[np.int64], item: NDArray[np.int32], label: NDArray[np.int8]
) -> NDArray[np.bool_]:
    """Mark all but one of the rows, ordered by user and time, that share user, second and item."""
    rows = _tied(user, second)
    rows = rows[np.lexsort((label[rows], item[rows], second[rows], user[rows]))]
    repeated = (np.diff(user[rows]) == 0) & (np.diff(second[rows]) == 0) & (np.diff(item[rows]) == 0)
    duplicate = np.zeros(len(user), np.bool_)
    duplicate[rows[1:][repeated]] = True
    return duplicate


def _tied(user: NDArray[np.int32], time: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the rows that have a neighbour of the same user and time."""
    same = (np.diff(user) == 0) & (np.diff(time) == 0)
    tied = np.zeros(len(user), np.bool_)
    tied[1:] |= same
    tied[:-1] |= same
    return np.flatnonzero(tied)


def _splits(
    times: NDArray[np.int64], counts: NDArray[np.int64], config: DataConfig, boundaries: Boundaries | None
) -> NDArray[np.int8]:
    """Return each interaction's index into `SPLITS`; users lie one after the other, `counts` long."""
    if not len(times):
        return np.zeros(0, np.int8)
    if config.split == "global_time":
        assert boundaries is not None, "prepare finds them for this split"
        in_valid, in_test = times > boundaries.train_until, times > boundaries.valid_until
        return in_valid.astype(np.int8) + in_test.astype(np.int8)
    if config.split == "leave_last":
        first_valid, first_test = counts - 2 * config.leave_last, counts - config.leave_last
    else:
        first_valid = np.floor(config.train_fraction * counts + ROUNDING)
        first_test = np.floor((config.train_fraction + config.valid_fraction) * counts + ROUNDING)
    rank = np.arange(len(times)) - np.repeat(np.cumsum(counts) - counts, counts)
    in_valid, in_test = rank >= np.repeat(first_valid, counts), rank >= np.repeat(first_test, counts)
    return in_valid.astype(np.int8) + in_test.astype(np.int8)
