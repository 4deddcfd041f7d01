"""One thing that was looked at, and the rule that nothing may hang or end the looking.

Stage: below all checks. In: functions that look at something. Out: `Check`s: what was found, and what to do about it.
Invariant: a look ends in time, or is left behind in a thread of its own; whatever it raises becomes a `Check` that
failed, and the others go on.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Generic, TypeVar

from dti_ray.errors import DtiRayError

THREAD = "doctor"
LONGEST_TEXT = 400  # characters of what a library says of its error

T = TypeVar("T")


class Status(StrEnum):
    """How a check ended."""

    PASS = "pass"  # noqa: S105 - no password
    WARN = "warn"
    FAIL = "fail"
    SKIP = "skip"


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: of the thing, the same in every run.
        status: skip where it could not be looked at, or need not.
        found: what is there; for a skip, why nobody looked.
        advice: what to do; empty where nothing is to do.
    """

    name: str
    status: Status
    found: str
    advice: str = ""


@dataclass(frozen=True)
class Group:
    """Checks of one place, such as storage."""

    title: str
    checks: tuple[Check, ...]


def passed(name: str, found: str) -> Check:
    """Return a check without a complaint."""
    return Check(name, Status.PASS, found)


def warned(name: str, found: str, advice: str) -> Check:
    """Return a check of something that works, yet badly."""
    return Check(name, Status.WARN, found, advice)


def failed(name: str, found: str, advice: str) -> Check:
    """Return a check of something that will not work."""
    return Check(name, Status.FAIL, found, advice)


def skipped(name: str, reason: str) -> Check:
    """Return a check that was not made."""
    return Check(name, Status.SKIP, reason)


def refused(name: str, error: DtiRayError) -> Check:
    """Return the check that an expected error stands for: its faults, and what they say to do."""
    found = "; ".join(
        f"{fault.where}: {fault.problem}{f'; expected {fault.expected}' if fault.expected else ''}"
        for fault in error.faults
    )
    hints = dict.fromkeys(fault.hint.rstrip(":") for fault in error.faults if fault.hint)
    return failed(name, found, "; ".join(hints))


def worst(checks: Sequence[Check]) -> Check:
    """Return the first failed check, else the first with a warning, else the first."""
    order = (Status.FAIL, Status.WARN, Status.PASS, Status.SKIP)
    return min(checks, key=lambda check: order.index(check.status))


class Look(Generic[T]):
    """Runs a function in a thread that may be left behind.

    Args:
        function: what to run.
    """

    def __init__(self, function: Callable[[], T]) -> None:
        self.function = function
        self.values: list[T] = []
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, name=THREAD, daemon=True)
        self.thread.start()

    def wait(self, limit_s: float) -> T:
        """Return the function's value, or raise its error.

        Raises:
            TimeoutError: it is still running after so many seconds.
        """
        self.thread.join(limit_s)
        if self.thread.is_alive():
            raise TimeoutError(f"no answer within {limit_s:g} s")
        if self.error is not None:
            raise self.error
        return self.values[0]

    def _run(self) -> None:
        try:
            self.values.append(self.function())
        except BaseException as error:  # noqa: BLE001 - raised again by `wait`; a panic in Rust is no Exception
            self.error = error


def result(name: str, look: Look[T], limit_s: float) -> T | Check:
    """Wait for a look; whatever goes wrong with it becomes a check that failed.

    Args:
        name: of that check.
        look: what is waited for.
        limit_s: for so long; then it is left behind.
    """
    try:
        return look.wait(limit_s)
    except DtiRayError as error:
        return refused(name, error)
    except TimeoutError as error:
        return failed(name, one_line(error), "see whether what it waits for answers, then try again")
    except ImportError as error:
        return failed(name, one_line(error), "install what is missing; see `packages`")
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001 - one broken check must not hide what the others would find
        return failed(name, f"{type(error).__name__}: {one_line(error)}", "nobody foresaw this: please report it")


def answer(name: str, look: Look[tuple[Check, T]], limit_s: float) -> tuple[Check, T | None]:
    """Wait for a look that brings a check, and what later checks want to know: None where it ended badly."""
    found = result(name, look, limit_s)
    return (found, None) if isinstance(found, Check) else found


def check(name: str, limit_s: float, function: Callable[[], Check]) -> Check:
    """Run a check that nothing may hang on; see `result`."""
    return result(name, Look(function), limit_s)


def check_all(limit_s: float, functions: Mapping[str, Callable[[], Check]]) -> list[Check]:
    """Run checks one after the other; see `check`.

    Args:
        limit_s: of each of them.
        functions: by the name that a check gets if it fails to answer.
    """
    return [check(name, limit_s, function) for name, function in functions.items()]


def is_anything_left_behind() -> bool:
    """Say whether a look still runs in its thread."""
    return any(thread.name == THREAD for thread in threading.enumerate())


def one_line(error: BaseException) -> str:
    """Return what an error says, on one line that is not too long."""
    return " ".join(str(error).split())[:LONGEST_TEXT]


def size(count_bytes: float) -> str:
    """Return a number of bytes as a person reads it."""
    return f"{count_bytes / 1e9:,.1f} GB" if count_bytes >= 1e8 else f"{count_bytes / 1e6:,.1f} MB"
