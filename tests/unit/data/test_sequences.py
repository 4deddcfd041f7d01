"""Users put into time order and split, held against loops over lists."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dti_ray.config.data import DataConfig
from dti_ray.data.checks import INTERACTIONS, REFUSED
from dti_ray.data.interactions import SEQUENCES, UserSequences
from dti_ray.data.sequences import Boundaries, boundary_ranks, sequences

ITEM_IDS = pa.array(["a", "b", "c"])
ANY_LENGTH = DataConfig(min_interactions=1)
HALF = DataConfig(min_interactions=1, train_fraction=0.5, valid_fraction=0.25)
MILLIS = 1000

Row = tuple[str, int, int, int]  # user, item, label, time
Sequences = dict[str, list[tuple[int, int, int, int]]]  # user → item, label, second, split
Lost = list[tuple[str, str, int, int, str, int]]  # user, item, label, second, reason, row

seconds = st.lists(
    st.tuples(st.sampled_from(["u", "v", "ü"]), st.integers(0, 2), st.integers(0, 1), st.integers(-1, 3)), max_size=30
)
millis = st.lists(
    st.tuples(
        st.sampled_from(["u", "v"]), st.integers(0, 2), st.integers(0, 1), st.integers(-2, 7).map(lambda t: 400 * t)
    ),
    max_size=30,
)


def good(rows: list[Row]) -> pa.Table:
    tree = [dict(zip(INTERACTIONS.names, (*row, at % 2, at + 1), strict=True)) for at, row in enumerate(rows)]
    return pa.Table.from_pylist(tree, INTERACTIONS)


def reference(rows: list[Row], config: DataConfig, per_second: int = 1) -> tuple[Sequences, Lost]:
    """Do with loops what `sequences` does with sorts; splits are by each user's own time."""
    users: Sequences = {}
    lost: Lost = []
    for user in sorted({row[0] for row in rows}, key=str.encode):
        events = defaultdict(list)
        for at, (owner, item, label, time) in enumerate(rows):
            if owner == user:
                events[item, time // per_second].append((label, time, at))
        kept = []
        for (item, second), same in events.items():
            (label, time, at), *others = sorted(same)
            kept.append((time, item, label, at))
            lost += [(user, "abc"[item], label, second, "duplicate_event", at + 1) for label, _, at in others]
        kept.sort()
        if len(kept) < config.min_interactions:
            reason = "user_with_too_few_interactions"
            lost += [(user, "abc"[item], label, t // per_second, reason, at + 1) for t, item, label, at in kept]
            continue
        first, second = first_of_splits(len(kept), config)
        users[user] = [
            (item, label, time // per_second, int(at >= first) + int(at >= second))
            for at, (time, item, label, _) in enumerate(kept)
        ]
    return users, lost


def first_of_splits(length: int, config: DataConfig) -> tuple[int, int]:
    """Return the index of the first interaction of validation and of test."""
    if config.split == "leave_last":
        return length - 2 * config.leave_last, length - config.leave_last
    shares = (config.train_fraction, config.train_fraction + config.valid_fraction)
    return int(shares[0] * length + 1e-9), int(shares[1] * length + 1e-9)


def as_lists(table: pa.Table) -> Sequences:
    return {
        row["user_id"]: list(zip(row["items"], row["labels"], row["times"], row["splits"], strict=True))
        for row in table.to_pylist()
    }


def as_lost(refused: pa.Table) -> Lost:
    assert all(row["file"] == (row["row"] - 1) % 2 for row in refused.to_pylist())
    return [
        (row["user_id"], row["item_id"], int(row["label"]), int(row["time"]), row["reason"], row["row"])
        for row in refused.to_pylist()
    ]


def test_worked_example() -> None:
    table, refused = sequences(good([("u", 1, 1, 7), ("u", 0, 0, 7), ("u", 2, 1, 3), ("u", 0, 1, 9)]), ITEM_IDS, HALF)
    assert table.schema.equals(SEQUENCES)
    assert as_lists(table) == {"u": [(2, 1, 3, 0), (0, 0, 7, 0), (1, 1, 7, 1), (0, 1, 9, 2)]}
    assert refused.schema.equals(REFUSED)
    assert len(refused) == 0


@given(rows=seconds, fewest=st.integers(1, 5))
def test_sequences_equal_the_slow_reference(rows: list[Row], fewest: int) -> None:
    config = HALF.model_copy(update={"min_interactions": fewest})
    table, refused = sequences(good(rows), ITEM_IDS, config)
    users, lost = reference(rows, config)
    assert as_lists(table) == users
    assert list(as_lists(table)) == list(users)
    assert sorted(as_lost(refused)) == sorted(lost)
    assert sum(map(len, users.values())) + len(refused) == len(rows)


@given(rows=millis, fewest=st.integers(1, 4), leave=st.integers(1, 3))
def test_milliseconds_order_what_shares_a_second_and_duplicates_share_it(
    rows: list[Row], fewest: int, leave: int
) -> None:
    config = DataConfig(split="leave_last", leave_last=leave, min_interactions=fewest)
    table, refused = sequences(good(rows), ITEM_IDS, config, MILLIS)
    users, lost = reference(rows, config, MILLIS)
    assert as_lists(table) == users
    assert sorted(as_lost(refused)) == sorted(lost)


@given(rows=millis, data=st.data())
def test_order_of_the_input_changes_nothing_but_which_row_is_quoted(rows: list[Row], data: st.DataObject) -> None:
    shuffled = data.draw(st.permutations(rows))
    table, refused = sequences(good(rows), ITEM_IDS, HALF, MILLIS)
    other_table, other_refused = sequences(good(shuffled), ITEM_IDS, HALF, MILLIS)
    assert table.equals(other_table)
    assert sorted(row[:-1] for row in as_lost(refused)) == sorted(row[:-1] for row in as_lost(other_refused))


@given(rows=seconds, data=st.data())
def test_users_are_independent_of_each_other(rows: list[Row], data: st.DataObject) -> None:
    user = data.draw(st.sampled_from(["u", "v"]))
    whole, _ = sequences(good(rows), ITEM_IDS, HALF)
    alone, _ = sequences(good([row for row in rows if row[0] == user]), ITEM_IDS, HALF)
    assert as_lists(alone) == {name: events for name, events in as_lists(whole).items() if name == user}


@given(rows=millis, until=st.tuples(st.integers(-1, 3), st.integers(-1, 3)).map(sorted))
def test_global_time_splits_at_the_boundary_seconds(rows: list[Row], until: list[int]) -> None:
    config = ANY_LENGTH.model_copy(update={"split": "global_time"})
    table, _ = sequences(good(rows), ITEM_IDS, config, MILLIS, Boundaries(*until))
    for user in as_lists(table).values():
        assert [split for *_, split in user] == [int(t > until[0]) + int(t > until[1]) for _, _, t, _ in user]


@pytest.mark.parametrize(("length", "expected"), [(1, (0, 0, 1)), (5, (4, 0, 1)), (10, (7, 1, 2)), (19, (13, 2, 4))])
def test_user_time_splits_floor_the_shares(length: int, expected: tuple[int, int, int]) -> None:
    config = DataConfig(min_interactions=1, train_fraction=0.7, valid_fraction=0.1)  # 0.7 + 0.1 < 0.8 in floats
    if length == 5:
        config = ANY_LENGTH
    assert split_sizes(length, config) == expected


@pytest.mark.parametrize(
    ("length", "leave", "expected"),
    [(5, 1, (3, 1, 1)), (5, 2, (1, 2, 2)), (4, 2, (0, 2, 2)), (3, 2, (0, 1, 2)), (2, 3, (0, 0, 2)), (1, 1, (0, 0, 1))],
)
def test_leave_last_takes_the_last_ones_for_test_and_as_many_before_for_validation(
    length: int, leave: int, expected: tuple[int, int, int]
) -> None:
    assert split_sizes(length, DataConfig(min_interactions=1, split="leave_last", leave_last=leave)) == expected


def split_sizes(length: int, config: DataConfig) -> tuple[int, ...]:
    table, _ = sequences(good([("u", 0, 0, time) for time in range(length)]), ITEM_IDS, config)
    splits = UserSequences.from_table(table).splits
    assert (np.diff(splits) >= 0).all(), "in the order of time"
    return tuple(np.bincount(splits, minlength=3).tolist())


def test_duplicates_keep_the_lowest_label_and_quarantine_the_rest_as_understood() -> None:
    rows = [("u", 1, 1, 7), ("u", 1, 0, 7), ("u", 1, 1, 8)]
    table, refused = sequences(good(rows), ITEM_IDS, ANY_LENGTH)
    assert [row[:3] for row in as_lists(table)["u"]] == [(1, 0, 7), (1, 1, 8)]
    assert [tuple(row.values()) for row in refused.to_pylist()] == [("u", "b", "1", "7", "duplicate_event", 0, 1)]


def test_of_equal_rows_the_first_is_kept() -> None:
    _, refused = sequences(good([("u", 1, 1, 7)] * 3), ITEM_IDS, ANY_LENGTH)
    assert refused["row"].to_pylist() == [2, 3]


def test_duplicates_within_a_second_are_found_across_other_items() -> None:
    rows = [("u", 1, 1, 7100), ("u", 2, 1, 7200), ("u", 1, 1, 7300), ("u", 1, 1, 8000)]
    table, refused = sequences(good(rows), ITEM_IDS, ANY_LENGTH, MILLIS)
    assert [row[:3] for row in as_lists(table)["u"]] == [(1, 1, 7), (2, 1, 7), (1, 1, 8)]
    assert as_lost(refused) == [("u", "b", 1, 7, "duplicate_event", 3)]


def test_user_with_too_few_interactions_is_refused_after_duplicates_are_gone() -> None:
    config = DataConfig(min_interactions=2)
    rows = [("u", 1, 1, 7), ("u", 1, 1, 7), ("v", 0, 1, 1), ("v", 0, 1, 2)]
    table, refused = sequences(good(rows), ITEM_IDS, config)
    assert table["user_id"].to_pylist() == ["v"]
    assert refused["reason"].to_pylist() == ["user_with_too_few_interactions", "duplicate_event"]


def test_times_before_1970_are_floored_to_their_second() -> None:
    table, _ = sequences(good([("u", 0, 1, -1), ("u", 1, 1, -1000), ("u", 2, 1, -1001)]), ITEM_IDS, ANY_LENGTH, MILLIS)
    assert [row[:3] for row in as_lists(table)["u"]] == [(2, 1, -2), (1, 1, -1), (0, 1, -1)]


def test_no_rows_are_no_fault() -> None:
    for split in ("user_time", "leave_last", "global_time"):
        config = DataConfig.model_validate({"split": split})
        table, refused = sequences(good([]), ITEM_IDS, config, 1, Boundaries(0, 0))
        assert (len(table), len(refused)) == (0, 0)
        assert table.schema.equals(SEQUENCES)


@given(interactions=st.integers(1, 10_000), train=st.integers(1, 98), valid=st.integers(1, 98))
def test_boundary_ranks_are_the_first_that_hold_the_shares(interactions: int, train: int, valid: int) -> None:
    if train + valid >= 100:
        return
    config = DataConfig(train_fraction=train / 100, valid_fraction=valid / 100)
    first, second = boundary_ranks(interactions, config)
    # in whole numbers: rank + 1 interactions are at least the share, and rank are not
    for rank, share in ((first, train), (second, train + valid)):
        assert (rank + 1) * 100 >= share * interactions
        assert rank * 100 < share * interactions
