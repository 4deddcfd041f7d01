"""A storage root is tried as a run would use it, and nothing stays there."""

from __future__ import annotations

import math
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dti_ray.doctor.check import Check, Look, Status, result
from dti_ray.doctor.place import VERBS, Reach, check_clock, check_reach, folder_of, marker, reach, skew, with_endpoint
from dti_ray.storage import Storage


def test_folder_answers_and_agrees_on_the_time(tmp_path: Path) -> None:
    found = reach(str(tmp_path))
    assert tuple(found.ms) == VERBS
    assert all(taken >= 0 for taken in found.ms.values())
    assert found.skew_s == 0
    assert check_reach(str(tmp_path), found).status is Status.PASS
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("root", "folder"),
    [("/data/x", Path("/data/x")), ("file:///data/x", Path("/data/x")), ("s3://b/x", None), ("ftp://host/x", None)],
)
def test_folder_of_a_root(root: str, folder: Path | None) -> None:
    assert folder_of(root) == folder


def test_folders_that_were_not_there_are_gone_again(tmp_path: Path) -> None:
    reach(str(tmp_path / "new" / "root"))
    assert list(tmp_path.iterdir()) == []


def test_root_below_a_file_is_refused_in_words(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("content")
    found = result("storage", Look(lambda: reach(str(tmp_path / "file" / "root"))), 10)
    assert isinstance(found, Check)
    assert found.status is Status.FAIL
    assert "cannot be listed" in found.found or "cannot be written" in found.found


def test_folder_without_rights_is_refused_in_words(tmp_path: Path) -> None:
    found = result("storage", Look(lambda: reach("/proc/dti")), 10)  # where nobody may make a folder, root included
    assert isinstance(found, Check)
    assert "cannot be written" in found.found


def test_endpoint_that_nobody_listens_at_is_refused_soon_and_named() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{free.getsockname()[1]}"
    root = f"s3://bucket/x?endpoint_override={endpoint}"
    found = result("storage", Look(lambda: reach(root)), 30)
    assert isinstance(found, Check)
    assert found.status is Status.FAIL
    assert "Could not connect to server" in found.found
    assert f"the endpoint is {endpoint}" in with_endpoint(root, found, {}).advice


def test_endpoint_that_accepts_and_says_nothing_is_not_waited_for() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        root = f"s3://bucket/x?endpoint_override=http://127.0.0.1:{silent.getsockname()[1]}"
        found = result("storage", Look(lambda: reach(root)), 0.5)
    assert isinstance(found, Check)
    assert found.found == "no answer within 0.5 s"


def test_endpoint_is_told_for_s3_only() -> None:
    refusal = Check("storage", Status.FAIL, "no", "see")
    assert with_endpoint("/folder", refusal, {}) == refusal
    assert with_endpoint("s3://b", refusal, {"AWS_ENDPOINT_URL": "http://x"}).advice == "see; the endpoint is http://x"
    assert "AWS_ENDPOINT_URL is not set" in with_endpoint("s3://b", refusal, {}).advice


def test_slow_storage_is_a_warning_without_what_stands_behind_the_question_mark() -> None:
    found = check_reach("s3://b/x?endpoint_override=http://y", Reach(dict.fromkeys(VERBS, 1500.0), 0.0))
    assert found.status is Status.WARN
    assert found.found.startswith("s3://b/x: list 1500 ms, write 1500 ms")


@pytest.mark.parametrize(
    ("skew_s", "status", "words"),
    [
        (0.0, Status.PASS, "agrees with the storage's"),
        (-4.0, Status.PASS, "4 s ahead of the storage's"),
        (6.0, Status.WARN, "6 s behind the storage's"),
        (-901.0, Status.FAIL, "901 s ahead of the storage's: object stores refuse such requests"),
        (None, Status.WARN, "the storage does not say when a file was written"),
    ],
)
def test_clock_is_judged_by_how_far_it_is_off(skew_s: float | None, status: Status, words: str) -> None:
    assert (check_clock(skew_s).status, check_clock(skew_s).found) == (status, words)


@given(st.floats(0, 1e9), st.floats(0, 60), st.floats(0, 1), st.integers(-100_000, 100_000))
def test_skew_is_never_more_than_the_truth_and_less_by_a_second_and_the_writes_time_at_most(
    start: float, took: float, share: float, truth: int
) -> None:
    stamp = float(math.floor(start + share * took + truth))
    found = skew(start, start + took, stamp)
    assert abs(found) <= abs(truth) + 1e-3
    assert abs(found - truth) <= took + 1 + 1e-3


def test_marker_lies_there_while_others_look_for_it(tmp_path: Path) -> None:
    with marker(Storage(str(tmp_path / "root"))) as path:
        assert Path(path).is_file()
        assert Path(path).parent == tmp_path / "root"
    assert list(tmp_path.iterdir()) == []
