"""Work that a rank does beside its training: one thread, a short queue.

Stage: beside the loop. In: functions that read or write storage. Out: their results, later.
Invariant: jobs run one after the other, in the order given. Never more than `depth` wait for the one under way;
whoever gives one more waits.

    depth 1: save at step 50 runs, at step 100 waits, at step 150 blocks until 50 is stored
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")


class Background:
    """Runs jobs in a thread of its own.

    Args:
        depth: jobs that may wait.
    """

    def __init__(self, depth: int) -> None:
        self.places = threading.Semaphore(depth + 1)
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")

    def give(self, job: Callable[[], Result]) -> Future[Result]:
        """Hand a job over; wait for a place in the queue."""
        self.places.acquire()
        future = self.thread.submit(job)
        future.add_done_callback(lambda _: self.places.release())
        return future

    def give_small(self, job: Callable[[], Result]) -> Future[Result]:
        """Hand over a job that holds no memory worth counting; never wait."""
        return self.thread.submit(job)

    def close(self) -> None:
        """End the thread after the jobs that were given."""
        self.thread.shutdown()
