"""The stream of rows that one training rank reads, packed by Ray Data beside the trainers.

Stage: pipeline. In: the plans of a run's epochs and the rank's share of the streams. Out: for each optimizer step the
rows of that rank's streams, in a fixed order, from any position to the end of the run.
Invariant: the rows depend on (data set, seed, epoch, stream) alone. Ray Data packs tasks ahead, in parallel and with
back-pressure, in the very order in which `local_rows` packs them one by one; epochs follow each other without a pause.

    streams 0 and 1, tasks of 3 + 1 and 2 + 2 rows    packed in the order of their first row: 0a 1a 1b 0b
    step 0 takes the first row of either stream, step 1 the second ...
"""

from __future__ import annotations

import pickle
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import groupby, islice, pairwise
from operator import itemgetter
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np
import pyarrow as pa

from dti_ray.config import RunConfig
from dti_ray.data.ahead import Ahead
from dti_ray.data.interactions import TRAIN, Dataset, UserSequences, read_segment
from dti_ray.data.mixture import mean_targets
from dti_ray.data.packing import PackedRow, PackSpec, pack, pack_spec
from dti_ray.data.plan import EpochPlan, PackTask, Position, count_busy, count_steps, plan_epoch
from dti_ray.data.prompts import TokenTable
from dti_ray.errors import DtiRayError

if TYPE_CHECKING:
    from ray import ObjectRef

WINDOW_TASKS = 32  # of one Ray Data pipeline

ROW_SCHEMA = pa.schema(
    [
        *((name, pa.int32()) for name in ("epoch", "stream", "share")),
        *((name, pa.list_(pa.int32())) for name in ("tokens", "positions", "prompt", "interaction", "cut", "after")),
        ("labels", pa.list_(pa.int8())),
        ("users", pa.list_(pa.int64())),
        ("prefix_tokens", pa.int32()),
    ]
)
AHEAD_STEPS = 8  # of rows that wait for the loop
EMPTY_ROW = PackedRow(
    *(np.zeros(0, dtype=np.int32) for _ in range(6)), labels=np.zeros(0, np.int8), users=np.zeros(0, np.int64)
)
ARRAYS = ("tokens", "positions", "prompt", "interaction", "cut", "after", "labels", "users")
StepRows = list[PackedRow]


class Place(NamedTuple):
    """What a packed row fills: a planned row of a stream, its share; several rows fill one where capacity forces it."""

    epoch: int
    stream: int
    share: int


Packed = tuple[Place, PackedRow]


@dataclass(frozen=True)
class TrainingRows:
    """The rows of a whole run, for any rank of any world.

    Attributes:
        dataset: what was prepared.
        table: item texts as tokens.
        config: of the run.
        through_ray: pack in Ray Data tasks, or here and now.
    """

    dataset: Dataset
    table: TokenTable
    config: RunConfig
    through_ray: bool

    @cached_property
    def targets_per_epoch(self) -> int:
        """Training targets of one pass; users' first `min_context` interactions are none."""
        if self.config.packing.min_context == 0:
            return self.dataset.targets[TRAIN]
        users = (read_segment(self.dataset, segment) for segment in self.dataset.segments)
        return sum(_targets_after(some, self.config.packing.min_context) for some in users)

    @property
    def total_targets(self) -> int:
        """Training targets of the whole run."""
        return self.targets_per_epoch * self.config.optim.epochs

    @cached_property
    def rows_per_step(self) -> int:
        """Rows that one stream contributes to a step, so that its share of the targets fits their capacity."""
        optim = self.config.optim
        share = optim.targets_per_step / self.config.packing.streams
        densest = self.spec.sliding() if optim.sliding_tail else self.spec
        return max(1, round(share * tokens_per_target(densest, self.table) / (0.8 * densest.row_tokens) + 0.5))

    @property
    def spec(self) -> PackSpec:
        """The layout of training, a mixture of k included."""
        packing = self.config.packing
        return pack_spec(packing, self.config.prompt.context, TRAIN, k_min=packing.k_min)

    @property
    def packer(self) -> Packer:
        """What packs the tasks; it travels to Ray's workers, so it leaves the list of segments here."""
        return Packer(replace(self.dataset, segments=()), self.spec)

    def plan(self, epoch: int) -> EpochPlan:
        """Return the order of one epoch."""
        return plan_epoch(
            self.dataset.segments,
            epoch=epoch,
            epochs=self.config.optim.epochs,
            seed=self.config.train.seed,
            streams=self.config.packing.streams,
            targets_per_step=self.config.optim.targets_per_step,
            rows_per_step=self.rows_per_step,
            sliding_tail=self.config.optim.sliding_tail,
            mix_segments=self.config.packing.mix_segments,
        )

    def steps(self, start: Position, rank: int, world: int) -> Generator[tuple[Position, StepRows]]:
        """Yield the rest of the run for one rank: the position of each step, and its rows.

        Every rank has the same steps; where its streams have no tasks, it has no rows in them.

        Args:
            start: what was trained already; the end of an epoch is the start of the next.
            rank: of this worker.
            world: number of workers; divides the number of streams.

        Raises:
            StorageError: a segment cannot be read.
        """
        packing, optim = self.config.packing, self.config.optim
        assert packing.streams % world == 0, "RunConfig checks that the streams divide"
        mine = range(rank * packing.streams // world, (rank + 1) * packing.streams // world)
        busy = range(mine.start, min(mine.stop, count_busy(self.dataset.segments, packing.streams)))
        tasks = self._tasks(start, mine)
        pack_tasks = partial(ray_rows, ahead=max(1, len(busy))) if self.through_ray else local_rows
        with closing(pack_tasks(tasks, self.packer, self.table)) as packed:
            rows = _in_steps(_shares(packed, start, self.rows_per_step), busy, self.rows_per_step)
            for epoch in range(start.epoch, optim.epochs):
                first = start.step if epoch == start.epoch else 0
                for step in range(first, count_steps(self.dataset.segments, optim.targets_per_step)):
                    yield Position(epoch, step), next(rows) if busy else []

    def _tasks(self, start: Position, streams: Iterable[int]) -> Iterator[PackTask]:
        """Yield what is left of some streams' tasks, planning an epoch when it begins."""
        for epoch in range(start.epoch, self.config.optim.epochs):
            plan = self.plan(epoch)
            tasks = (task for stream in streams for task in plan.streams[stream])
            done = start.step * self.rows_per_step if epoch == start.epoch else 0
            left = (task for task in tasks if task.first_row + task.rows > done)
            yield from sorted(left, key=lambda task: (task.first_row, task.stream))


class RowsAhead:
    """The rest of a run's steps for one rank, read ahead by a thread; `close` must be called.

    Args:
        rows: of the run.
        rank: of this worker.
        world: number of workers.
        size: steps that wait at most.
        start: where reading begins at once, in the hope that the run goes on from there.
    """

    def __init__(self, rows: TrainingRows, rank: int, world: int, size: int, start: Position) -> None:
        self.rows, self.rank, self.world, self.size = rows, rank, world, size
        self._begin(start)

    def at(self, position: Position) -> Iterator[tuple[Position, StepRows]]:
        """Return the steps from a position on; reading begins anew where it is another one than was hoped for."""
        if position != self.start:
            self.close()
            self._begin(position)
        return self.steps

    def close(self) -> None:
        """End the thread."""
        self.steps.close()

    def _begin(self, start: Position) -> None:
        self.start = start
        self.steps = Ahead(self.rows.steps(start, self.rank, self.world), self.size, "rows")


@dataclass(frozen=True)
class Packer:
    """Packs one task: reads its segments and lays their targets into rows.

    Attributes:
        dataset: where the segments lie; tasks bring their own, so it may list none.
        spec: the layout.
    """

    dataset: Dataset
    spec: PackSpec

    def __call__(self, task: PackTask, table: TokenTable) -> list[Packed]:
        """Return the task's rows, in order.

        Prompts may fill more rows than the plan counted on, or fewer; they are spread evenly over the planned
        ones, each of which is at least one row, without targets if need be. So a plan holds whatever is packed.
        """
        parts = [read_segment(self.dataset, segment) for segment in task.segments]
        spec = self.spec.sliding() if task.sliding else self.spec
        rng = np.random.default_rng(task.seed)
        rows = list(pack(concatenate(parts), table, spec, task.rows, rng))
        ends = [share * len(rows) // task.rows for share in range(task.rows + 1)]
        shares = (rows[begin:end] or [EMPTY_ROW] for begin, end in pairwise(ends))
        first = task.first_row
        return [(Place(task.epoch, task.stream, first + i), row) for i, share in enumerate(shares) for row in share]


def local_rows(tasks: Iterable[PackTask], packer: Packer, table: TokenTable) -> Generator[Packed]:
    """Pack the tasks one after the other in this process."""
    for task in tasks:
        yield from packer(task, table)


def ray_rows(tasks: Iterable[PackTask], packer: Packer, table: TokenTable, ahead: int) -> Generator[Packed]:
    """Pack the tasks through Ray Data, ahead of the reader; yield rows in the tasks' order.

    Each window of tasks is a pipeline of its own, and packs while the window before it is read. One pipeline for all
    would hold every task of the run in this process, and 10,000 of them keep the first row waiting for 20 s.

    Args:
        tasks: taken a window at a time.
        packer: packs one of them.
        table: item texts as tokens.
        ahead: packed tasks of a window that wait in this process; a few more lie in Ray's object store.
    """
    import ray  # here, so that the core runs where Ray is not installed

    shared = ray.put(table)
    windows = (Ahead(_packed_by_ray(some, packer, shared), ahead, "packed tasks") for some in _windows(tasks))
    reading = deque(islice(windows, 1))
    try:
        while reading:
            for number, packed in enumerate(reading[0]):
                if number == 0:
                    reading.extend(islice(windows, 1))
                yield from packed
            reading.popleft().close()
    finally:
        for window in reading:
            window.close()


def _windows(tasks: Iterable[PackTask]) -> Iterator[list[PackTask]]:
    left = iter(tasks)
    while window := list(islice(left, WINDOW_TASKS)):
        yield window


def _packed_by_ray(tasks: Sequence[PackTask], packer: Packer, shared: ObjectRef[TokenTable]) -> Generator[list[Packed]]:
    """Run one Ray Data pipeline; an error of ours comes out of it as itself, the task's trace in a note."""
    import ray.data
    from ray.exceptions import RayTaskError

    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.raise_original_map_exception = True

    def pack_block(block: pa.Table) -> pa.Table:
        table = ray.get(shared)
        return to_table([row for task in block["task"].to_pylist() for row in packer(pickle.loads(task), table)])  # noqa: S301

    pickled = ray.data.from_arrow([pa.table({"task": [pickle.dumps(task)]}) for task in tasks])
    packed = pickled.map_batches(pack_block, batch_format="pyarrow", batch_size=None)
    # With 0 batches fetched ahead, Ray 2.60 leaves a thread behind.
    batches = iter(packed.iter_batches(batch_format="pyarrow", batch_size=None, prefetch_batches=1))
    try:
        with closing(cast("Generator[pa.Table]", batches)) as blocks:
            yield from (list(from_table(block)) for block in blocks)
    except RayTaskError as error:
        if isinstance(error.cause, DtiRayError):
            error.cause.add_note(str(error))
            raise error.cause from None
        raise


def to_table(packed: Sequence[Packed]) -> pa.Table:
    """Return rows as Arrow, one list a column; the inverse of `from_table`."""
    places, rows = zip(*packed, strict=True)
    columns: dict[str, pa.Array] = {
        name: pa.array(values, pa.int32())
        for name, values in zip(Place._fields, zip(*places, strict=True), strict=True)
    }
    columns["prefix_tokens"] = pa.array([row.prefix_tokens for row in rows], pa.int32())
    for name in ARRAYS:
        parts = [getattr(row, name) for row in rows]
        offsets = pa.array(np.concatenate([[0], np.cumsum([len(part) for part in parts])]), pa.int32())
        columns[name] = pa.ListArray.from_arrays(offsets, pa.array(np.concatenate(parts)))
    return pa.table(columns).select(ROW_SCHEMA.names).cast(ROW_SCHEMA)


def from_table(table: pa.Table) -> Iterator[Packed]:
    """Yield the rows of a table that `to_table` made."""
    for row in range(table.num_rows):
        arrays = {name: table[name][row].values.to_numpy(zero_copy_only=False) for name in ARRAYS}
        place = Place(*(table[name][row].as_py() for name in Place._fields))
        yield place, PackedRow(**arrays, prefix_tokens=table["prefix_tokens"][row].as_py())


def tokens_per_target(spec: PackSpec, table: TokenTable) -> float:
    """Estimate the tokens per target from the length of its prompts; k = all as 64, time gaps by their mean phrase."""
    per_interaction = float(table.lengths.mean() + table.gap_lengths.mean()) + 1
    run = spec.k if spec.k is not None else 64
    if spec.k_min is not None:
        run = mean_targets(spec.k_min, run)
    return (len(table.prefix) + spec.n * per_interaction) / run + per_interaction + 1


def concatenate(parts: Sequence[UserSequences]) -> UserSequences:
    """Lay the users of several segments one after the other."""
    if len(parts) == 1:
        return parts[0]
    starts = np.cumsum([0, *(part.offsets[-1] for part in parts)])
    offsets = [part.offsets[:-1] + start for part, start in zip(parts, starts, strict=False)]
    flat = {
        name: np.concatenate([getattr(part, name) for part in parts])
        for name in ("user_ids", "items", "labels", "times", "splits")
    }
    return UserSequences(offsets=np.concatenate([*offsets, starts[-1:]]), **flat)


def _shares(packed: Iterable[Packed], start: Position, rows_per_step: int) -> Iterator[tuple[int, StepRows]]:
    """Yield (stream, rows) of each share from a position on."""
    for place, rows in groupby(packed, key=itemgetter(0)):
        if place.epoch > start.epoch or place.share >= start.step * rows_per_step:
            yield place.stream, [row for _, row in rows]


def _in_steps(shares: Iterable[tuple[int, StepRows]], streams: Iterable[int], size: int) -> Iterator[StepRows]:
    """Deal shares to their streams; a step takes `size` of each, as soon as they are there."""
    waiting: dict[int, deque[StepRows]] = {stream: deque() for stream in streams}
    lacking = len(waiting)
    for stream, rows in shares:
        waiting[stream].append(rows)
        lacking -= len(waiting[stream]) == size
        while not lacking:
            yield [row for queue in waiting.values() for _ in range(size) for row in queue.popleft()]
            lacking = sum(len(queue) < size for queue in waiting.values())


def _targets_after(users: UserSequences, min_context: int) -> int:
    """Count the training targets with at least so many interactions before them."""
    user = np.repeat(np.arange(len(users.user_ids)), np.diff(users.offsets))
    per_user = np.bincount(user[users.splits == TRAIN], minlength=len(users.user_ids))
    return int(np.maximum(per_user - min_context, 0).sum())
