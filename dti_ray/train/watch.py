"""A thread that notices when its rank stands still.

Stage: beside the loop. In: heartbeats. Out: the stack at which the rank stands, once it has stood there too long; then
the end of the process, so that nobody waits for it any longer.
Invariant: a rank that waits for others in a collective is not the one that stands still: it is reported, and left to
the collective's own timeout.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable

log = logging.getLogger(__name__)
EXIT_STUCK = 75
CHECK_S = 1.0
INNERMOST = 8  # calls of a thread beside the watched one
COLLECTIVES = ("torch/distributed/", "deepspeed/comm/")


class Watch:
    """Watches the thread that made it.

    Args:
        limit_s: longest time between two beats.
        setup_s: longest time before the first one: a large model may take its time to load.
        on_stuck: called once with (stacks of all threads, the watched one's last; whether it stands in a collective).
        end: ends the process.
    """

    def __init__(
        self,
        limit_s: float,
        setup_s: float,
        on_stuck: Callable[[str, bool], None],
        end: Callable[[int], object] = os._exit,
    ) -> None:
        self.limit_s, self.setup_s, self.on_stuck, self.end = limit_s, setup_s, on_stuck, end
        self.watched = threading.get_ident()
        self.last, self.is_set_up, self.is_told = time.monotonic(), False, False
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True, name="watch")
        self.thread.start()

    def beat(self) -> None:
        """Say that the watched thread is at work."""
        self.last, self.is_set_up, self.is_told = time.monotonic(), True, False

    @property
    def allowed_s(self) -> float:
        """Longest time until the next beat."""
        return self.limit_s if self.is_set_up else self.setup_s

    def close(self) -> None:
        """Stop watching."""
        self.ended.set()

    def _run(self) -> None:
        while not self.ended.wait(min(CHECK_S, self.limit_s / 4, self.setup_s / 4)):
            idle_s = time.monotonic() - self.last
            if idle_s < self.allowed_s:
                continue
            stack, is_waiting = stack_of(self.watched)
            if not self.is_told:
                self.is_told = True
                self._tell(stacks_beside(self.watched) + stack, is_waiting)
            if not is_waiting or idle_s > 2 * self.allowed_s:
                self.end(EXIT_STUCK)
                return

    def _tell(self, stack: str, is_waiting: bool) -> None:
        try:
            self.on_stuck(stack, is_waiting)
        except Exception:  # whoever was to be told may be what this rank waits for; it must end all the same
            log.exception("could not tell where this rank stands:\n%s", stack)


def stacks_beside(thread: int) -> str:
    """Return the innermost calls of the other threads: what the thread waits for may be one of them."""
    names = {one.ident: one.name for one in threading.enumerate()}
    others = (item for item in sys._current_frames().items() if item[0] not in (thread, threading.get_ident()))
    return "".join(
        f"thread {names.get(ident, '?')}\n{''.join(traceback.format_stack(frame, -INNERMOST))}"
        for ident, frame in others
    )


def stack_of(thread: int) -> tuple[str, bool]:
    """Return where a thread stands, and whether it waits for other ranks there."""
    frame = sys._current_frames().get(thread)
    lines = traceback.format_stack(frame) if frame is not None else []
    return "".join(lines), any(path in line for line in lines for path in COLLECTIVES)
