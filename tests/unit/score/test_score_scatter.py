"""Requests on their way to their users' partitions: none is lost, none is changed, what is malformed is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dti_ray.data.gather import read_batch
from dti_ray.errors import InputError
from dti_ray.score import log as log_module
from dti_ray.score import scatter as scatter_module
from dti_ray.score.scatter import Scattered, scatter
from dti_ray.storage import Storage
from tests.requests_log import config_for, requests_of, rules_of, slates, write_log

PARTITIONS = 3
KNOWN = pa.array([f"{i:02d}" for i in range(30)])


def scattered(root: Path, log: Path, *overrides: str) -> tuple[list[Scattered], list[pa.Table]]:
    """Scatter a log; return what was found and the requests of each partition."""
    config, storage = config_for(log, root, *overrides), Storage(str(root))
    rules = rules_of(config)
    found = [
        scatter(number, piece, rules, KNOWN, PARTITIONS, storage, "scratch")
        for number, piece in enumerate(rules.log.pieces)
    ]
    blocks = [block for one in found for block in one.blocks]
    tables = [
        pa.Table.from_batches([read_batch(storage, block, p) for block in blocks], rules.schema)
        for p in range(PARTITIONS)
    ]
    return found, tables


def fails(root: Path, columns: dict[str, Any], *overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        scattered(root, write_log(root / "log", columns), *overrides)
    return str(caught.value).partition("part-0.parquet ")[2]


def test_every_row_is_in_the_partition_of_its_user_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_module, "BATCH_PAIRS", 7)
    monkeypatch.setattr(scatter_module, "BLOCK_PAIRS", 20)
    columns = slates(60)
    log = write_log(tmp_path / "log", columns, files=2)
    found, tables = scattered(tmp_path, log, "score.columns.time=time", "score.columns.keep=request")
    assert sum(len(one.blocks) for one in found) > 4
    users = [set(table["user_id"].to_pylist()) for table in tables]
    assert not any(users[a] & users[b] for a in range(PARTITIONS) for b in range(a))
    rows = sorted((row for table in tables for row in table.to_pylist()), key=lambda row: (row["file"], row["row"]))
    for name in ("user_id", "candidates", "time"):
        assert [row[name] for row in rows] == columns[name]
    assert [row["keep.request"] for row in rows] == columns["request"]
    assert [(row["file"], row["row"]) for row in rows] == [(i // 30, i % 30 + 1) for i in range(60)]
    weights = [sum(of_block[p] for one in found for of_block in one.weights) for p in range(PARTITIONS)]
    pairs = [sum(max(len(slate or []), 1) for slate in table["candidates"].to_pylist()) for table in tables]
    assert weights == pairs
    assert sum(one.pairs for one in found) == sum(len(slate or []) for slate in columns["candidates"])


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.none() | st.integers(-5, 5), st.none() | st.lists(st.none() | st.integers(0, 9)))))
def test_numbers_are_ids_as_in_a_prepared_log(tmp_path_factory: pytest.TempPathFactory, rows: list[Any]) -> None:
    root = tmp_path_factory.mktemp("numbers")
    columns = {
        "user_id": pa.array([float(user) if user is not None else None for user, _ in rows], pa.float64()),
        "candidates": pa.array([slate for _, slate in rows], pa.large_list(pa.int32())),
    }
    _, tables = scattered(root, write_log(root / "log", columns))
    back = sorted((row["row"], row["user_id"], row["candidates"]) for table in tables for row in table.to_pylist())
    assert back == [
        (at + 1, None if user is None else str(user), None if slate is None else [
            None if item is None else str(item) for item in slate
        ])
        for at, (user, slate) in enumerate(rows)
    ]  # fmt: skip


def test_one_candidate_a_row_is_a_slate_of_one(tmp_path: Path) -> None:
    columns = {"user_id": ["a", "b"], "candidates": ["01", None], "text": ["x", None]}
    requests = requests_of(config_for(write_log(tmp_path / "log", columns), tmp_path, "score.columns.text=text"))
    assert requests["candidates"].to_pylist() == [["01"], [None]]
    assert requests["text"].to_pylist() == [["x"], [None]]


def test_times_keep_their_unit_and_are_counted(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log", {"user_id": ["a"] * 3, "candidates": [["01"]] * 3,
                                       "time": [1_700_000_000_123, None, 1_700_000_000_456]})  # fmt: skip
    found, tables = scattered(tmp_path, log, "score.columns.time=time")
    assert found[0].kinds == {"MILLIS": 2}
    assert found[0].first_of_kind == {"MILLIS": (f"{log}/part-0.parquet", 1, 1_700_000_000_123)}
    assert sorted(pc.drop_null(pa.concat_tables(tables)["time"]).to_pylist()) == [1_700_000_000_123, 1_700_000_000_456]


def past(*interactions: tuple[object, object, object]) -> list[dict[str, object]]:
    return [dict(zip(("item_id", "label", "time"), one, strict=True)) for one in interactions]


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        ({"time": ["noon", "1"]}, "row 1: has a time that is not understood: noon; mend the log"),
        ({"past": [[], past(("01", 1, 5), ("02", 0, 4))]}, "row 2: has a history that is not oldest first"),
        ({"past": [past(("01", 2, 5)), None]}, "row 1: has a label that is not 0 or 1"),
        ({"past": [None, past((None, 1, 5))]}, "row 2: has a history without an item"),
        ({"past": [past(("01", 1, None)), past(("01", 1, None))]}, "row 1: has a history without a time (2 rows such)"),
        ({"text": [["x", "y"], ["x"]]}, "row 1: has another number of texts than of candidates"),
        ({"candidates": [["01"], ["02", "new", "newer"]]}, "row 2: asks for items that the model does not know, such "
         "as 'new', 'newer'; expected ids of its 30 items; score.unknown_item=null gives them null scores"),
    ],
)  # fmt: skip
def test_malformed_row_is_named(tmp_path: Path, columns: dict[str, Any], told: str) -> None:
    given: dict[str, Any] = {"user_id": ["a", "b"], "candidates": [["01"], ["02"]], **columns}
    kinds = {"past": pa.list_(pa.struct([("item_id", pa.string()), ("label", pa.int64()), ("time", pa.int64())]))}
    typed = {name: pa.array(values, kinds.get(name)) for name, values in given.items()}
    named = {"past": "history"}
    overrides = [f"score.columns.{named.get(name, name)}={name}" for name in columns if name != "candidates"]
    assert fails(tmp_path, typed, *overrides, "score.unknown_item=fail").startswith(told)


def test_text_in_place_of_an_unknown_id_is_enough(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log", {"user_id": ["a"], "candidates": [["01", "new"]], "text": [[None, "Alien"]]})
    found, _ = scattered(tmp_path, log, "score.columns.text=text", "score.unknown_item=fail")
    assert found[0].pairs == 2
