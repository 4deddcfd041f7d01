from __future__ import annotations

import threading
import time

import pytest

from dti_ray.train.upload import Background


def test_jobs_run_in_order_and_one_too_many_waits() -> None:
    background, go, order = Background(depth=1), threading.Event(), []
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


def test_failure_of_a_job_is_told_to_whoever_asks() -> None:
    background = Background(depth=1)
    future = background.give(lambda: 1 // 0)
    background.close()
    with pytest.raises(ZeroDivisionError):
        future.result()
