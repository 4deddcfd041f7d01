"""Brings lines to a tracker in the background, and again after it was away.

Stage: beside training, in the process that launched it. In: lines. Out: calls of a `Tracker`, in a thread of its own.
Invariants: whoever adds a line never waits; a tracker that is away costs a warning, not the run; a tracker is told
each line once, in order, also over restarts: a line whose targets it has heard of already is a repetition.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from dti_ray.telemetry.sinks import LINES, Line

SEND_S = 2.0  # lines of so long travel together
LONGEST_PAUSE_S = 60.0
CLOSE_S = 60.0  # a server that does not answer is given up sooner, by the timeouts of its package

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """A line and when it was said (seconds since 1970)."""

    kind: str
    line: Line
    at_s: float


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told of a run, and finds it again by.

    Attributes:
        id: of this run and no other one of that name; the same for every command that goes on with it.
        name: `train.run`.
        group: `telemetry.group`.
        config: dotted key -> value.
        total_targets: a run that has seen so many is finished.
    """

    id: str
    name: str
    group: str | None
    config: Mapping[str, object]
    total_targets: int


class Tracker(Protocol):
    """A tracking server's view of one run; every method may take long, and raise.

    Attributes:
        told: targets of the last line that it was ever sent, by kind.
    """

    told: dict[str, float]

    def send(self, entries: Sequence[Entry]) -> None:
        """Take lines, oldest first."""
        ...

    def close(self, is_finished: bool) -> None:
        """Take note that the run has ended, or was ended before its last target."""
        ...


class Courier:
    """A sink that hands its lines to a tracker, and keeps them for as long as that cannot be reached.

    Args:
        name: of the tracker, for the log.
        connect: makes it; called again and again until it works.
        run: whose lines they are.
        earlier: lines of earlier commands, by kind, of which the tracker is sent those that it missed.
        pause_s: between two deliveries; after a failure twice as long, and so on.
    """

    def __init__(
        self,
        name: str,
        connect: Callable[[], Tracker],
        run: TrackedRun,
        earlier: Mapping[str, Sequence[Line]],
        pause_s: float = SEND_S,
    ) -> None:
        self.name, self.connect, self.run, self.pause_s = name, connect, run, pause_s
        self.tracker: Tracker | None = None
        self.is_warned = False
        self.added: queue.SimpleQueue[Entry] = queue.SimpleQueue()
        now = time.time()
        found = [Entry(kind, line, now) for kind in LINES for line in earlier.get(kind, ())]
        self.waiting = sorted(found, key=lambda entry: entry.line["step"])
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True, name=f"courier to {name}")
        self.thread.start()

    def add(self, kind: str, line: Line) -> None:
        """See `Sink`."""
        if kind in LINES:
            self.added.put(Entry(kind, dict(line), time.time()))

    def close(self) -> None:
        """Send what is left, for a while."""
        self.ended.set()
        self.thread.join(CLOSE_S)
        if self.thread.is_alive():
            log.warning("%s: still busy after %g s; %s", self.name, CLOSE_S, self._where())

    def _run(self) -> None:
        pause_s, is_last = 0.0, False
        while not is_last:
            is_last = self.ended.wait(pause_s)
            while not self.added.empty():
                self.waiting.append(self.added.get())
            try:
                self._send(is_last)
            except Exception as error:  # noqa: BLE001 - whatever a tracker's library raises, the run goes on
                pause_s = min(2 * max(pause_s, self.pause_s), LONGEST_PAUSE_S)
                self._warn(error, is_last)
            else:
                pause_s = self.pause_s

    def _send(self, is_last: bool) -> None:
        if self.tracker is None:
            self.tracker = self.connect()
        told, new = dict(self.tracker.told), []
        for entry in self.waiting:
            if entry.line["targets"] > told.get(entry.kind, -1.0):
                told[entry.kind] = entry.line["targets"]
                new.append(entry)
        if new:
            self.tracker.send(new)
            self.tracker.told.update(told)
        self.waiting.clear()
        if is_last:
            self.tracker.close(told.get("train", -1.0) >= self.run.total_targets)

    def _warn(self, error: Exception, is_last: bool) -> None:
        problem = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if not self.is_warned:
            self.is_warned = True
            log.warning("%s is tried again in the background: %s", self.name, problem)
        elif is_last:
            log.info("%s is given up: %s", self.name, problem)
        if is_last and self.waiting:
            log.info("%s: %d lines were not sent; %s", self.name, len(self.waiting), self._where())

    def _where(self) -> str:
        return f"all lines are in metrics/ of run {self.run.name}, and the same command sends what is missing"
