from __future__ import annotations

import threading
import time

from dti_ray.train.watch import EXIT_STUCK, Watch, stack_of


def wait_until(is_so, seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not is_so() and time.monotonic() < deadline:
        time.sleep(0.01)


def test_rank_that_stands_still_is_told_with_its_stack_and_ended() -> None:
    told, ended = [], []
    watch = Watch(0.2, 60, lambda stack, is_waiting: told.append((stack, is_waiting)), ended.append)
    time.sleep(0.5)
    assert not told, "a model may take its time to load"
    watch.beat()
    wait_until(lambda: ended)
    watch.close()
    assert ended == [EXIT_STUCK]
    assert len(told) == 1
    assert "in wait_until" in told[0][0]
    assert not told[0][1]


def test_rank_that_is_never_set_up_is_ended_too() -> None:
    ended: list[int] = []
    watch = Watch(60, 0.2, lambda *_: None, ended.append)
    wait_until(lambda: ended)
    watch.close()
    assert ended == [EXIT_STUCK]


def test_rank_is_ended_even_if_nobody_can_be_told() -> None:
    ended: list[int] = []

    def tell(*_: object) -> None:
        raise TimeoutError("the board does not answer")

    watch = Watch(60, 0.2, tell, ended.append)
    wait_until(lambda: ended)
    watch.close()
    assert ended == [EXIT_STUCK]


def test_stacks_of_other_threads_are_told_before_its_own() -> None:
    told, ended, done = [], [], threading.Event()
    packing = threading.Thread(target=done.wait, name="packed tasks")
    packing.start()
    watch = Watch(60, 0.2, lambda stack, _: told.append(stack), ended.append)
    wait_until(lambda: ended)
    watch.close()
    done.set()
    packing.join()
    assert "thread packed tasks" in told[0]
    assert told[0].index("thread packed tasks") < told[0].index("in wait_until")
    assert "thread watch" not in told[0]


def test_rank_that_beats_is_left_alone() -> None:
    ended: list[int] = []
    watch = Watch(0.3, 60, lambda *_: None, ended.append)
    for _ in range(20):
        time.sleep(0.03)
        watch.beat()
    watch.close()
    assert ended == []


def test_thread_that_is_gone_has_no_stack() -> None:
    assert stack_of(-1) == ("", False)
