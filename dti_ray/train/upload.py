"""Work that a rank does beside its training: one thread, a short queue.

Stage: beside the loop. In: functions that read or write storage. Out: their results, later.
Invariant: jobs run one after the other, in the order given. Never more than `depth` wait for the one under way;
whoever gives one more waits. A job that storage refuses is tried again until its patience ends.

    depth 1: save at step 50 runs, at step 100 waits, at step 150 blocks until 50 is stored
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from dti_ray.errors import DamagedError, StorageError

Result = TypeVar("Result")
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 5.0

log = logging.getLogger(__name__)


class Background:
    """Runs jobs in a thread of its own.

    Args:
        depth: jobs that may wait.
        patience_s: how long a job is tried again while storage cannot be reached or written.
    """

    def __init__(self, depth: int, patience_s: float) -> None:
        self.patience_s = patience_s
        self.places = threading.Semaphore(depth + 1)
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")

    def give(self, job: Callable[[], Result]) -> Future[Result]:
        """Hand a job over; wait for a place in the queue."""
        self.places.acquire()
        future = self.thread.submit(patiently, job, self.patience_s)
        future.add_done_callback(lambda _: self.places.release())
        return future

    def give_small(self, job: Callable[[], Result]) -> Future[Result]:
        """Hand over a job that holds no memory worth counting; never wait."""
        return self.thread.submit(patiently, job, self.patience_s)

    def close(self) -> None:
        """End the thread after the jobs that were given."""
        self.thread.shutdown()


def patiently(job: Callable[[], Result], patience_s: float) -> Result:
    """Run a job, again and again while storage refuses, until the patience ends.

    Raises:
        StorageError: as the job raised it last; at once where trying again does not help.
    """
    deadline, pause = time.monotonic() + patience_s, FIRST_PAUSE_S
    while True:
        try:
            return job()
        except DamagedError:
            raise
        except StorageError as error:
            if time.monotonic() + pause > deadline:
                raise
            log.warning("storage: trying again in %.1f s: %s", pause, error)
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)
