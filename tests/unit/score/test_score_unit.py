"""Scores of a unit are those of the library's face, whatever the form of the log; policies do what they say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dti_ray.config import RunConfig
from dti_ray.data.interactions import open_dataset, read_all, read_items
from dti_ray.errors import InputError
from dti_ray.infer.model import CtrModel, Text
from dti_ray.score.histories import read_pasts
from dti_ray.score.scorer import Unit, cut_units
from dti_ray.score.unit import Judge, score_requests
from dti_ray.storage import Storage
from tests.requests_log import config_for, requests_of, rules_of, slates, write_log
from tests.scoring import write_run

TOLERANCE = 1e-5
TIMED = ["score.columns.time=time", "score.columns.keep=request"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("root")
    write_run(folder)
    return folder


@pytest.fixture(scope="module")
def model(root: Path) -> CtrModel:
    return CtrModel.load("run", "cpu", str(root))


def scored(root: Path, model: CtrModel, config: RunConfig) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Score a whole log as one unit."""
    dataset = open_dataset(Storage(str(root)), "tiny")
    requests, ids = requests_of(config), read_items(dataset)["item_id"].to_pylist()
    judge = Judge(config.score, rules_of(config).log, ids, frozenset(ids), 5, per_second=1)
    pasts = read_pasts(dataset, {user for user in requests["user_id"].to_pylist() if user}, 0)
    rows, counts = score_requests(requests, pasts, judge, model.score_batch)
    return rows.to_pylist(), dict(counts)


def histories(root: Path) -> dict[str, list[tuple[str, int, int]]]:
    """Return each user's interactions in plain Python."""
    dataset = open_dataset(Storage(str(root)), "tiny")
    users, ids = read_all(dataset), read_items(dataset)["item_id"].to_pylist()
    columns = [values.tolist() for values in (users.items, users.labels, users.times)]
    flat = [(ids[item], label, time) for item, label, time in zip(*columns, strict=True)]
    return {str(user): flat[users.offsets[i] : users.offsets[i + 1]] for i, user in enumerate(users.user_ids)}


def test_scores_are_those_of_each_request_by_itself(tmp_path: Path, root: Path, model: CtrModel) -> None:
    columns, known = slates(60), histories(root)
    rows, counts = scored(root, model, config_for(write_log(tmp_path, columns, files=2), root, *TIMED))
    assert [row["request"] for row in rows] == columns["request"]
    assert [row["user_id"] for row in rows] == columns["user_id"]
    assert [row["candidates"] for row in rows] == columns["candidates"]
    for row in rows:
        if row["candidates"] is None:
            assert row["scores"] is None
            continue
        history = [one for one in known.get(row["user_id"], []) if row["time"] is None or one[2] < row["time"]]
        items = [item for item in row["candidates"] if item != "new"]
        expected = iter(model.score(history, items, row["time"]))
        for item, score in zip(row["candidates"], row["scores"], strict=True):
            assert (score is None) == (item == "new")
            assert score is None or score == pytest.approx(next(expected), abs=TOLERANCE)
    pairs = [item for slate in columns["candidates"] for item in slate or []]
    assert counts["pairs_of_unknown_items"] == counts["pairs_null"] == pairs.count("new")
    assert counts["pairs_scored"] == len(pairs) - pairs.count("new")
    assert counts["rows_of_unknown_users"] == 24
    assert counts["rows_without_history"] >= 24


def test_one_candidate_a_row_scores_as_slates_do(tmp_path: Path, root: Path, model: CtrModel) -> None:
    columns = slates(40)
    flat = [(user, item, time, slate) for user, slate, time in zip(*list(columns.values())[:3], strict=True)
            for item in slate or []]  # fmt: skip
    long = {
        "user_id": [one[0] for one in flat],
        "candidates": [one[1] for one in flat],
        "time": [one[2] for one in flat],
    }
    rows, _ = scored(root, model, config_for(write_log(tmp_path / "long", long), root, TIMED[0]))
    wide, _ = scored(root, model, config_for(write_log(tmp_path / "wide", columns), root, TIMED[0]))
    expected = [score for row in wide for score in row["scores"] or []]
    assert list(rows[0]) == ["user_id", "time", "item_id", "score", "file", "row"]
    assert [row["item_id"] for row in rows] == long["candidates"]
    assert [row["score"] for row in rows] == pytest.approx(expected, abs=TOLERANCE)


def test_history_of_the_request_stands_before_the_data_sets(tmp_path: Path, root: Path, model: CtrModel) -> None:
    kind = pa.list_(pa.struct([("item_id", pa.string()), ("label", pa.int64()), ("time", pa.int32())]))
    own = [("03", 1, 5), ("04", 0, 8)]
    given = [dict(zip(("item_id", "label", "time"), one, strict=True)) for one in own]
    columns = {"user_id": ["user 0"] * 3, "candidates": [["01", "02"]] * 3, "time": [9, 8, 9],
               "past": pa.array([given, given, None], kind)}  # fmt: skip
    rows, _ = scored(root, model, config_for(
        write_log(tmp_path, columns), root, TIMED[0], "score.columns.history=past"
    ))  # fmt: skip
    before = [one for one in histories(root)["user 0"] if one[2] < 9]
    for row, history in zip(rows, (own, own[:1], before), strict=True):
        expected = model.score(history, ["01", "02"], row["time"])
        np.testing.assert_allclose(row["scores"], expected, atol=TOLERANCE)


def test_text_is_read_where_the_id_is_unknown(tmp_path: Path, root: Path, model: CtrModel) -> None:
    columns = {"user_id": ["user 1"], "candidates": [["01", "new", "newer", None]],
               "text": [["not read", "word03 of film 3", " ", None]]}  # fmt: skip
    rows, counts = scored(root, model, config_for(write_log(tmp_path, columns), root, "score.columns.text=text"))
    first, second, third, fourth = rows[0]["scores"]
    expected = model.score(histories(root)["user 1"], ["01", Text("word03 of film 3")])
    np.testing.assert_allclose([first, second], expected, atol=TOLERANCE)
    assert (third, fourth) == (None, None)
    assert (counts["pairs_read_by_text"], counts["pairs_of_unknown_items"]) == (1, 2)


@pytest.mark.parametrize("policy", ["score", "null"])
def test_users_without_history_follow_the_policy(tmp_path: Path, root: Path, model: CtrModel, policy: str) -> None:
    columns = {"user_id": ["nobody", None, "user 2", "user 2"], "candidates": [["01"]] * 4, "time": [9, 9, -1, 9]}
    config = config_for(write_log(tmp_path, columns), root, TIMED[0], f"score.no_history={policy}")
    rows, counts = scored(root, model, config)
    empty = pytest.approx(model.score([], ["01"])[0], abs=TOLERANCE) if policy == "score" else None
    assert [row["scores"][0] for row in rows[:3]] == [empty] * 3
    assert rows[3]["scores"][0] is not None
    assert (counts["rows_without_history"], counts["rows_of_unknown_users"]) == (3, 2)
    assert counts["pairs_null"] == (3 if policy == "null" else 0)


def test_user_without_history_is_named_where_that_is_to_fail(tmp_path: Path, root: Path, model: CtrModel) -> None:
    log = write_log(tmp_path, {"user_id": ["user 2", "nobody"], "candidates": [["01"]] * 2})
    with pytest.raises(InputError) as caught:
        scored(root, model, config_for(log, root, "score.no_history=fail"))
    assert str(caught.value).startswith(f"{log}/part-0.parquet row 2: user 'nobody' has no history before the moment;")


@pytest.mark.parametrize("policy", ["skip", "fail"])
def test_unknown_items_of_histories_follow_the_policy(tmp_path: Path, root: Path, model: CtrModel, policy: str) -> None:
    columns = {"user_id": ["user 0"], "candidates": [["01"]],
               "past": [[{"item_id": "02", "label": 1}, {"item_id": "new", "label": 0}]]}  # fmt: skip
    config = config_for(write_log(tmp_path, columns), root, "score.columns.history=past",
                        f"score.unknown_in_history={policy}")  # fmt: skip
    if policy == "fail":
        with pytest.raises(InputError, match=r"such as 'new'; score\.unknown_in_history=skip leaves such"):
            scored(root, model, config)
        return
    rows, counts = scored(root, model, config)
    np.testing.assert_allclose(rows[0]["scores"], model.score([("02", 1)], ["01"]), atol=TOLERANCE)
    assert counts["interactions_left_out"] == 1


@given(st.lists(st.lists(st.integers(0, 9), min_size=3, max_size=3), max_size=8), st.integers(1, 20))
def test_units_cover_every_partition_once_in_order(weights: list[list[int]], unit_pairs: int) -> None:
    units = cut_units(weights, 3, unit_pairs)
    seen: dict[int, list[int]] = {partition: [] for partition in range(3)}
    for unit in units:
        seen[unit.partition] += range(unit.first, unit.stop)
    for partition, blocks in seen.items():
        assert blocks == sorted(set(blocks))
        assert all(block in blocks for block in range(len(weights)) if weights[block][partition])
    for unit in units:
        held = [weights[block][unit.partition] for block in range(unit.first, unit.stop)]
        assert sum(held) > 0
        assert sum(held[:-1]) < unit_pairs, "it ends with the file that fills it"


def test_unit_of_one_heavy_user_is_cut_at_scratch_files() -> None:
    assert cut_units([[3], [4], [0], [2]], 1, 5) == [Unit(0, 0, 2), Unit(0, 2, 4)]
