from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet as pq

from dti_ray.cli.logs import data_stats
from dti_ray.data import stats as module
from dti_ray.data.interactions import (
    ITEMS_FILE,
    SEQUENCES,
    Dataset,
    UserSequences,
    dataset_folder,
    open_dataset,
    read_all,
    write_shard,
)
from dti_ray.data.leaks import CHECKS, count_leaks, extent_of
from dti_ray.data.prompts import TokenTable
from dti_ray.data.stats import Stats, dataset_stats, finish, merge, summarise, summed
from dti_ray.errors import InputError, RunError
from dti_ray.storage import Storage
from tests.builders import write_dataset

ITEMS = 200
Row = tuple[int, int, int, int]  # item, label, time, split
ROWS = st.tuples(st.integers(0, 5), st.integers(0, 1), st.integers(0, 9), st.integers(0, 2))

# Two users of the module's docstring, and one who was there in training only. Times 0 to 39: bins of two seconds.
LOG: list[list[Row]] = [
    [(0, 1, 0, 0), (2, 0, 3, 0), (0, 1, 3, 1), (1, 0, 20, 2)],
    [(1, 1, 39, 2)],
    [(0, 0, 1, 0), (3, 1, 4, 0), (0, 1, 9, 0)],
]


def users_of(log: Sequence[Sequence[Row]]) -> UserSequences:
    items, labels, times, splits = np.array([row for user in log for row in user]).T
    return UserSequences(
        user_ids=np.array([f"user {i}" for i in range(len(log))]),
        offsets=np.cumsum([0, *map(len, log)]),
        items=items.astype(np.int32),
        labels=labels.astype(np.int8),
        times=times,
        splits=splits.astype(np.int8),
    )


def lay_down(root: Path, log: Sequence[Sequence[Row]], rule: str, segment_interactions: int = 3) -> Dataset:
    """Write a prepared data set of exactly these interactions."""
    storage, folder, users = Storage(str(root)), dataset_folder("tiny"), users_of(log)
    offsets = pa.array(users.offsets, pa.int32())
    flat = (users.items, users.labels, users.times, users.splits)
    lists = [pa.ListArray.from_arrays(offsets, pa.array(values)) for values in flat]
    table = pa.table([pa.array(users.user_ids.tolist()), *lists], schema=SEQUENCES)
    entry, segments = write_shard(storage, folder, "interactions/part-00000.parquet", table, segment_interactions)
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"item_id": [f"{i:03d}" for i in range(ITEMS)], "title": ["film"] * ITEMS}), sink)
    catalogue = storage.write(f"{folder}/{ITEMS_FILE}", sink.getvalue().to_pybytes())
    train, valid, test = np.bincount(users.splits, minlength=3).tolist()
    dataset = Dataset(
        storage, "tiny", len(log), len(users.items), ITEMS, float(users.labels.mean()), (train, valid, test),
        {"duplicate_event": 4}, tuple(segments), {"split": rule},
    )  # fmt: skip
    storage.write_manifest(folder, [entry, replace(catalogue, path=ITEMS_FILE)], dataset.manifest())
    return open_dataset(storage, "tiny")


def text_of(lengths: Sequence[int]) -> TokenTable:
    offsets = np.cumsum([0, *lengths])
    return TokenTable(np.zeros(offsets[-1], np.int32), offsets, np.zeros(0, np.int32), 5, (None, 1, 2), cut_items=1)


def violations(log: Sequence[Sequence[Row]], tmp_path: Path, rule: str) -> dict[str, int]:
    checks = dataset_stats(lay_down(tmp_path, log, rule)).checks
    assert all(check.passed == (check.violations == 0) for check in checks)
    return {check.name: check.violations for check in checks}


@pytest.fixture
def told(tmp_path: Path) -> Stats:
    return dataset_stats(lay_down(tmp_path, LOG, "user_time"), text_of([1, 3, 4, *[2] * (ITEMS - 3)]))


def test_numbers_are_those_counted_by_hand(told: Stats) -> None:
    assert (told.interactions, told.users, told.items, told.seen_items) == (8, 3, ITEMS, 4)
    assert told.label_rate == 5 / 8
    assert told.tied_share == 1 / 8, "user 0's third interaction"
    assert (told.top_items, told.top_share) == (2, 6 / 8), "1 % of 200 items: 0, four times, and 1, twice"
    assert told.quarantined == {"duplicate_event": 4}
    assert told.split_rule == "user_time"


def test_lengths_are_those_counted_by_hand(told: Stats) -> None:
    lengths = told.lengths
    assert (lengths.shortest, lengths.median, lengths.p90, lengths.p99, lengths.longest) == (1, 3, 4, 4, 4)
    assert lengths.mean == pytest.approx(8 / 3)
    assert lengths.histogram == (1, 1, 1), "lengths 1; 2 and 3; 4 to 7"


def test_a_quantile_is_the_shortest_length_that_enough_users_do_not_pass(tmp_path: Path) -> None:
    log = [[(0, 1, time, 0) for time in range(length)] for length in range(1, 101)]
    lengths = dataset_stats(lay_down(tmp_path, log, "user_time")).lengths
    assert (lengths.median, lengths.p90, lengths.p99) == (50, 90, 99)


def test_what_training_never_saw_is_cold(told: Stats) -> None:
    train, valid, test = told.splits
    assert (train.interactions, train.clicks, train.users, train.items) == (5, 3, 2, 3)
    assert (train.cold_users, train.cold_items, train.cold_user_targets, train.cold_item_targets) == (0, 0, 0, 0)
    assert (valid.users, valid.cold_users, valid.items, valid.cold_items) == (1, 0, 1, 0)
    assert (test.users, test.cold_users, test.cold_user_targets) == (2, 1, 1)
    assert (test.items, test.cold_items, test.cold_item_targets) == (1, 1, 2)
    assert (train.first_s, train.last_s, test.first_s, test.last_s) == (0, 9, 20, 39)


def test_time_line_has_twenty_equal_parts(told: Stats) -> None:
    assert [part.start_s for part in told.timeline] == list(range(0, 40, 2))
    shown = {part.start_s: (part.interactions, part.clicks) for part in told.timeline if any(part.interactions)}
    assert shown == {
        0: ((2, 0, 0), (1, 0, 0)),
        2: ((1, 1, 0), (0, 1, 0)),
        4: ((1, 0, 0), (1, 0, 0)),
        8: ((1, 0, 0), (1, 0, 0)),
        20: ((0, 0, 1), (0, 0, 0)),
        38: ((0, 0, 1), (0, 0, 1)),
    }


@given(first=st.integers(-(2**40), 2**40), seconds=st.integers(0, 2**40))
def test_bins_begin_where_they_say(first: int, seconds: int) -> None:
    extent = extent_of([users_of([[(0, 0, first, 0), (0, 0, first + seconds, 1)]])])
    starts = np.array(extent.bin_starts(module.TIME_BINS))
    assert extent.bin(np.array([first, first + seconds]), module.TIME_BINS)[1] < module.TIME_BINS
    held = starts <= first + seconds  # a log of few seconds has bins that hold none
    widths = np.diff(np.append(starts, first + seconds + 1))
    filled = held & (widths > 0)
    assert extent.bin(starts[filled], module.TIME_BINS).tolist() == np.flatnonzero(filled).tolist()


def test_texts_are_counted_per_item_and_per_interaction(told: Stats) -> None:
    text = told.text
    assert text is not None
    assert (text.longest, text.cut_items) == (4, 1)
    assert text.mean == pytest.approx((1 + 3 + 4 + 2 * 197) / 200)
    assert text.mean_shown == pytest.approx((4 * 1 + 2 * 3 + 1 * 4 + 1 * 2) / 8)
    assert text.histogram == (1, 198, 1)
    assert text.histogram_shown == (4, 3, 1)


def test_empty_split_has_no_time(tmp_path: Path) -> None:
    told = dataset_stats(lay_down(tmp_path, [[(0, 1, 5, 0), (1, 0, 6, 0)]], "user_time"))
    assert (told.splits[1].first_s, told.splits[1].last_s, told.splits[1].users) == (None, None, 0)


def test_json_can_hold_it(told: Stats) -> None:
    tree = json.loads(json.dumps(told.to_tree(), allow_nan=False))
    assert tree["lengths"]["histogram"] == [1, 1, 1]
    assert tree["checks"] == [{"name": name, "violations": 0, "passed": True} for name in CHECKS]


@pytest.mark.parametrize("rule", ["user_time", "leave_last"])
def test_clean_splits_of_each_user_pass(rule: str, tmp_path: Path) -> None:
    assert set(violations(LOG, tmp_path, rule).values()) == {0}


def test_clean_global_split_passes(tmp_path: Path) -> None:
    log = [[(0, 1, 0, 0), (1, 0, 5, 1)], [(0, 1, 4, 0), (1, 0, 6, 2)]]
    assert set(violations(log, tmp_path, "global_time").values()) == {0}


def test_times_that_go_back_are_found(tmp_path: Path) -> None:
    log = [[(0, 1, 5, 0), (1, 0, 3, 0), (2, 0, 9, 0)], [(0, 1, 1, 0)]]
    assert violations(log, tmp_path, "user_time") == dict(zip(CHECKS, (1, 0, 0), strict=True))


@pytest.mark.parametrize("rule", ["user_time", "leave_last"])
def test_training_after_validation_of_the_same_user_is_found(rule: str, tmp_path: Path) -> None:
    log = [[(0, 1, 1, 0), (1, 0, 2, 1), (2, 0, 2, 0), (3, 0, 4, 0), (4, 1, 5, 2)], LOG[2]]
    assert violations(log, tmp_path, rule) == dict(zip(CHECKS, (0, 2, 0), strict=True))


def test_later_split_at_an_earlier_time_is_found_wherever_it_stands(tmp_path: Path) -> None:
    log = [[(0, 1, 5, 0), (1, 0, 3, 2)]]
    assert violations(log, tmp_path, "user_time") == dict(zip(CHECKS, (1, 1, 0), strict=True))


def test_global_split_is_checked_over_all_users(tmp_path: Path) -> None:
    log = [[(0, 1, 0, 0), (1, 0, 5, 1)], [(0, 1, 5, 0), (1, 0, 6, 2)], [(0, 1, 4, 2), (0, 1, 9, 2)]]
    assert violations(log, tmp_path / "all", "global_time") == dict(zip(CHECKS, (0, 2, 0), strict=True))
    assert violations(log, tmp_path / "each", "user_time") == dict(zip(CHECKS, (0, 0, 0), strict=True))


def test_target_that_is_there_twice_is_found(tmp_path: Path) -> None:
    log = [[(0, 1, 5, 0), (1, 1, 5, 0), (0, 0, 5, 0)], [(0, 1, 5, 0)]]
    assert violations(log, tmp_path, "user_time") == dict(zip(CHECKS, (0, 0, 1), strict=True))


def leaks_by_loops(log: Sequence[Sequence[Row]], rule: str) -> list[int]:
    """Count with loops what `count_leaks` counts with sorts."""
    back = sum(after[2] < before[2] for user in log for before, after in pairwise(user))
    twice = sum(len(user) - len({(item, time) for item, _, time, _ in user}) for user in log)
    if rule == "global_time":
        rows = [row for user in log for row in user]
        late = sum(any(row[3] > other[3] and row[2] <= other[2] for other in rows) for row in rows)
    else:
        ordered = [sorted(user, key=lambda row: row[2]) for user in log]
        late = sum(any(row[3] < other[3] for other in user[:i]) for user in ordered for i, row in enumerate(user))
    return [back, late, twice]


@settings(max_examples=100, deadline=None)
@given(log=st.lists(st.lists(ROWS, min_size=1, max_size=7), min_size=1, max_size=4))
def test_every_leak_is_counted(log: list[list[Row]]) -> None:
    users = users_of(log)
    user = np.repeat(np.arange(len(log)), np.diff(users.offsets))
    for rule in ("user_time", "global_time"):
        assert count_leaks(users, user, extent_of([users]), rule).tolist() == leaks_by_loops(log, rule)


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_any_cut_into_blocks_tells_the_same(data: st.DataObject) -> None:
    log = data.draw(st.lists(st.lists(ROWS, min_size=1, max_size=9), min_size=1, max_size=8))
    cuts = data.draw(st.lists(st.booleans(), min_size=len(log), max_size=len(log)))
    blocks: list[list[list[Row]]] = [[]]
    for user, is_first in zip(log, cuts, strict=True):
        if is_first and blocks[-1]:
            blocks.append([])
        blocks[-1].append(user)
    parts = [users_of(block) for block in blocks]
    for rule in ("user_time", "global_time"):
        extent, whole = extent_of(parts), users_of(log)
        count = partial(summarise, extent=extent_of([whole]), rule=rule, items=6)
        expected = vars(count(whole))
        found = vars(summed(summarise(part, extent, rule, 6) for part in reversed(parts)))
        assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_reading_in_blocks_tells_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = write_dataset(tmp_path, [3, 50, 9, 120, 41, 7, 15])
    users = read_all(dataset)
    extent = extent_of([users])
    expected = finish(summarise(users, extent, "user_time", dataset.items), extent, dataset)
    assert dataset_stats(dataset) == expected
    monkeypatch.setattr(module, "BLOCK_INTERACTIONS", 1)
    assert len(list(module.read_blocks(dataset))) == len(dataset.segments) > 3
    assert dataset_stats(dataset) == expected


def test_merging_is_adding() -> None:
    extent = extent_of([users_of(LOG)])
    one = summarise(users_of(LOG), extent, "user_time", 5)
    assert merge(one, one).lengths.tolist() == [0, 2, 0, 2, 2]


def test_command_prints_everything_and_ends_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lay_down(tmp_path, LOG, "user_time")
    data_stats(["data.name=tiny", "prompt.item_template={title}"], [], str(tmp_path), as_json=True)
    out, err = capsys.readouterr()
    assert json.loads(out)["text"]["histogram"] == [ITEMS]
    for text in (
        "interactions per user",
        "share of clicks over time",
        "tokens of the item's text",
        "duplicate_event 4",
    ):
        assert text in err
    for name in CHECKS:
        assert f"{name}: pass" in err


def test_command_fails_on_a_leak_after_it_has_told_everything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lay_down(tmp_path, [[(0, 1, 5, 0), (0, 0, 5, 0), (1, 0, 6, 2)]], "user_time")
    with pytest.raises(RunError, match="no target is there twice: violated 1 times") as raised:
        data_stats(["data.name=tiny", "prompt.item_template={title}"], [], str(tmp_path), as_json=True)
    assert raised.value.exit_code == 3
    out, err = capsys.readouterr()
    assert json.loads(out)["checks"][2] == {"name": CHECKS[2], "violations": 1, "passed": False}
    assert "fail" in err


def test_command_goes_on_where_the_prompt_does_not_fit_the_catalogue(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lay_down(tmp_path, LOG, "user_time")
    data_stats(["data.name=tiny", "prompt.item_template={name}"], [], str(tmp_path), as_json=True)
    out, err = capsys.readouterr()
    assert json.loads(out)["text"] is None
    assert "no text lengths: prompt.item_template" in err


def test_command_needs_a_prepared_data_set(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no complete data set"):
        data_stats(["data.name=none"], [], str(tmp_path))
