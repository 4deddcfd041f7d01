"""Which of several failures was the first cause, and whether another try can help.

Stage: beside the launch; free of Ray. In: what each rank told before it ended, in the order of arrival. Out: one
`DtiRayError` that names the first failing rank and its own traceback.
Invariant: a rank that only lost the others, or waited for them in vain, is never called the cause while another
one has a reason of its own.

    rank 0: "Connection closed by peer"      rank 1: ValueError, a moment later      the cause is rank 1's ValueError
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Sequence
from dataclasses import dataclass

from dti_ray.errors import ConfigError, DamagedError, DtiRayError, Fault, InputError, RunError

LOST = re.compile(
    r"Connection (closed|reset|refused)|Timed out|timed out|Broken pipe|gloo|NCCL|ncclError|no more peers|"
    r"Socket(Timeout|Close)|process group",
    re.IGNORECASE,
)
LOST_KINDS = ("DistBackendError", "DistNetworkError", "DistStoreError", "RayChannelError")
FINAL = (ConfigError, DamagedError, InputError, RunError)


@dataclass(frozen=True)
class Failure:
    """How one rank ended.

    Attributes:
        rank: of the worker.
        attempt: number of the worker group, from 1.
        step: optimizer steps done.
        kind: name of the exception.
        message: of the exception, one line.
        trace: its traceback.
        is_echo: it only lost the other ranks, or waited for them in vain.
        error: the exception itself where it is one of this package.
    """

    rank: int
    attempt: int
    step: int
    kind: str
    message: str
    trace: str
    is_echo: bool
    error: DtiRayError | None = None

    @property
    def is_final(self) -> bool:
        """Whether the same command would meet it again at once."""
        return isinstance(self.error, FINAL)


def describe(error: BaseException, rank: int, attempt: int, step: int) -> Failure:
    """Return a rank's failure as it travels."""
    own = _own(error)
    kind, message = type(own or error).__name__, " ".join(str(own or error).split())[:500]
    is_echo = own is None and (kind in LOST_KINDS or (isinstance(error, RuntimeError) and bool(LOST.search(message))))
    return Failure(rank, attempt, step, kind, message, "".join(traceback.format_exception(error)), is_echo, own)


def first_cause(failures: Sequence[Failure]) -> Failure | None:
    """Return the first failure of the last attempt that has a reason of its own, else its first one."""
    last = [one for one in failures if one.attempt == failures[-1].attempt] if failures else []
    return next((one for one in last if not one.is_echo), last[0] if last else None)


def is_over(failures: Sequence[Failure], attempt: int) -> bool:
    """Say whether an attempt that is about to start would only repeat what ended the ones before it.

    Args:
        failures: of all attempts, in the order of arrival.
        attempt: number of the one that would start.
    """
    causes = [first_cause([one for one in failures if one.attempt == number]) for number in (attempt - 1, attempt - 2)]
    last, before = causes
    if last is None:
        return False
    if last.is_final:
        return True
    return (
        before is not None
        and last.error is None
        and not last.is_echo
        and (last.kind, last.message, last.step) == (before.kind, before.message, before.step)
    )


def as_error(cause: Failure, trace_at: str) -> DtiRayError:
    """Return what the user is told of a cause.

    Args:
        cause: from `first_cause`.
        trace_at: where its traceback was written.
    """
    if cause.error is not None:
        return cause.error
    hint = f"traceback in {trace_at}; the same command goes on from what was saved"
    return RunError(Fault(f"rank {cause.rank}", f"{cause.kind}: {cause.message}", hint=hint))


def _own(error: BaseException | None) -> DtiRayError | None:
    """Return the exception of this package that another one was raised from, or wrapped by Ray."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        if type(error).__module__ == DtiRayError.__module__ and isinstance(error, DtiRayError):
            return error
        error = getattr(error, "cause", None) or error.__cause__
    return None
