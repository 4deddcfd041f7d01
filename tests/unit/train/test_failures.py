"""The first cause among what ranks tell, and when another try is pointless."""

from __future__ import annotations

import pickle

from dti_ray.errors import DamagedError, Fault, InputError, RunError, StorageError
from dti_ray.train.failures import Failure, as_error, describe, first_cause, is_over

LOST = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1234")


def failed(error: BaseException, rank: int = 0, attempt: int = 1, step: int = 7) -> Failure:
    try:
        raise error
    except BaseException as caught:  # noqa: BLE001 - it is what is tested
        return describe(caught, rank, attempt, step)


def test_rank_that_lost_the_others_is_not_the_cause_even_if_it_told_first() -> None:
    found = [failed(LOST, rank=0), failed(ValueError("no such item"), rank=1)]
    cause = first_cause(found)
    assert cause == found[1]
    assert "test_failures.py" in cause.trace
    text = str(as_error(cause, "runs/run/failure.txt"))
    assert text.startswith("rank 1: ValueError: no such item; traceback in runs/run/failure.txt")


def test_where_all_ranks_lost_the_others_the_first_to_tell_is_named() -> None:
    assert first_cause([failed(LOST, rank=1), failed(LOST, rank=0)]).rank == 1
    assert first_cause([]) is None


def test_errors_of_this_package_arrive_as_they_were() -> None:
    error = RunError(Fault("step 3", "its loss is not finite"))
    found = pickle.loads(pickle.dumps(failed(error)))
    assert type(as_error(found, "")) is RunError
    assert str(as_error(found, "")) == str(error)


def test_error_of_this_package_inside_another_one_is_found() -> None:
    try:
        raise RuntimeError("a task failed") from DamagedError(Fault("part-00000.parquet", "has hash 12"))
    except RuntimeError as caught:
        found = describe(caught, 0, 1, 7)
    assert found.kind == "DamagedError"
    assert found.is_final


def test_what_would_fail_again_is_not_tried_again() -> None:
    assert is_over([failed(InputError(Fault("a", "b")))], 2)
    assert is_over([failed(DamagedError(Fault("a", "b")))], 2)
    assert not is_over([], 1)
    assert not is_over([failed(StorageError(Fault("s3", "is away")))], 2)
    assert not is_over([failed(LOST), failed(LOST, attempt=2)], 3)


def test_same_failure_twice_without_a_step_between_is_final() -> None:
    first, second = failed(ValueError("x")), failed(ValueError("x"), attempt=2)
    assert not is_over([first], 2)
    assert is_over([first, second], 3)
    assert not is_over([first, failed(ValueError("x"), attempt=2, step=9)], 3), "it came further"
    assert not is_over([first, second], 4), "the attempt between died without a word"
