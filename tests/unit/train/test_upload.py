from __future__ import annotations

import threading
import time

import pytest

from dti_ray.errors import DamagedError, Fault, StorageError
from dti_ray.train.upload import Background, patiently


def test_jobs_run_in_order_and_one_too_many_waits() -> None:
    background, go, order = Background(depth=1, patience_s=1), threading.Event(), []
    first = background.give(lambda: (go.wait(), order.append(1)))
    second = background.give(lambda: order.append(2))
    waiting = threading.Thread(target=lambda: background.give(lambda: order.append(3)))
    waiting.start()
    time.sleep(0.1)
    assert waiting.is_alive(), "no place is left"
    background.give_small(lambda: order.append(4))
    go.set()
    waiting.join(5)
    assert not waiting.is_alive()
    background.close()
    assert first.done()
    assert second.done()
    assert sorted(order) == [1, 2, 3, 4]
    assert order[:2] == [1, 2]


def test_storage_that_comes_back_is_waited_for() -> None:
    tries = []

    def job() -> str:
        tries.append(1)
        if len(tries) < 2:
            raise StorageError(Fault("s3://bucket", "cannot be written"))
        return "done"

    assert patiently(job, 10) == "done"


def test_patience_ends_and_damage_is_not_waited_for() -> None:
    def refuse() -> None:
        raise StorageError(Fault("s3://bucket", "cannot be written"))

    with pytest.raises(StorageError, match="cannot be written"):
        patiently(refuse, 0.1)

    def damaged() -> None:
        raise DamagedError(Fault("s3://bucket/file", "has hash 12"))

    started = time.monotonic()
    with pytest.raises(DamagedError):
        patiently(damaged, 60)
    assert time.monotonic() - started < 1


def test_failure_of_a_job_is_told_to_whoever_asks() -> None:
    background = Background(depth=1, patience_s=0.1)
    future = background.give(lambda: 1 // 0)
    background.close()
    with pytest.raises(ZeroDivisionError):
        future.result()
