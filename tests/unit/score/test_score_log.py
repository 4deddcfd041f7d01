"""A log of requests: which files are taken, which are refused, and in which words."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet as pq

from dti_ray.config import load_config
from dti_ray.errors import ConfigError, InputError
from tests.requests_log import located, slates, write_log


def refused(log: Path, *overrides: str) -> list[str]:
    with pytest.raises(InputError) as caught:
        located(log, *overrides)
    return [str(fault) for fault in caught.value.faults]


def test_rows_and_pairs_are_known_from_the_ends_of_the_files(tmp_path: Path) -> None:
    columns = slates(50)
    log = located(write_log(tmp_path / "log", columns, files=3))
    assert log.rows == sum(piece.rows for piece in log.pieces) == 50
    assert log.pairs == sum(max(len(slate or []), 1) for slate in columns["candidates"])
    assert log.has_slates
    assert [piece.first_row for piece in log.pieces] == [1, 1, 1]


def test_one_candidate_a_row_is_a_log_too(tmp_path: Path) -> None:
    log = located(write_log(tmp_path / "log", {"user_id": [1, 2], "item": [10, None]}), "score.columns.candidates=item")
    assert (log.rows, log.pairs, log.has_slates) == (2, 2, False)


def test_input_that_is_not_set_or_empty_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"score\.input: is not set"):
        located(tmp_path, "score.input=null")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.csv").write_text("user_id")
    assert refused(tmp_path / "folder")[0].startswith(f"{tmp_path}/folder: holds no .parquet file")
    assert refused(tmp_path / "nowhere") == [
        f"{tmp_path}/nowhere: is missing; expected a file or a folder; set score.input"
    ]


def test_missing_column_names_those_that_there_are(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log", {"user": [1], "candidates": [["a"]]})
    assert refused(log) == [
        f"{log}/part-0.parquet: has no column 'user_id' (score.columns.user); expected one of its columns: user, "
        "candidates; set score.columns.user"
    ]


@pytest.mark.parametrize(
    ("columns", "overrides", "told"),
    [
        ({"candidates": [[["a"]]]}, [], "column 'candidates' (score.columns.candidates) is list<element: list"),
        (
            {"user_id": [["u"]]},
            [],
            "column 'user_id' (score.columns.user) is list<element: string>; expected one value",
        ),
        (
            {"text": ["x"]},
            ["score.columns.text=text"],
            "column 'text' (score.columns.text) is string; expected like the",
        ),
        (
            {"past": [["a"]]},
            ["score.columns.history=past"],
            "expected a list of {item_id, label} or {item_id, label, t",
        ),
    ],
)
def test_column_of_the_wrong_kind_is_refused(
    tmp_path: Path, columns: dict[str, object], overrides: list[str], told: str
) -> None:
    log = write_log(tmp_path / "log", {"user_id": ["u"], "candidates": [["a"]], **columns})
    assert told in refused(log, *overrides)[0]


def test_files_that_differ_and_damaged_ones_are_told_at_once(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log", slates(9))
    pq.write_table(pa.table({"user_id": ["u"], "candidates": ["a"]}), log / "scalar.parquet")
    (log / "torn.parquet").write_bytes(b"PAR1 and so on")
    faults = refused(log)
    assert len(faults) == 2
    assert "torn.parquet: is damaged: " in faults[0]
    assert "on_bad_file" not in faults[0]
    assert "scalar.parquet: column 'candidates' (score.columns.candidates) is string; expected list" in faults[1]


def test_null_is_a_word_of_the_policies_however_it_is_written(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("score: {unknown_item: null, no_history: 'null'}")
    for config in (
        load_config([tmp_path / "a.yaml"]),
        load_config([], ["score.unknown_item=null", "score.no_history=null"]),
    ):
        assert (config.score.unknown_item, config.score.no_history) == ("null", "null")


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("score.no_history=skip", "score.no_history: got 'skip'; expected 'score', 'null' or 'fail'"),
        ("score.unknown_item=score", "score.unknown_item: got 'score'; expected 'null' or 'fail'"),
        ("score.columns.keep=row", "score.columns: keep ['row']: each once, and none of user_id"),
        ("score.unit_pairs=0", "score.unit_pairs: got 0; expected greater than 0"),
    ],
)
def test_word_that_no_policy_has_is_refused(override: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config([], [override])
    assert str(caught.value).startswith(told)
