"""What a driver and its workers tell each other through Ray.

Stage: between launch and loop. In: lines of metrics, remarks and failures of workers; a stop that the driver wants.
Out: all of it at the driver, in the order of arrival.
Invariant: the board outlives the workers, so a new group of them knows why the last one ended. It does without torch:
its process is there a second after it was asked for.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import ray
from ray.actor import ActorProxy

from dti_ray.telemetry import Line
from dti_ray.telemetry.series import RUN
from dti_ray.train.failures import Failure, is_over

if TYPE_CHECKING:
    from dti_ray.config import RunConfig
    from dti_ray.data.prompts import TokenTable

OnLine = Callable[[str, Line], bool | None]
OnText = Callable[[str], None]

ASK_S = 0.5


class Board:
    """A Ray actor: workers put things on it, the driver takes them off."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, Line]] = []
        self.texts: list[str] = []
        self.failures: list[Failure] = []
        self.attempt = 0
        self.stop = False

    @ray.method
    def put(self, kind: str, line: Line) -> None:
        """Add one line."""
        self.lines.append((kind, line))

    @ray.method
    def say(self, text: str) -> None:
        """Add one remark."""
        self.texts.append(text)

    @ray.method
    def take(self) -> tuple[list[str], list[tuple[str, Line]]]:
        """Return all remarks and lines since the last call."""
        taken = self.texts, self.lines
        self.texts, self.lines = [], []
        return taken

    @ray.method
    def begin(self) -> tuple[int, bool]:
        """Start a group of workers; return the attempt's number, and whether there is nothing left to do for it."""
        self.attempt += 1
        self.lines.append((RUN, {"restarts": self.attempt - 1}))
        return self.attempt, self.stop or is_over(self.failures, self.attempt)

    @ray.method
    def fail(self, failure: Failure) -> None:
        """Remember how a worker ended."""
        self.failures.append(failure)
        self.texts.append(f"attempt {failure.attempt}: rank {failure.rank} failed: {failure.message}")

    @ray.method
    def all_failures(self) -> list[Failure]:
        """Return how workers ended, in the order in which they told."""
        return self.failures

    @ray.method
    def want_stop(self) -> None:
        """Have the run saved and ended."""
        self.stop = True

    @ray.method
    def is_stop_wanted(self) -> bool:
        """Say whether the run is to end."""
        return self.stop


@dataclass(frozen=True)
class WorkerParts:
    """What the driver hands to every worker, as it travels."""

    config: RunConfig
    table: ray.ObjectRef[TokenTable]
    board: ActorProxy[Board]


class Relay:
    """Hands what is on the board to the driver's callbacks while the block runs, and the rest when it ends.

    SIGTERM to the driver, meanwhile, or `on_line` that returns True, asks the workers to save and end.
    """

    def __init__(self, board: ActorProxy[Board], on_line: OnLine, on_text: OnText) -> None:
        self.board, self.on_line, self.on_text = board, on_line, on_text
        self.ended, self.is_terminated, self.is_passed_on = threading.Event(), threading.Event(), False
        self.error: Exception | None = None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.is_main = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> Relay:
        if self.is_main:
            self.before = signal.signal(signal.SIGTERM, lambda *_: self.is_terminated.set())
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()
        if self.is_main:
            signal.signal(signal.SIGTERM, self.before)
        if self.error is not None:
            raise self.error
        self._take()

    def _run(self) -> None:
        while not self.ended.wait(ASK_S):
            if self.is_terminated.is_set() and not self.is_passed_on:
                self.is_passed_on = True
                self.on_text("SIGTERM: saving the state, then the run ends")
                self.board.want_stop.remote()
            try:
                self._take()
            except Exception as error:  # noqa: BLE001 - raised where the block ends; the run must not go on unheard
                self.error = error
                self.board.want_stop.remote()
                return

    def _take(self) -> None:
        texts, lines = ray.get(self.board.take.remote())
        for text in texts:
            self.on_text(text)
        for kind, line in lines:
            if self.on_line(kind, line):
                self.board.want_stop.remote()
