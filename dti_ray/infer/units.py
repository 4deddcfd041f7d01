"""The targets of a split, dealt to whoever scores them, and counted when they come back.

Stage: evaluate, around the model. In: the segments of a data set; scores, unit by unit. Out: `Unit`s; `TargetScores`
of the whole split.
Invariant: units depend on the data set and the split alone, never on who scores them, so every pass holds the same rows
for any number of workers; each segment with a target is in one unit, and each target comes back once, or an
`IncompleteError` says which did not.

    segments of 30, 0, 10, 20 and 5 targets, 25 targets a unit    units [30], [10, 20], [5]
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby

import numpy as np
import pyarrow as pa

from dti_ray.data.interactions import Dataset, Segment, UserSequences, read_segments, split_by_weight
from dti_ray.errors import Fault, IncompleteError

UNIT_TOKENS = 1 << 17  # a unit has at least so many, but for the last one of a shard: a few passes
UNITS = 1000  # of a split at most, about: Ray Data keeps a block for each

UNIT_SCORES = pa.schema(
    [
        ("unit", pa.int32()),
        ("user", pa.list_(pa.int64())),
        ("user_id", pa.list_(pa.string())),
        ("position", pa.list_(pa.int32())),
        ("label", pa.list_(pa.int8())),
        ("log_odds", pa.list_(pa.float64())),
        ("tokens", pa.list_(pa.int64())),
        ("seconds", pa.list_(pa.float64())),
    ]
)


@dataclass(frozen=True)
class Unit:
    """Some segments of one shard that are read and scored together.

    Attributes:
        number: of the unit, from 0.
        segments: those with targets, in the order of the shard.
        first_users: for each of them the number in the data set of its first user.
        targets: of the split in them.
    """

    number: int
    segments: tuple[Segment, ...]
    first_users: tuple[int, ...]
    targets: int

    @property
    def users(self) -> np.ndarray:
        """Return the number in the data set of each user, in the order in which they are read."""
        pairs = zip(self.first_users, self.segments, strict=True)
        return np.concatenate([first + np.arange(segment.users) for first, segment in pairs])


@dataclass(frozen=True, eq=False)
class TargetScores:
    """Targets scored under P protocols, in the order of users and of their interactions.

    Attributes:
        user: int64 [T], number of the user in the data set.
        user_id: strings [T].
        position: int32 [T], number of the interaction in the user's history.
        label: int8 [T].
        log_odds: float64 [P, T].
        tokens: int64 [P], tokens that the model read.
        seconds: float64 [P], summed over all who scored.
    """

    user: np.ndarray
    user_id: pa.ChunkedArray
    position: np.ndarray
    label: np.ndarray
    log_odds: np.ndarray
    tokens: np.ndarray
    seconds: np.ndarray

    def __len__(self) -> int:
        return len(self.label)


def plan_units(segments: Sequence[Segment], split: int, tokens_per_target: float) -> list[Unit]:
    """Cut the segments that have targets of a split into units of about equal cost.

    Args:
        segments: of the data set, in the manifest's order.
        split: 0 train, 1 valid, 2 test.
        tokens_per_target: what a target costs under all protocols together.
    """
    total = sum(segment.targets[split] for segment in segments)
    least = max(UNIT_TOKENS / tokens_per_target, total / UNITS)
    units: list[Unit] = []
    for run in _runs(segments, split, least):
        chosen, first_users = zip(*run, strict=True)
        units.append(Unit(len(units), chosen, first_users, sum(segment.targets[split] for segment in chosen)))
    return units


def read_unit(dataset: Dataset, unit: Unit) -> UserSequences:
    """Return the users of a unit.

    Raises:
        StorageError: the shard is missing or damaged.
    """
    return read_segments(dataset, unit.segments)


def targets_of(users: UserSequences, split: int, min_context: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (user, position) of each target, as whoever packs them must find them.

    Args:
        users: whole ones.
        split: whose interactions are targets.
        min_context: those with fewer interactions before them are none.
    """
    user = np.repeat(np.arange(len(users.user_ids)), np.diff(users.offsets))
    position = np.arange(len(user)) - users.offsets[user]
    is_target = (users.splits == split) & (position >= min_context)
    return user[is_target], position[is_target]


def collect(
    units: Sequence[Unit],
    found: Iterable[tuple[int, TargetScores]],
    min_context: int,
    on_progress: Callable[[int, int], None],
) -> TargetScores:
    """Take the scores of all units, in any order, and lay them in order.

    Args:
        units: all that were asked for.
        found: (number of the unit, its scores).
        min_context: where it is 0, a unit must bring as many targets as the manifest counts.
        on_progress: called with (targets scored, targets in all).

    Raises:
        IncompleteError: a unit or target is missing, or came back twice.
    """
    by_unit: dict[int, TargetScores] = {}
    done, total = 0, sum(unit.targets for unit in units)
    for number, scores in found:
        if number in by_unit:
            raise IncompleteError(Fault(f"unit {number}", "was scored twice", "once"))
        by_unit[number] = scores
        done += len(scores)
        on_progress(done, total)
    faults = [fault for unit in units if (fault := _fault(unit, by_unit.get(unit.number), min_context)) is not None]
    if faults:
        raise IncompleteError(*faults)
    joined = _join([by_unit[unit.number] for unit in units])
    _check_distinct(joined)
    return joined


def to_table(number: int, scores: TargetScores) -> pa.Table:
    """Return a unit's scores as one row of `UNIT_SCORES`; the inverse of `from_table`."""
    columns = {name: [getattr(scores, name)] for name in ("user", "position", "label", "tokens", "seconds")}
    columns["log_odds"] = [scores.log_odds.ravel()]
    columns["user_id"] = [scores.user_id.combine_chunks()]
    columns["unit"] = [number]
    return pa.table([pa.array(columns[field.name], field.type) for field in UNIT_SCORES], schema=UNIT_SCORES)


def from_table(table: pa.Table) -> Iterator[tuple[int, TargetScores]]:
    """Yield (number of the unit, its scores) of each row of a table of `UNIT_SCORES`."""
    for row in range(table.num_rows):
        lists = {field.name: table[field.name][row].values for field in UNIT_SCORES if field.name != "unit"}
        user_id = pa.chunked_array([lists.pop("user_id")])
        arrays = {name: values.to_numpy(zero_copy_only=False) for name, values in lists.items()}
        arrays["log_odds"] = arrays["log_odds"].reshape(len(arrays["tokens"]), -1)
        yield table["unit"][row].as_py(), TargetScores(user_id=user_id, **arrays)


def _runs(segments: Sequence[Segment], split: int, least: float) -> Iterator[list[tuple[Segment, int]]]:
    """Yield (segment, number of its first user) of some segments of one shard that have `least` targets together."""
    first_users = accumulate((segment.users for segment in segments), initial=0)
    asked = [(segment, first) for segment, first in zip(segments, first_users, strict=False) if segment.targets[split]]
    for _, of_shard in groupby(asked, lambda one: one[0].shard):
        yield from split_by_weight(of_shard, lambda one: one[0].targets[split], least)


def _fault(unit: Unit, scores: TargetScores | None, min_context: int) -> Fault | None:
    """Say what is wrong with a unit's scores; a worker has held them against the users that it read."""
    where = f"unit {unit.number} ({unit.segments[0].shard}, from row group {unit.segments[0].row_group})"
    if scores is None:
        return Fault(where, "was not scored", f"{unit.targets} targets")
    if min_context == 0 and len(scores) != unit.targets:
        return Fault(where, f"{len(scores)} targets were scored", f"{unit.targets} as in the manifest")
    return None


def _join(parts: Sequence[TargetScores]) -> TargetScores:
    flat = {name: np.concatenate([getattr(part, name) for part in parts]) for name in ("user", "position", "label")}
    return TargetScores(
        user_id=pa.chunked_array([chunk for part in parts for chunk in part.user_id.chunks], pa.string()),
        log_odds=np.concatenate([part.log_odds for part in parts], axis=1),
        tokens=np.sum([part.tokens for part in parts], axis=0),
        seconds=np.sum([part.seconds for part in parts], axis=0),
        **flat,
    )


def _check_distinct(scores: TargetScores) -> None:
    key = scores.user * (int(scores.position.max(initial=0)) + 1) + scores.position
    distinct = len(np.unique(key))
    if distinct != len(scores):
        raise IncompleteError(
            Fault("evaluation", f"{len(scores)} targets scored, {distinct} distinct", "each one once")
        )
