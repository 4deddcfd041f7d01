"""What a driver and its workers tell each other through Ray.

Stage: between launch and loop. In: lines of metrics, remarks and failures of workers; a stop that the driver wants.
Out: all of it at the driver, in the order of arrival; a `Link` for each worker.
Invariant: the board outlives the workers, so a new group of them knows why the last one ended.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable
from types import FrameType

import ray
import ray.train
from ray.actor import ActorProxy
from ray.train.torch import TorchConfig

from dti_ray.telemetry import Line
from dti_ray.telemetry.logs import Context, log_line
from dti_ray.telemetry.series import RUN
from dti_ray.train.failures import Failure, describe, is_over
from dti_ray.train.link import Link
from dti_ray.train.state import Progress
from dti_ray.train.watch import Watch

OnLine = Callable[[str, Line], bool | None]
OnText = Callable[[str], None]

ASK_S = 0.5
TELL_S = 10.0

log = logging.getLogger(__name__)
_sigterm = threading.Event()  # set in a worker's main thread, read by its loop


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


class WorkerLink(Link):
    """A Ray Train worker's link to the board; made in the thread that trains.

    Args:
        board: of the run.
        rank: of this worker.
        attempt: number of the worker group.
        limit_s: `cluster.collective_timeout_s`.
        setup_s: `cluster.setup_timeout_s`.
        context: of this process's log records.
    """

    def __init__(
        self, board: ActorProxy[Board], rank: int, attempt: int, limit_s: float, setup_s: float, context: Context
    ) -> None:
        self.board, self.rank, self.attempt, self.context = board, rank, attempt, context
        self.step = 0
        self.stop, self.ended = threading.Event(), threading.Event()
        self.preempted: object = None
        self.is_preempted = False
        self.watch = Watch(limit_s, setup_s, self._stuck)
        threading.Thread(target=self._ask, daemon=True, name="stop wanted?").start()

    def report(self, kind: str, line: Line, progress: Progress) -> None:
        """Take a line of metrics to the driver; every rank must call it at the same lines."""
        self.step = progress.step
        if self.rank == 0:
            self.board.put.remote(kind, line)
            log_line(log, kind, line)
        if kind == "valid":
            ray.train.report({**line, "tokens": progress.tokens})
        else:
            info = ray.train.get_preemption_info()
            self.is_preempted = self.is_preempted or (info is not None and info != self.preempted)
            self.preempted = info

    def say(self, text: str) -> None:
        """See `Link`."""
        log.info("%s", text)
        if self.rank == 0:
            self.board.say.remote(text)

    def beat(self) -> None:
        """See `Link`."""
        self.watch.beat()

    def reach(self, step: int) -> None:
        """See `Link`."""
        self.context.step = step

    def is_stop_wanted(self) -> bool:
        """See `Link`."""
        return self.stop.is_set()

    def take_notice(self) -> bool:
        """See `Link`: SIGTERM to this process, or a node of the run that is being drained."""
        is_noticed = self.is_preempted or _sigterm.is_set()
        self.is_preempted = False
        _sigterm.clear()
        return is_noticed

    def fail(self, error: BaseException) -> None:
        """Tell how this rank ended."""
        self._tell(describe(error, self.rank, self.attempt, self.step))

    def close(self) -> None:
        """End the threads."""
        self.watch.close()
        self.ended.set()

    def _ask(self) -> None:
        while not self.ended.wait(ASK_S):
            if self.rank == 0 and ray.get(self.board.is_stop_wanted.remote()):
                self.stop.set()
                return

    def _stuck(self, stack: str, is_waiting: bool) -> None:
        where = stack.strip().splitlines()
        setting = "collective_timeout_s" if self.watch.is_set_up else "setup_timeout_s"
        message = f"no progress for {self.watch.allowed_s:g} s (cluster.{setting}); it stands at " + " ".join(
            line.strip() for line in where[-2:]
        )
        self._tell(Failure(self.rank, self.attempt, self.step, "Stuck", message, stack, is_waiting))

    def _tell(self, failure: Failure) -> None:
        ray.get(self.board.fail.remote(failure), timeout=TELL_S)


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


class _ListeningBackend(TorchConfig().backend_cls):
    """Sets up torch's process group, and hears SIGTERM, which only a process's main thread can."""

    def on_start(self, worker_group, backend_config) -> None:
        """Set up the workers before they train."""
        super().on_start(worker_group, backend_config)
        worker_group.execute(hear_sigterm)


class ListeningTorchConfig(TorchConfig):
    """Torch under Ray Train, with workers that take SIGTERM as notice."""

    @property
    def backend_cls(self) -> type[_ListeningBackend]:
        """What sets the workers up."""
        return _ListeningBackend


def hear_sigterm() -> None:
    """Take the first SIGTERM as notice that this machine will go away, and leave the next one to Ray."""
    before = signal.getsignal(signal.SIGTERM)

    def notice(_number: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, before)
        _sigterm.set()

    signal.signal(signal.SIGTERM, notice)
