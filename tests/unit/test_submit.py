"""What is sent to a cluster, under which id, and how its log is read."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st

from dti_ray.cli import app
from dti_ray.cli.jobs import FILE, _last_result, plan_job
from dti_ray.config import load_config
from dti_ray.errors import ConfigError
from dti_ray.submit import Job, _Log, next_id

ROOT = "--root=/shared/dti"


def planned(kind: str, *arguments: str) -> Job:
    command = typer.main.get_command(app)
    parent = typer.Context(command)
    return plan_job(typer.Context(command.commands["submit"], parent=parent), kind, arguments, carries_code=True)


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "a.yaml"
    path.write_text(text)
    return path


def test_first_attempt_has_the_name_itself_and_the_next_ones_are_counted() -> None:
    assert next_id("train.demo", []) == "train.demo"
    assert next_id("train.demo", ["train.demo"]) == "train.demo~2"
    assert next_id("train.demo", ["train.demo~9", "train.demo"]) == "train.demo~10"


def test_job_is_named_after_what_it_writes() -> None:
    assert planned("prepare", ROOT, "data.name=log").name == "prepare.log"
    assert planned("train", ROOT, "train.run=first").name == "train.first"
    assert planned("evaluate", ROOT, "first", "--split", "valid").name == "evaluate.first"
    assert planned("tune", ROOT, "tune.sweep=wide").name == "tune.wide"
    assert planned("score", ROOT, "first", "score.name=daily").name == "score.daily"


def test_files_travel_as_one_and_overrides_and_options_as_they_are(tmp_path: Path) -> None:
    file = written(tmp_path, "packing: {k: 7}\n")
    job = planned("evaluate", "-c", str(file), ROOT, "first", "eval.n=9", "--split", "valid")
    assert shlex.split(job.command) == [
        "exec", "python", "-m", "jobs.evaluate", "-c", FILE, "--split", "valid", "--json",
        "first", "eval.n=9", "cluster.address=null",
    ]  # fmt: skip
    sent = load_config([written(tmp_path, job.files[FILE])], [])
    assert (sent.packing.k, sent.storage.root) == (7, "/shared/dti")


def test_what_changes_the_work_changes_the_content() -> None:
    one = planned("train", ROOT, "optim.lr=1e-3")
    assert one.content == planned("train", ROOT, "optim.lr=1e-3").content
    assert one.content != planned("train", ROOT, "optim.lr=2e-3").content
    assert one.content != planned("train", "--root=/other", "optim.lr=1e-3").content


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["packing.kk=3", ROOT], "packing.kk: unknown key; did you mean packing.k?"),
        ([], "storage.root: got 'outputs', which is relative to this folder"),
        ([ROOT, "data.path=logs"], "data.path: got 'logs'"),
        ([ROOT, "score.input=asked"], "score.input: got 'asked'"),
    ],
)
def test_job_that_cannot_work_there_is_refused_here(arguments: list[str], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        planned("train", *arguments)
    assert told in str(caught.value)


@given(st.text(min_size=1), st.lists(st.integers(0, 50)), st.data())
def test_log_that_is_told_again_and_again_is_written_once(text: str, breaks: list[int], data: st.DataObject) -> None:
    taken: list[str] = []
    client: Any = None  # it is not asked: pieces are given by hand
    log = _Log(client, "train.demo", taken.append)
    for end in [*sorted(min(one, len(text)) for one in breaks), len(text)]:
        start = data.draw(st.integers(0, log.written))
        log.take(text[start : max(end, start)], start)
    assert "".join(taken) == text


def test_last_line_for_a_machine_is_found_behind_other_words() -> None:
    assert _last_result('started\n{"auc": 0.5}\n{broken\nbye\n') == {"auc": 0.5}
    assert _last_result("started\n") is None
