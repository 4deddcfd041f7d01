"""What a prepared log looks like: who is in it, how its clicks lie in time, what of it is new to a model, what leaks.

Stage: after prepare, before training. In: a `Dataset`, read in blocks of whole users. Out: `Stats`.
Invariant: `merge` adds counts, so the result is the same for every way of cutting the users into blocks; memory
grows with the catalogue, the longest user and one block, never with the log.

    user u: items c a b a    splits train train valid test    lengths of 4: 1 user    items seen in training: a c
    user v: items b          splits test                      cold in test: 1 user of 2, 1 target of 2
                                                              cold items in valid: b; in test: b, 1 target of 2
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from itertools import groupby
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dti_ray.data.interactions import SPLITS, TRAIN, Dataset, UserSequences, read_segments, split_by_weight
from dti_ray.data.leaks import CHECKS, Extent, count_leaks, extent_of

if TYPE_CHECKING:
    from dti_ray.data.prompts import TokenTable

TIME_BINS = 20
BLOCK_INTERACTIONS = 1 << 18  # read at once: some tens of MB
TOP_SHARE = 0.01  # of the catalogue: the items of which the concentration is told

Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Lengths:
    """Interactions per user; at least 90 % of the users have `p90` or fewer.

    Attributes:
        histogram: entry i counts users of 2^i to 2^(i + 1) - 1 interactions.
    """

    shortest: int
    median: int
    mean: float
    p90: int
    p99: int
    longest: int
    histogram: tuple[int, ...]


@dataclass(frozen=True)
class TimeBin:
    """One of `TIME_BINS` equal parts of the time between the first second and the last one.

    Attributes:
        start_s: its first second.
        interactions: of each of `SPLITS`; `clicks` likewise.
    """

    start_s: int
    interactions: tuple[int, ...]
    clicks: tuple[int, ...]


@dataclass(frozen=True)
class SplitStats:
    """One split, and what in it training has never seen.

    Attributes:
        first_s: first second, None where the split is empty; `last_s` likewise.
        users: with an interaction of this split; `cold_users` of them have none of training.
        cold_user_targets: interactions of these cold users.
        items: with an interaction of this split; `cold_items` of them have none of training.
        cold_item_targets: interactions of these cold items.
    """

    split: str
    interactions: int
    clicks: int
    first_s: int | None
    last_s: int | None
    users: int
    cold_users: int
    cold_user_targets: int
    items: int
    cold_items: int
    cold_item_targets: int


@dataclass(frozen=True)
class TextStats:
    """Tokens of item texts, as a run's tokenizer makes them.

    Attributes:
        mean: per item of the catalogue; `mean_shown` per interaction.
        cut_items: items cut at `prompt.max_item_tokens`.
        histogram: entry i counts items of 2^i to 2^(i + 1) - 1 tokens; `histogram_shown` counts interactions.
    """

    mean: float
    mean_shown: float
    longest: int
    cut_items: int
    histogram: tuple[int, ...]
    histogram_shown: tuple[int, ...]


@dataclass(frozen=True)
class Check:
    """What must not be there, and how often it was found."""

    name: str
    violations: int
    passed: bool


@dataclass(frozen=True)
class Stats:
    """All that `data stats` tells.

    Attributes:
        items: of the catalogue; `seen_items` of them have an interaction.
        top_items: 1 % of the catalogue, at least one; `top_share` of the interactions are with them.
        tied_share: share of interactions in the second of the one before, of the same user.
        text: None where no tokenizer was at hand.
    """

    name: str
    split_rule: str
    interactions: int
    users: int
    items: int
    seen_items: int
    label_rate: float
    lengths: Lengths
    timeline: tuple[TimeBin, ...]
    splits: tuple[SplitStats, ...]
    top_items: int
    top_share: float
    tied_share: float
    text: TextStats | None
    quarantined: dict[str, int]
    checks: tuple[Check, ...]

    def to_tree(self) -> dict[str, Any]:
        """Return what JSON can hold."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class Partial:
    """Counts over some users; those of all users are the sum.

    Attributes:
        lengths: users by number of interactions.
        shown: interactions of each split in each time bin; `clicks` those with label 1.
        items: interactions of each split with each item.
        users: with an interaction of each split.
        cold_users: those without one of training; `cold_targets` their interactions.
        tied: interactions in the second of their predecessor.
        leaks: by `CHECKS`.
    """

    lengths: Counts
    shown: Counts
    clicks: Counts
    items: Counts
    users: Counts
    cold_users: Counts
    cold_targets: Counts
    tied: Counts
    leaks: Counts


def dataset_stats(dataset: Dataset, table: TokenTable | None = None) -> Stats:
    """Read a data set twice, block by block: for the ends of its splits, then for everything.

    Args:
        dataset: a complete one.
        table: its item texts as tokens, if they shall be told of.

    Raises:
        StorageError: a shard is missing or damaged.
    """
    extent = extent_of(read_blocks(dataset))
    rule = str(dataset.data_config["split"])
    partial = summed(summarise(users, extent, rule, dataset.items) for users in read_blocks(dataset))
    return finish(partial, extent, dataset, table)


def read_blocks(dataset: Dataset) -> Iterator[UserSequences]:
    """Yield all users, some segments of one shard at a time."""
    for _, segments in groupby(dataset.segments, attrgetter("shard")):
        for block in split_by_weight(segments, attrgetter("interactions"), BLOCK_INTERACTIONS):
            yield read_segments(dataset, block)


def summarise(users: UserSequences, extent: Extent, rule: str, items: int) -> Partial:
    """Count what is in some users.

    Args:
        users: whole ones.
        extent: of the whole data set.
        rule: the data set's `data.split`.
        items: of the catalogue.
    """
    lengths, splits = np.diff(users.offsets), users.splits.astype(np.int64)
    user = np.repeat(np.arange(len(lengths)), lengths)
    place = splits * TIME_BINS + extent.bin(users.times, TIME_BINS)
    shape = (len(SPLITS), TIME_BINS)
    per_user = np.bincount(user * len(SPLITS) + splits, minlength=len(lengths) * len(SPLITS)).reshape(-1, len(SPLITS))
    is_cold = (per_user > 0) & (per_user[:, [TRAIN]] == 0)
    return Partial(
        lengths=np.bincount(lengths),
        shown=np.bincount(place, minlength=shape[0] * shape[1]).reshape(shape),
        clicks=np.bincount(place[users.labels == 1], minlength=shape[0] * shape[1]).reshape(shape),
        items=np.bincount(splits * items + users.items, minlength=len(SPLITS) * items).reshape(-1, items),
        users=(per_user > 0).sum(axis=0),
        cold_users=is_cold.sum(axis=0),
        cold_targets=(per_user * is_cold).sum(axis=0),
        tied=np.array([np.count_nonzero((np.diff(users.times) == 0) & (np.diff(user) == 0))]),
        leaks=count_leaks(users, user, extent, rule),
    )


def merge(one: Partial, other: Partial) -> Partial:
    """Add the counts of different users."""
    return Partial(**{field.name: _sum(getattr(one, field.name), getattr(other, field.name)) for field in fields(one)})


def summed(partials: Iterable[Partial]) -> Partial:
    """Merge one or more."""
    iterator = iter(partials)
    total = next(iterator)
    for partial in iterator:
        total = merge(total, partial)
    return total


def finish(partial: Partial, extent: Extent, dataset: Dataset, table: TokenTable | None = None) -> Stats:
    """Turn the counts of all users into what is told of them."""
    per_item = partial.items.sum(axis=0)
    interactions = int(per_item.sum())
    top_items = max(1, int(TOP_SHARE * dataset.items))
    top = np.partition(per_item, -top_items)[-top_items:]
    starts = extent.bin_starts(TIME_BINS)
    return Stats(
        name=dataset.name,
        split_rule=str(dataset.data_config["split"]),
        interactions=interactions,
        users=int(partial.lengths.sum()),
        items=dataset.items,
        seen_items=int(np.count_nonzero(per_item)),
        label_rate=int(partial.clicks.sum()) / interactions,
        lengths=_lengths(partial.lengths),
        timeline=tuple(map(TimeBin, starts, _rows(partial.shown.T), _rows(partial.clicks.T))),
        splits=tuple(_split(partial, extent, split) for split in range(len(SPLITS))),
        top_items=top_items,
        top_share=int(top.sum()) / interactions,
        tied_share=int(partial.tied[0]) / interactions,
        text=None if table is None else _text(table, per_item),
        quarantined=dict(dataset.quarantined),
        checks=tuple(
            Check(name, count, count == 0) for name, count in zip(CHECKS, partial.leaks.tolist(), strict=True)
        ),
    )


def _sum(one: Counts, other: Counts) -> Counts:
    """Add two arrays; those of lengths may end at different lengths."""
    if one.ndim > 1 or len(one) == len(other):
        return one + other
    short, long = sorted((one, other), key=len)
    total = long.copy()
    total[: len(short)] += short
    return total


def _rows(counts: Counts) -> list[tuple[int, ...]]:
    return [tuple(row) for row in counts.tolist()]


def _lengths(users: Counts) -> Lengths:
    """Read quantiles off the number of users of each length: the shortest length that reaches the share."""
    total, values = int(users.sum()), np.flatnonzero(users)
    reached = np.cumsum(users)
    median, p90, p99 = np.searchsorted(100 * reached, np.array([50, 90, 99]) * total).tolist()
    mean = float(np.arange(len(users)) @ users) / total
    shortest, longest = int(values[0]), int(values[-1])
    return Lengths(shortest, median, mean, p90, p99, longest, _by_power(np.arange(len(users)), users))


def _split(partial: Partial, extent: Extent, split: int) -> SplitStats:
    items = partial.items[split]
    is_cold = (items > 0) & (partial.items[TRAIN] == 0)
    return SplitStats(
        split=SPLITS[split],
        interactions=int(items.sum()),
        clicks=int(partial.clicks[split].sum()),
        first_s=extent.first(split),
        last_s=extent.last(split),
        users=int(partial.users[split]),
        cold_users=int(partial.cold_users[split]),
        cold_user_targets=int(partial.cold_targets[split]),
        items=int(np.count_nonzero(items)),
        cold_items=int(np.count_nonzero(is_cold)),
        cold_item_targets=int(items[is_cold].sum()),
    )


def _text(table: TokenTable, per_item: Counts) -> TextStats:
    lengths = table.lengths
    return TextStats(
        mean=float(lengths.mean()),
        mean_shown=float(np.average(lengths, weights=per_item)),
        longest=int(lengths.max()),
        cut_items=table.cut_items,
        histogram=_by_power(lengths, np.ones_like(lengths)),
        histogram_shown=_by_power(lengths, per_item),
    )


def _by_power(values: Counts, counts: Counts) -> tuple[int, ...]:
    """Add up counts by the power of two that their value reaches: entry i is for 2^i to 2^(i + 1) - 1."""
    powers = np.floor(np.log2(np.maximum(values, 1))).astype(np.int64)
    return tuple(np.bincount(powers, counts).astype(np.int64).tolist())
