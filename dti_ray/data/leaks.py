"""Whether a split leaks: could a model have trained on what it is asked about, or on what came later?

Stage: before stats. In: `UserSequences` of whole users. Out: an `Extent` of all; the number of violations of each of
`CHECKS`.
Invariant: a number is a sum over users, so that blocks of users can be counted one by one; prepare writes none.

    user_time    times 3 7 7 9    splits train valid train test    1: a training interaction after one of validation
    global_time  all of validation must lie after the last second of training, whoever's it is
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dti_ray.data.interactions import SPLITS, UserSequences

CHECKS = ("each user's times ascend", "splits follow each other in time", "no target is there twice")
NEVER = np.iinfo(np.int64)  # an empty split begins at the largest number and ends at the smallest


@dataclass(frozen=True, eq=False)
class Extent:
    """Earliest and latest second of each split, over all users."""

    earliest: NDArray[np.int64]
    latest: NDArray[np.int64]

    def first(self, split: int) -> int | None:
        """Return a split's first second, None where it is empty."""
        return int(self.earliest[split]) if self.earliest[split] <= self.latest[split] else None

    def last(self, split: int) -> int | None:
        """Return a split's last second, None where it is empty."""
        return int(self.latest[split]) if self.earliest[split] <= self.latest[split] else None

    def bin(self, times: NDArray[np.int64], bins: int) -> NDArray[np.int64]:
        """Return the number of each second's bin, of equal ones between the first second of all and the last."""
        return (times - self.earliest.min()) * bins // self._seconds()

    def bin_starts(self, bins: int) -> list[int]:
        """Return the first second of each bin."""
        first, seconds = int(self.earliest.min()), self._seconds()
        return [first - (-i * seconds // bins) for i in range(bins)]

    def _seconds(self) -> int:
        return int(self.latest.max() - self.earliest.min()) + 1


def extent_of(blocks: Iterable[UserSequences]) -> Extent:
    """Find the ends of each split."""
    earliest = np.full(len(SPLITS), NEVER.max)
    latest = np.full(len(SPLITS), NEVER.min)
    for users in blocks:
        np.minimum.at(earliest, users.splits, users.times)
        np.maximum.at(latest, users.splits, users.times)
    return Extent(earliest, latest)


def count_leaks(users: UserSequences, user: NDArray[np.int64], extent: Extent, rule: str) -> NDArray[np.int64]:
    """Count the violations of each of `CHECKS`.

    Args:
        users: whole ones.
        user: number of each interaction's user.
        extent: of the whole data set.
        rule: the data set's `data.split`.
    """
    late = _late_of_all(users, extent) if rule == "global_time" else _late_of_user(users, user)
    return np.array([_descents(users, user), late, _duplicates(users, user)])


def _descents(users: UserSequences, user: NDArray[np.int64]) -> int:
    """Count interactions that are earlier than the one before."""
    return int(np.count_nonzero((np.diff(users.times) < 0) & (np.diff(user) == 0)))


def _late_of_user(users: UserSequences, user: NDArray[np.int64]) -> int:
    """Count interactions that come after one of a later split of the same user; within a second, order decides."""
    order = np.lexsort((users.times, user))
    rank = user * len(SPLITS) + users.splits[order]  # a user's ranks lie above those of all users before
    return int(np.count_nonzero(rank < np.maximum.accumulate(rank)))


def _late_of_all(users: UserSequences, extent: Extent) -> int:
    """Count interactions that are not after the last second of each earlier split."""
    until = np.concatenate([[NEVER.min], np.maximum.accumulate(extent.latest)[:-1]])
    return int(np.count_nonzero(users.times <= until[users.splits]))


def _duplicates(users: UserSequences, user: NDArray[np.int64]) -> int:
    """Count interactions whose user, item and second are there already."""
    order = np.lexsort((users.items, users.times, user))
    same = [np.diff(values[order]) == 0 for values in (users.items, users.times, user)]
    return int(np.count_nonzero(np.logical_and.reduce(same)))
