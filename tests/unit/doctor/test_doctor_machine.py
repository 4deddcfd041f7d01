"""A machine is asked in a process of its own, which answers in time or is ended."""

from __future__ import annotations

import os
import socket
import sys
import time
from pathlib import Path

import pytest

from dti_ray.doctor.machine import MACHINE, Question, ask, ask_as_task, ended_in_time, last_words


def test_machine_describes_itself(tmp_path: Path) -> None:
    machine = ask(Question(paths=(str(tmp_path), "/no/such/folder")), limit_s=60)
    assert machine.host == socket.gethostname()
    assert machine.versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"ray", "torch", "dti-ray"} <= machine.versions.keys()
    assert machine.cpus == os.cpu_count()
    assert machine.missing == ("/no/such/folder",)
    assert machine.root_trouble == ""
    assert machine.cuda is None, "nobody asked"
    assert 0 < machine.temp.free_bytes <= machine.temp.total_bytes


def test_root_that_cannot_be_written_from_a_machine_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("content")
    machine = ask(Question(root=str(tmp_path / "file" / "root")), limit_s=60)
    assert "cannot be written" in machine.root_trouble


def test_folder_of_rays_files_follows_the_environment(tmp_path: Path) -> None:
    machine = ask(Question(), limit_s=60, environment={**os.environ, "RAY_TMPDIR": str(tmp_path)})
    assert machine.ray.path == str(tmp_path / "ray")


def test_task_answers_as_text() -> None:
    assert MACHINE.validate_json(ask_as_task('{"paths": []}', 60)).host == socket.gethostname()


def test_process_that_hangs_is_ended() -> None:
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"no answer within 0\.5 s"):
        ended_in_time([sys.executable, "-c", "import time; time.sleep(60)"], 0.5, os.environ)
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("raise ValueError('a\\n b\\nc')", "ValueError: a b c"),
        ("import os; os._exit(7)", "ended with code 7"),
        ("import sys; sys.stderr.write('fatal: no memory\\n'); sys.exit(1)", "fatal: no memory"),
        ("pass", "ended with code 0"),
    ],
)
def test_last_words_of_a_process_are_kept(code: str, words: str) -> None:
    with pytest.raises(RuntimeError) as caught:
        ended_in_time([sys.executable, "-c", code], 30, os.environ)
    assert str(caught.value) == words


def test_last_words_are_those_of_the_last_exception_before_those_behind_it() -> None:
    first = "Traceback (most recent call last):\n  File x\nKeyError: 1\n\nDuring handling of the above exception:\n\n"
    second = (
        "Traceback (most recent call last):\n  File y\n    raise z\nRuntimeError: Version mismatch\n    Ray: 2.60\n"
    )
    assert last_words(f"warning\n{first}{second}") == "RuntimeError: Version mismatch Ray: 2.60; KeyError: 1"
    assert last_words("") == ""


def test_frames_within_a_message_are_left_out() -> None:
    inner = "Traceback (most recent call last):\n  File z, line 3\n    x = f(\nray.AuthenticationError: wrong token"
    log = f"Traceback (most recent call last):\n  File x\nRuntimeError: cannot connect: {inner}\n"
    assert last_words(log) == "RuntimeError: cannot connect: ray.AuthenticationError: wrong token"
