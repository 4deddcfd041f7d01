"""Histories of the users that a unit of work asks for, read from the data set's own shards.

Stage: batch scoring, inside actors. In: a data set, some users, the shards that may hold them. Out: user → `Past`.
Invariant: a shard is read once a unit, some row groups at a time, and only the wanted users of it are kept.

    requests of users with crc32 mod 6 = 4, a data set of 3 partitions  →  part-00001.parquet, since 4 mod 3 = 1
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np

from dti_ray.data.interactions import Dataset, Segment, read_segments, shard_name

READ_INTERACTIONS = 1_000_000  # at once


@dataclass(frozen=True, eq=False)
class Past:
    """One user's interactions, oldest first.

    Attributes:
        items: int32 [N], index into the data set's catalogue.
        labels: int8 [N], 0 or 1.
        times: int64 [N], seconds, never falling.
    """

    items: np.ndarray
    labels: np.ndarray
    times: np.ndarray

    def before(self, time: int | None) -> Past:
        """Return the interactions that are earlier than a moment (s); None: later than all."""
        return self if time is None else self.only(slice(int(np.searchsorted(self.times, time))))

    def only(self, part: slice | np.ndarray) -> Past:
        """Return some of the interactions."""
        return Past(self.items[part], self.labels[part], self.times[part])


def partitions_of(dataset: Dataset, pairs: int, unit_pairs: int) -> int:
    """Return how many partitions requests are cut into: a multiple of the data set's, so that each reads one shard."""
    own = dataset.partitions or 1
    return own * max(1, round(pairs / (own * unit_pairs)))


def read_pasts(dataset: Dataset, users: Collection[str], partition: int) -> dict[str, Past]:
    """Return the histories of some users of one partition; those that the data set does not have are left out.

    Raises:
        StorageError: a shard is missing or damaged.
    """
    wanted = np.array(sorted(users), dtype=np.str_)
    found: dict[str, Past] = {}
    for segments in _reads(dataset, partition) if len(wanted) else ():
        read = read_segments(dataset, segments)
        for at in np.flatnonzero(np.isin(read.user_ids, wanted)).tolist():
            part = slice(*read.offsets[at : at + 2].tolist())
            # Copies: a view would keep all that was read in memory.
            past = Past(*(values[part].copy() for values in (read.items, read.labels, read.times)))
            found[str(read.user_ids[at])] = past
    return found


def _reads(dataset: Dataset, partition: int) -> Iterator[list[Segment]]:
    """Yield the segments of a partition's users, as many of a shard at a time as `READ_INTERACTIONS` allows."""
    only = None if dataset.partitions is None else shard_name(partition % dataset.partitions)
    held: list[Segment] = []
    for segment in dataset.segments:
        if only is not None and segment.shard != only:
            continue
        is_full = sum(one.interactions for one in held) + segment.interactions > READ_INTERACTIONS
        if held and (is_full or held[0].shard != segment.shard):
            yield held
            held = []
        held.append(segment)
    if held:
        yield held
