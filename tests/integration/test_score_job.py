"""Batch scoring by the real job: nothing is lost or doubled, whatever dies; what is wrong is told before Ray starts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray
from pyarrow import parquet as pq

from dti_ray.cli import main
from dti_ray.data.interactions import open_dataset
from dti_ray.data.ray_jobs import Watch
from dti_ray.errors import InputError
from dti_ray.export import export_run
from dti_ray.infer.model import CtrModel
from dti_ray.score.job import Scores, open_scores, score
from dti_ray.storage import Storage
from dti_ray.train.identity import load_run
from tests.requests_log import config_for, slates, write_log
from tests.scoring import write_run

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("ray_cluster")]

ROWS, TIMES = 240, 40  # candidates stand so often in their slate: a unit must take a while
OVERRIDES = ["train.run=run", "score.columns.time=time", "score.columns.keep=request", "score.unit_pairs=2000"]
OUTPUT = "scores/scores"


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    columns = slates(ROWS)
    columns["user_id"] = [user if row % 3 else f"guest {row}" for row, user in enumerate(columns["user_id"])]
    columns["candidates"] = [slate and slate * TIMES for slate in columns["candidates"]]
    return write_log(tmp_path_factory.mktemp("log"), columns, files=3, row_group_size=20)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_run(tmp_path / "root")
    return tmp_path / "root"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, log: Path) -> dict[str, bytes]:
    """What one undisturbed job of one actor writes."""
    folder = tmp_path_factory.mktemp("undisturbed") / "root"
    write_run(folder)
    score(config_for(log, folder, *OVERRIDES, "score.workers=1"), Storage(str(folder)))
    return shards(folder)


def shards(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((root / OUTPUT / "scores").iterdir())}


def manifest(root: Path) -> dict[str, Any]:
    return json.loads((root / OUTPUT / "manifest.json").read_text())


def command(log: Path, root: Path, *more: str) -> list[str]:
    address = ray.get_runtime_context().gcs_address
    return ["score", "run", f"score.input={log}", "score.unknown_item=null", *OVERRIDES[1:], "score.workers=1",
            f"cluster.address={address}", "--root", str(root), "--json", *more]  # fmt: skip


def test_rows_come_out_as_they_went_in_with_the_scores_of_the_library(
    log: Path, root: Path, whole: dict[str, bytes]
) -> None:
    steps: list[tuple[str, int, int]] = []
    done = score(
        config_for(log, root, *OVERRIDES, "score.workers=2"), Storage(str(root)), Watch(lambda *s: steps.append(s))
    )
    assert shards(root) == whole, "two actors write what one writes, byte for byte"
    assert len(whole) > 6
    assert steps[-1] == ("unit", len(whole), len(whole))
    assert not (root / OUTPUT / "scratch").exists()
    found = manifest(root)
    assert found["rows_in"] == found["rows_out"] == sum(found["rows"]) == done.rows == ROWS
    assert found["policies"] == {"no_history": "score", "unknown_item": "null", "unknown_in_history": "fail"}
    assert (found["model"]["run"], found["dataset"]) == ("run", "tiny")

    columns = slates(ROWS)
    rows = [row for file in done.files for row in pq.read_table(root / OUTPUT / file.path).to_pylist()]
    rows.sort(key=lambda row: (row["file"], row["row"]))
    assert [row["request"] for row in rows] == columns["request"], "none lost, none twice"
    model = CtrModel.load("run", "cpu", str(root))
    for row in rows[:30]:
        if row["user_id"] is not None and row["user_id"].startswith("guest") and row["candidates"]:
            known = [item for item in row["candidates"] if item != "new"]
            expected = model.score([], known, row["time"])
            assert [one for one in row["scores"] if one is not None] == pytest.approx(expected, abs=1e-5)


def test_an_export_scores_as_its_run_does(log: Path, root: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    storage = Storage(str(root))
    export_run(load_run(storage, "run"), storage, str(tmp_path / "export"))
    score(config_for(log, root, *OVERRIDES, f"score.model={tmp_path / 'export'}"), storage)
    found = shards(root)
    assert found.keys() == whole.keys()
    for name, content in whole.items():
        mine, of_run = (pq.read_table(pa.BufferReader(one)) for one in (found[name], content))
        assert mine.drop("scores") == of_run.drop("scores")
        probabilities, expected = (one["scores"].combine_chunks().flatten() for one in (mine, of_run))
        assert probabilities.to_pylist() == pytest.approx(expected.to_pylist(), abs=1e-5)
    assert manifest(root)["model"]["export"] == str(tmp_path / "export")


def test_killed_job_goes_on_and_ends_with_the_same_bytes(
    log: Path, root: Path, whole: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    scratch = root / OUTPUT / "scratch"
    for signs, count in (("rows-*.json", 1), ("unit-*.json", 2)):  # whichever units the actor met first
        kill_once_there(command(log, root), scratch, signs, count)
        assert open_scores(Storage(str(root)), "scores") is None
    finished = sorted(path.name for path in scratch.glob("unit-*.json"))
    assert 0 < len(finished) < len(whole), "killed in mid-run"
    (root / OUTPUT / "scores" / finished[0].replace("unit", "part").replace("json", "parquet")).write_bytes(b"torn")
    kept = root / OUTPUT / "scores" / finished[1].replace("unit", "part").replace("json", "parquet")
    before = kept.stat().st_mtime_ns
    with pytest.raises(SystemExit, match="0"):
        main(command(log, root))
    result = json.loads(capsys.readouterr().out)
    assert shards(root) == whole
    assert kept.stat().st_mtime_ns == before, "what is whole is not scored again"
    assert result["fresh_units"] < len(whole)
    assert (result["rows"], manifest(root)["rows_out"]) == (ROWS, ROWS)

    with pytest.raises(SystemExit, match="0"):
        main(command(log, root))
    assert "complete already" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(command(log, root, "score.no_history=null"))
    told = capsys.readouterr().err.splitlines()
    assert told[0].startswith("error score.name=scores: was begun with something else; choose another score.name")
    assert told[1].startswith("error score.no_history: got 'null'; expected 'score' as in ")


def kill_once_there(arguments: list[str], folder: Path, signs: str, count: int) -> None:
    """Run a command and kill it by SIGKILL as soon as so many files of a pattern are there."""
    running = subprocess.Popen(
        [sys.executable, "-m", "dti_ray.cli", *arguments],
        start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 90
    while len(list(folder.glob(signs))) < count and time.monotonic() < deadline:
        assert running.poll() is None, running.stderr.read() if running.stderr else ""
        time.sleep(0.002)
    os.killpg(running.pid, signal.SIGKILL)
    running.communicate()
    assert len(list(folder.glob(signs))) >= count


def test_actor_that_dies_changes_nothing(log: Path, root: Path, whole: dict[str, bytes]) -> None:
    class Deadly(Storage):
        def write(self, path: str, content: bytes) -> Any:
            entry = super().write(path, content)
            if path.endswith("part-00002.parquet") and not self.exists("died"):
                super().write("died", b"once")
                os._exit(1)
            return entry

    done: Scores = score(config_for(log, root, *OVERRIDES), Deadly(str(root)))
    assert done.storage.exists("died")
    assert shards(root) == whole


def test_error_of_an_actor_comes_out_as_itself_and_the_next_job_goes_on(log: Path, root: Path) -> None:
    with pytest.raises(InputError, match=r"part-\d\.parquet row \d+: user .* has no history before the moment"):
        score(config_for(log, root, *OVERRIDES, "score.no_history=fail"), Storage(str(root)))
    assert open_scores(Storage(str(root)), "scores") is None
    with pytest.raises(InputError, match="was begun with something else"):
        score(config_for(log, root, *OVERRIDES), Storage(str(root)))


def test_empty_log_has_no_scores_and_is_complete(tmp_path: Path, root: Path) -> None:
    log = write_log(tmp_path / "log", {"user_id": pa.array([], pa.string()), "candidates": pa.array([], pa.string())})
    done = score(config_for(log, root), Storage(str(root)))
    assert (done.rows, done.pairs, done.files) == (0, 0, ())


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("train.run=other", "runs/other: is no run; expected one of ['run']"),
        ("score.input=/nowhere", "/nowhere: is missing; expected a file or a folder; set score.input"),
        ("score.columns.user=customer", "part-0.parquet: has no column 'customer' (score.columns.user)"),
        ("score.no_history=drop", "score.no_history: got 'drop'; expected 'score', 'null' or 'fail'"),
        ("score.model=/nowhere", "score.model=/nowhere: is no export that can score; `dti-ray export RUN --to FOLDER`"),
        ("score.dataset=other", "datasets/other: is no complete data set"),
    ],
)
def test_what_is_wrong_is_one_line_and_nothing_is_written(
    log: Path, root: Path, change: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["score", "train.run=run", f"score.input={log}", change, "--root", str(root)])
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if told in line] == lines[:1], lines
    assert not (root / "scores").exists()
    assert open_dataset(Storage(str(root)), "tiny")
