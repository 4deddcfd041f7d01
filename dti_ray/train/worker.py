"""A rank of a run: a Ray Train worker from its parts to the loop, and its link to the driver.

Stage: between launch and loop. In: `WorkerParts`. Out: its share of every step; remarks and failures on the board.
Invariant: however a rank ends, the board hears why, so that the first cause has a name.
"""

from __future__ import annotations

import logging
import socket
import threading
from contextlib import closing

import ray
import ray.train
from ray.actor import ActorProxy
from ray.train.torch import get_device

from dti_ray.data.interactions import open_dataset
from dti_ray.data.pipeline import AHEAD_STEPS, RowsAhead, TrainingRows
from dti_ray.data.plan import Position
from dti_ray.errors import RunError
from dti_ray.model.backbone import build_model
from dti_ray.storage import Storage
from dti_ray.telemetry import Line
from dti_ray.telemetry.logs import Context, in_worker, log_line
from dti_ray.train.board import ASK_S, Board, WorkerParts
from dti_ray.train.checkpoint import list_checkpoints
from dti_ray.train.engine import build_engine
from dti_ray.train.failures import Failure, describe
from dti_ray.train.host import settle, sigterm
from dti_ray.train.link import Link
from dti_ray.train.loop import Trainer, passes_per_step
from dti_ray.train.state import Progress
from dti_ray.train.watch import Watch
from dti_ray.train.world import World

TELL_S = 10.0

log = logging.getLogger(__name__)


def train_worker(parts: WorkerParts) -> None:
    """Gather the parts of a run, then train; tell how it ended."""
    device = get_device()
    cluster = parts.config.cluster
    settle(device, threads=max(1, int(cluster.cpus_per_worker)))
    world = World(device)
    # Rank 0 asks for all: a rank that was told otherwise than the rest would leave them waiting.
    attempt, is_over = world.gather(ray.get(parts.board.begin.remote()) if world.rank == 0 else None)[0]
    if is_over:
        return
    context = in_worker(parts.config.telemetry.log_format, parts.config.train.run, world.rank)
    limits = (cluster.collective_timeout_s, cluster.setup_timeout_s)
    link = WorkerLink(parts.board, world.rank, attempt, *limits, context)
    nodes = world.gather(f"{socket.gethostname()}/{ray.get_runtime_context().get_node_id()[:6]}")
    link.say(f"attempt {attempt}: {world.size} workers on {', '.join(dict.fromkeys(nodes))}")
    try:
        _train(parts, world, link)
    except RunError as error:  # known to all ranks alike: nobody waits for this one, and another try would not help
        link.fail(error)
    except BaseException as error:
        link.fail(error)
        raise
    finally:
        link.close()


def _train(parts: WorkerParts, world: World, link: WorkerLink) -> None:
    config, table, device = parts.config, ray.get(parts.table), world.device
    storage = Storage(config.storage.root)
    dataset = open_dataset(storage, config.data.name)
    rows = TrainingRows(dataset, table, config, through_ray=True)
    found = list_checkpoints(storage, f"runs/{config.train.run}")
    start = found[-1].progress.position if found else Position()
    # From here on rows are packed and fetched, while the model is built.
    with closing(RowsAhead(rows, world.rank, world.size, AHEAD_STEPS, start)) as ahead:
        engine = build_engine(build_model(config, table), config, passes_per_step(config, rows, world.size), device)
        world.limit_waits(config.cluster.collective_timeout_s)
        Trainer(config, storage, rows, engine, world, link.report, link).run(ahead.at)


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
        is_noticed = self.is_preempted or sigterm.is_set()
        self.is_preempted = False
        sigterm.clear()
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
