from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from dti_ray.cli.logs import INTERACTIONS, OUT, USERS, data_synth
from dti_ray.config import load_config
from dti_ray.data.synth import (
    CLICK_RATE,
    DAY_S,
    DAYS,
    DRIFT_DAYS,
    DRIFTING,
    FIRST_SECOND,
    LOG,
    Catalogue,
    Crowd,
    Interactions,
    LogShape,
    draw_catalogue,
    draw_days,
    log_shape,
    write_log,
)
from dti_ray.errors import ConfigError, InputError

SYNTH = Path(__file__).parents[3] / "configs" / "synth.yaml"
SHAPE = log_shape(60_000, 700)
SMALL = LogShape(interactions=5_000, users=60, items=90, files=3, seed=4)


def nothing(rows: int) -> None:
    pass


def drawn(shape: LogShape) -> Interactions:
    """Return the days of a log as one."""
    days = list(draw_days(shape, draw_catalogue(shape)))
    return Interactions(**{name: np.concatenate([getattr(day, name) for day in days]) for name in vars(days[0])})


@pytest.fixture(scope="module")
def catalogue() -> Catalogue:
    return draw_catalogue(SHAPE)


@pytest.fixture(scope="module")
def log() -> Interactions:
    return drawn(SHAPE)


def digests(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def smoothed(group: np.ndarray, clicked: np.ndarray, groups: int) -> np.ndarray:
    """Return each group's share of clicks, drawn to the mean where there are few."""
    clicks, rows = np.bincount(group, clicked, groups), np.bincount(group, minlength=groups)
    return (clicks + 10 * CLICK_RATE) / (rows + 10)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_log_has_exactly_its_rows_and_every_user_in_order_of_time(data: st.DataObject) -> None:
    interactions = data.draw(st.integers(1, 3_000))
    users = data.draw(st.integers(1, interactions))
    log = drawn(LogShape(interactions, users, data.draw(st.integers(1, 50)), 1, data.draw(st.integers(0, 9))))
    assert len(log.time) == interactions
    assert len(np.unique(log.user)) == users
    assert (np.diff(log.time) >= 0).all()
    assert log.time[0] >= FIRST_SECOND
    assert log.time[-1] < FIRST_SECOND + DAYS * DAY_S


def test_one_very_busy_user_still_fits_the_days() -> None:
    log = drawn(LogShape(interactions=400_000, users=1, items=10, files=1, seed=0))
    days = np.unique((log.time - FIRST_SECOND) // DAY_S)
    assert days.tolist() == list(range(days[0], DAYS)), "every day since the first visit"


def test_lengths_and_popularity_have_heavy_tails(log: Interactions) -> None:
    lengths = np.bincount(log.user)
    assert np.median(lengths) < 0.6 * lengths.mean()
    assert lengths.max() > 10 * lengths.mean()
    popularity = np.sort(np.bincount(log.item, minlength=SHAPE.items))[::-1]
    assert popularity[: SHAPE.items // 100].sum() > 0.1 * len(log.item)


def test_users_come_in_visits_and_some_rows_share_a_second(log: Interactions) -> None:
    order = np.lexsort((log.time, log.user))
    gaps = np.diff(log.time[order])[np.diff(log.user[order]) == 0]
    assert 0.15 < (gaps == 0).mean() < 0.3
    assert 0.05 < (gaps > 3_600).mean() < 0.2


def test_some_users_and_items_are_new_after_most_of_the_time(log: Interactions, catalogue: Catalogue) -> None:
    is_late = np.arange(len(log.time)) >= 0.9 * len(log.time)
    for values in (log.user, log.item):
        assert len(np.setdiff1d(values[is_late], values[~is_late])) > 10
    day = (log.time - FIRST_SECOND) // DAY_S
    assert (catalogue.released[log.item] <= day).all()


def test_click_rate_is_as_promised(log: Interactions) -> None:
    assert log.clicked.mean() == pytest.approx(CLICK_RATE, abs=0.03)
    assert log.clicked.mean() == pytest.approx(log.probability.mean(), abs=0.01)


def test_there_is_something_to_learn_and_items_alone_do_not_tell_it(log: Interactions, catalogue: Catalogue) -> None:
    past = np.arange(len(log.time)) < 0.8 * len(log.time)
    clicked = log.clicked[~past]
    item = smoothed(log.item[past], log.clicked[past], SHAPE.items)[log.item]
    kinds, kind = np.unique(catalogue.table["category"].to_numpy(zero_copy_only=False), return_inverse=True)
    pair = log.user * len(kinds) + kind[log.item]
    liking = smoothed(pair[past], log.clicked[past], SHAPE.users * len(kinds))[pair]
    history = np.log(item / (1 - item)) + np.log(liking / (1 - liking))
    ideal, by_item, by_history = (
        roc_auc_score(clicked, score[~past]) for score in (log.probability, item, history)
    )  # fmt: skip
    assert 0.77 < ideal < 0.82
    assert 0.6 < by_item < 0.68
    assert by_history > by_item + 0.03, "what a user did with this kind of item before tells more"


def test_tastes_drift_and_do_not_fade() -> None:
    rng = np.random.default_rng(0)
    crowd = Crowd(log_shape(30_000, 20_000), rng)
    users = np.arange(20_000)
    first, soon, late = (crowd.tastes(users, day, rng).ravel() for day in (0, 7, 170))
    for taste in (first, soon, late):
        assert taste.std() == pytest.approx(1, abs=0.01)
    assert np.corrcoef(first, late)[0, 1] == pytest.approx(1 - DRIFTING, abs=0.01)
    assert np.corrcoef(first, soon)[0, 1] == pytest.approx(1 - DRIFTING + DRIFTING * np.exp(-7 / DRIFT_DAYS), abs=0.01)


def test_titles_are_words_that_say_what_an_item_is_like(catalogue: Catalogue) -> None:
    titles = catalogue.table["title"].to_pylist()
    assert len(set(titles)) == len(titles) == SHAPE.items
    assert all(re.fullmatch(r"([BDFGKLMNPRSTVZ]\w*[aeiou][lnrs] ){2}([bdfgklmnprstvz][aeiou]){3,}", title, re.I)
               for title in titles)  # fmt: skip
    likeness = catalogue.character @ catalogue.character.T
    words = [frozenset(title.split()[:2]) for title in titles]
    share_one = np.array([[bool(one & other) for other in words[:400]] for one in words[:400]])
    assert likeness[:400, :400][share_one].mean() > 0.8
    assert abs(likeness.mean()) < 0.3


def test_same_shape_gives_the_same_files_and_another_seed_others(tmp_path: Path) -> None:
    for name, seed in (("a", 4), ("b", 4), ("c", 5)):
        write_log(LogShape(5_000, 60, 90, 3, seed), tmp_path / name, nothing)
    a, b, c = (digests(tmp_path / name) for name in "abc")
    assert a == b
    assert a.keys() == c.keys()
    assert all(a[name] != c[name] for name in a)


def test_files_hold_the_log_in_equal_parts(tmp_path: Path) -> None:
    seen: list[int] = []
    assert write_log(SMALL, tmp_path / "log", seen.append)
    assert seen == [1_666, 3_333, 5_000]
    tables = [pq.read_table(path) for path in sorted((tmp_path / "log" / "interactions").iterdir())]
    assert [len(table) for table in tables] == [1_666, 1_667, 1_667]
    assert all(table.schema.equals(LOG) for table in tables)
    whole = pq.read_table(tmp_path / "log" / "interactions")
    expected = drawn(SMALL)
    assert np.array_equal(whole["user_id"].to_numpy(), expected.user + 1)
    assert np.array_equal(whole["timestamp"].to_numpy(), expected.time)
    assert np.array_equal(whole["clicked"].to_numpy(), expected.clicked)
    items = pq.read_table(tmp_path / "log" / "items.parquet")
    assert items["item_id"].to_pylist() == list(range(1, 91))
    assert set(whole["item_id"].to_pylist()) <= set(items["item_id"].to_pylist())


def test_more_files_than_days_are_filled_too(tmp_path: Path) -> None:
    write_log(LogShape(500, 5, 9, 400, 0), tmp_path / "log", nothing)
    sizes = [pq.read_metadata(path).num_rows for path in (tmp_path / "log" / "interactions").iterdir()]
    assert sorted(sizes) == [1] * 300 + [2] * 100


def test_same_log_again_is_nothing_to_do(tmp_path: Path) -> None:
    write_log(SMALL, tmp_path / "log", nothing)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert not write_log(SMALL, tmp_path / "log", nothing)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_other_log_in_the_folder_is_kept(tmp_path: Path) -> None:
    write_log(SMALL, tmp_path, nothing)
    before = digests(tmp_path)
    with pytest.raises(InputError, match=r"--users: got 61; expected 60 as in .*synth.json; choose another --out"):
        write_log(LogShape(5_000, 61, 90, 3, 4), tmp_path, nothing)
    assert digests(tmp_path) == before


def test_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="holds other files; expected an empty folder"):
        write_log(SMALL, tmp_path, nothing)
    assert digests(tmp_path).keys() == {"thesis.tex"}


def test_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("a file")
    with pytest.raises(InputError, match="expected an empty folder"):
        write_log(SMALL, tmp_path / "log", nothing)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_interrupted_log_is_not_there(error: type[BaseException], tmp_path: Path) -> None:
    def stop(rows: int) -> None:
        if rows > 2_000:
            raise error

    with pytest.raises(error):
        write_log(SMALL, tmp_path / "log", stop)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_attempt_left_is_cleared(tmp_path: Path) -> None:
    left = tmp_path / ".log.partial" / "interactions"
    left.mkdir(parents=True)
    (left / "part-99999.parquet").write_bytes(b"half a file")
    write_log(SMALL, tmp_path / "log", nothing)
    assert [path.name for path in tmp_path.iterdir()] == ["log"]
    assert "interactions/part-99999.parquet" not in digests(tmp_path / "log")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: log_shape(10, 11), "--users: got 11; expected at most --interactions, 10"),
        (lambda: log_shape(10, 5, files=11), "--files: got 11; expected at most --interactions, 10"),
        (lambda: log_shape(10, 5, items=0), "--items: got 0; expected at least 1"),
        (lambda: log_shape(10, 5, seed=-1), "--seed: got -1; expected at least 0"),
    ],
)
def test_shape_that_no_log_can_have_is_refused(make: Callable[[], LogShape], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_every_fault_of_a_shape_is_named() -> None:
    with pytest.raises(ConfigError) as raised:
        log_shape(0, 0, 0, 0, -1)
    assert len(raised.value.faults) == 5


def test_large_logs_get_more_items_and_files() -> None:
    assert log_shape(20_000_000, 200_000) == LogShape(20_000_000, 200_000, 22_361, 20, 0)


def test_command_ends_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data_synth(1_000, 20, tmp_path / "log", as_json=True)
    expected = {"interactions": 1_000, "users": 20, "items": 158, "path": str(tmp_path / "log")}
    assert json.loads(capsys.readouterr().out) == expected
    data_synth(1_000, 20, tmp_path / "log", as_json=True)
    out, err = capsys.readouterr()
    assert json.loads(out) == expected
    assert "there already" in err


def test_configuration_prepares_what_the_command_writes(tmp_path: Path) -> None:
    data = load_config([SYNTH]).data
    assert (data.path, data.catalogue) == (f"{OUT}/interactions", f"{OUT}/items.parquet")
    assert (data.columns.user, data.columns.item, data.columns.time, data.label) == tuple(LOG.names)
    assert set(data.columns.text) < set(draw_catalogue(SMALL).table.column_names)
    assert log_shape(INTERACTIONS, USERS).files == 1
