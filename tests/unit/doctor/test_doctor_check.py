"""A look ends in time or is left behind; whatever it raises is one failed check."""

from __future__ import annotations

import threading
import time

import pytest

from dti_ray.doctor.check import (
    Check,
    Look,
    Status,
    answer,
    check,
    check_all,
    is_anything_left_behind,
    passed,
    result,
    skipped,
    warned,
    worst,
)
from dti_ray.errors import ConfigError, Fault


def test_value_of_a_look_comes_back() -> None:
    assert result("one", Look(lambda: 3), 5) == 3
    assert answer("one", Look(lambda: (passed("one", "there"), 7)), 5) == (passed("one", "there"), 7)


def test_look_that_hangs_fails_in_time_and_is_known_to_be_left_behind() -> None:
    release = threading.Event()
    start = time.monotonic()
    found = check("slow", 0.2, lambda: passed("slow", str(release.wait(60))))
    assert time.monotonic() - start < 5
    assert (found.status, found.found) == (Status.FAIL, "no answer within 0.2 s")
    assert is_anything_left_behind()
    release.set()
    deadline = time.monotonic() + 10
    while is_anything_left_behind() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_anything_left_behind()


def test_fault_becomes_what_was_found_and_what_to_do() -> None:
    def refuse() -> Check:
        raise ConfigError(Fault("a.b", "got 1", "2", "write 2"), Fault("a.c", "is gone", hint="write 2"))

    found = check("thing", 5, refuse)
    assert found == Check("thing", Status.FAIL, "a.b: got 1; expected 2; a.c: is gone", "write 2")


class Panic(BaseException):
    """As tokenizers raises where its Rust code panics."""


@pytest.mark.parametrize("error", [ZeroDivisionError("by\n  zero"), Panic("by zero"), SystemExit("by zero")])
def test_whatever_a_check_raises_the_others_still_run(error: BaseException) -> None:
    def break_down() -> Check:
        raise error

    first, second = check_all(5, {"broken": break_down, "sound": lambda: passed("sound", "there")})
    assert (first.name, first.status) == ("broken", Status.FAIL)
    assert first.found == f"{type(error).__name__}: by zero"
    assert second.status is Status.PASS


def test_package_that_cannot_be_imported_is_named() -> None:
    def import_it() -> Check:
        import no_such_package_anywhere  # noqa: F401 # pyright: ignore[reportMissingImports]

        return passed("thing", "")

    found = check("thing", 5, import_it)
    assert "no_such_package_anywhere" in found.found
    assert found.status is Status.FAIL


def test_interrupting_is_not_swallowed() -> None:
    def interrupt() -> Check:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        check("thing", 5, interrupt)


def test_worst_check_is_told_first() -> None:
    good, odd, bad = passed("x", ""), warned("x", "", ""), Check("x", Status.FAIL, "")
    assert worst([good, odd, bad]) is bad
    assert worst([good, odd]) is odd
    assert worst([skipped("x", ""), good]) is good
