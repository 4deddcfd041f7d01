"""Every exception that a user may meet, on one page.

Stage: below all. In: facts about a fault. Out: an exception with one line per fault.
Invariant: each exception pickles (it may cross a Ray boundary), knows its exit code, and its
message says what, where, got, expected, and what to do.
"""

from __future__ import annotations

from dataclasses import dataclass

EXIT_BAD_INPUT = 2
EXIT_RUN_FAILED = 3


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong.

    Attributes:
        where: dotted configuration path, file, column, row or rank.
        problem: what was found there.
        expected: what would be right, or an empty string where `problem` says it all.
        hint: what to do about it, or an empty string.
    """

    where: str
    problem: str
    expected: str = ""
    hint: str = ""

    def __str__(self) -> str:
        parts = [f"{self.where}: {self.problem}"]
        if self.expected:
            parts.append(f"expected {self.expected}")
        if self.hint:
            parts.append(self.hint)
        return "; ".join(parts)


class DtiRayError(Exception):
    """Base of all errors of this package; holds the faults and the exit code."""

    exit_code = EXIT_RUN_FAILED

    def __init__(self, *faults: Fault) -> None:
        super().__init__(*faults)
        self.faults = faults

    def __str__(self) -> str:
        return "\n".join(str(fault) for fault in self.faults)


class ConfigError(DtiRayError):
    """The configuration is not usable; nothing was started."""

    exit_code = EXIT_BAD_INPUT


class InputError(DtiRayError):
    """The data, a run name or a path is not usable; nothing was changed."""

    exit_code = EXIT_BAD_INPUT


class StorageError(DtiRayError):
    """The storage root cannot be reached, read or written.

    Attributes:
        is_final: it was tried again for a while already; whoever catches it need not.
    """

    exit_code = EXIT_BAD_INPUT
    is_final = False


class DamagedError(StorageError):
    """What lies on storage is missing, or is not what was written there; trying again does not help."""


class IncompleteError(DtiRayError):
    """What was written or scored is not what was asked for (rows in differ from rows out)."""


class RunError(DtiRayError):
    """The run failed after it had started; its state is kept."""


class StoppedError(DtiRayError):
    """The run was asked to end before its time; its state is kept."""
