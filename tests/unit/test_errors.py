"""Exceptions: each pickles with its faults and its exit code, and says all of them, one line each."""

from __future__ import annotations

import pickle

import pytest

from dti_ray import errors
from dti_ray.errors import EXIT_BAD_INPUT, EXIT_RUN_FAILED, DtiRayError, Fault

EVERY_ERROR = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, Exception)]
FAULTS = (Fault("optim.lr", "got -1", "above 0", "lower it"), Fault("rank 3", "died"))


@pytest.mark.parametrize("kind", EVERY_ERROR)
@pytest.mark.parametrize("faults", [(), FAULTS[:1], FAULTS])
def test_every_error_pickles_with_faults_message_and_exit_code(
    kind: type[DtiRayError], faults: tuple[Fault, ...]
) -> None:
    error = kind(*faults)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert copy.faults == faults
    assert str(copy) == str(error) == "\n".join(map(str, faults))
    assert copy.exit_code == error.exit_code


def test_there_is_one_base_and_two_exit_codes() -> None:
    assert all(issubclass(kind, DtiRayError) for kind in EVERY_ERROR)
    codes = {kind.__name__: kind.exit_code for kind in EVERY_ERROR}
    assert codes == {
        "DtiRayError": EXIT_RUN_FAILED,
        "ConfigError": EXIT_BAD_INPUT,
        "InputError": EXIT_BAD_INPUT,
        "StorageError": EXIT_BAD_INPUT,
        "DamagedError": EXIT_BAD_INPUT,
        "IncompleteError": EXIT_RUN_FAILED,
        "RunError": EXIT_RUN_FAILED,
        "StoppedError": EXIT_RUN_FAILED,
    }


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        (Fault("a", "b"), "a: b"),
        (Fault("a", "b", "c"), "a: b; expected c"),
        (Fault("a", "b", hint="d"), "a: b; d"),
        (Fault("a", "b", "c", "d"), "a: b; expected c; d"),
    ],
)
def test_fault_is_one_line(fault: Fault, line: str) -> None:
    assert str(fault) == line
