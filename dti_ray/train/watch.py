"""A thread that notices when its rank stands still.

Stage: beside the loop. In: heartbeats. Out: the stack at which the rank stands, once it has stood there too long; then
the end of the process, so that nobody waits for it any longer.
Invariant: a rank that waits for others in a collective is not the one that stands still: it is reported, and left to
the collective's own timeout.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections.abc import Callable

EXIT_STUCK = 75
CHECK_S = 1.0
COLLECTIVES = ("torch/distributed/", "deepspeed/comm/")


class Watch:
    """Watches the thread that made it, from its first beat on.

    Args:
        limit_s: longest time between two beats.
        on_stuck: called once with (stack, whether it stands in a collective).
        end: ends the process.
    """

    def __init__(
        self, limit_s: float, on_stuck: Callable[[str, bool], None], end: Callable[[int], object] = os._exit
    ) -> None:
        self.limit_s, self.on_stuck, self.end = limit_s, on_stuck, end
        self.watched = threading.get_ident()
        self.last: float | None = None
        self.is_told = False
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True, name="watch")
        self.thread.start()

    def beat(self) -> None:
        """Say that the watched thread is at work."""
        self.last, self.is_told = time.monotonic(), False

    def close(self) -> None:
        """Stop watching."""
        self.ended.set()

    def _run(self) -> None:
        while not self.ended.wait(min(CHECK_S, self.limit_s / 4)):
            idle_s = time.monotonic() - self.last if self.last is not None else 0.0
            if idle_s < self.limit_s:
                continue
            stack, is_waiting = stack_of(self.watched)
            if not self.is_told:
                self.is_told = True
                self.on_stuck(stack, is_waiting)
            if not is_waiting or idle_s > 2 * self.limit_s:
                self.end(EXIT_STUCK)
                return


def stack_of(thread: int) -> tuple[str, bool]:
    """Return where a thread stands, and whether it waits for other ranks there."""
    frame = sys._current_frames().get(thread)
    lines = traceback.format_stack(frame) if frame is not None else []
    return "".join(lines), any(path in line for line in lines for path in COLLECTIVES)
