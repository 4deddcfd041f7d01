"""The stream of rows that one training rank reads, packed by Ray Data beside the trainers.

Stage: pipeline. In: an `EpochPlan` and the rank's share of the streams. Out: for each optimizer step the rows
of that rank's streams, in a fixed order.
Invariant: the rows depend on (data set, seed, epoch, stream) alone. Ray Data packs tasks ahead, in parallel
and with back-pressure, in the very order in which `local_rows` packs them one by one.

    streams 0 and 1, tasks of 3 + 1 and 2 + 2 rows    packed in the order of their first row: 0a 1a 1b 0b
    step 0 takes the first row of either stream, step 1 the second ...
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, pairwise
from operator import itemgetter

import numpy as np
import pyarrow as pa

from dti_ray.config import RunConfig
from dti_ray.data.interactions import TRAIN, Dataset, UserSequences, read_all, read_segment
from dti_ray.data.packing import PackedRow, PackSpec, pack, pack_spec
from dti_ray.data.plan import EpochPlan, PackTask, plan_epoch
from dti_ray.data.prompts import TokenTable

ROW_SCHEMA = pa.schema(
    [
        ("stream", pa.int32()),
        ("share", pa.int32()),
        *((name, pa.list_(pa.int32())) for name in ("tokens", "positions", "prompt", "interaction", "cut", "after")),
        ("labels", pa.list_(pa.int8())),
        ("users", pa.list_(pa.int64())),
        ("prefix_tokens", pa.int32()),
    ]
)
EMPTY_ROW = PackedRow(
    *(np.zeros(0, dtype=np.int32) for _ in range(6)), labels=np.zeros(0, np.int8), users=np.zeros(0, np.int64)
)
ARRAYS = ("tokens", "positions", "prompt", "interaction", "cut", "after", "labels", "users")
StepRows = list[PackedRow]
Packed = tuple[int, int, PackedRow]  # stream, share: the number of the planned row that this row fills, row


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
        sequences = read_all(self.dataset)
        user = np.repeat(np.arange(len(sequences.user_ids)), np.diff(sequences.offsets))
        per_user = np.bincount(user[sequences.splits == TRAIN], minlength=len(sequences.user_ids))
        return int(np.maximum(per_user - self.config.packing.min_context, 0).sum())

    @property
    def total_targets(self) -> int:
        """Training targets of the whole run."""
        return self.targets_per_epoch * self.config.optim.epochs

    @cached_property
    def rows_per_step(self) -> int:
        """Rows that one stream contributes to a step, so that its share of the targets fits their capacity."""
        packing, optim = self.config.packing, self.config.optim
        share = optim.targets_per_step / packing.streams
        spec = pack_spec(packing, self.config.prompt.context, TRAIN)
        densest = 1 if optim.sliding_tail else spec.k
        return max(1, round(share * _tokens_per_target(densest, spec, self.table) / (0.8 * spec.row_tokens) + 0.5))

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

    def steps(self, epoch: int, rank: int, world: int, start_step: int = 0) -> Iterator[StepRows]:
        """Yield the rows of each step of an epoch for one rank.

        Args:
            epoch: number of the pass.
            rank: of this worker.
            world: number of workers; divides the number of streams.
            start_step: steps of the epoch that were trained already.
        """
        streams = self.config.packing.streams
        assert streams % world == 0, "RunConfig checks that the streams divide"
        mine = range(rank * streams // world, (rank + 1) * streams // world)
        skip = start_step * self.rows_per_step
        plan = self.plan(epoch)
        tasks = [task for stream in mine for task in plan.streams[stream] if task.first_row + task.rows > skip]
        tasks.sort(key=lambda task: (task.first_row, task.stream))
        packer = Packer(self.dataset, pack_spec(self.config.packing, self.config.prompt.context, TRAIN))
        packed = ray_rows(tasks, packer, self.table) if self.through_ray else local_rows(tasks, packer, self.table)
        return _in_steps(packed, mine, skip, self.rows_per_step)


@dataclass(frozen=True)
class Packer:
    """Packs one task: reads its segments and lays their targets into rows."""

    dataset: Dataset
    spec: PackSpec

    def __call__(self, task: PackTask, table: TokenTable) -> list[Packed]:
        """Return the task's rows, in order.

        Prompts may fill more rows than the plan counted on, or fewer; they are spread evenly over the planned
        ones, each of which is at least one row, without targets if need be. So a plan holds whatever is packed.
        """
        parts = [read_segment(self.dataset, self.dataset.segments[i]) for i in task.segments]
        spec = self.spec.sliding() if task.sliding else self.spec
        rng = np.random.default_rng(task.seed)
        rows = list(pack(concatenate(parts), table, spec, task.rows, rng))
        ends = [share * len(rows) // task.rows for share in range(task.rows + 1)]
        shares = (rows[begin:end] or [EMPTY_ROW] for begin, end in pairwise(ends))
        return [(task.stream, task.first_row + i, row) for i, share in enumerate(shares) for row in share]


def local_rows(tasks: Sequence[PackTask], packer: Packer, table: TokenTable) -> Iterator[Packed]:
    """Pack the tasks one after the other in this process."""
    for task in tasks:
        yield from packer(task, table)


def ray_rows(tasks: Sequence[PackTask], packer: Packer, table: TokenTable) -> Iterator[Packed]:
    """Pack the tasks as a Ray Data pipeline, ahead of the reader; yield rows in the tasks' order."""
    import ray.data  # here, so that the core runs where Ray is not installed

    if not tasks:
        return
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    shared = ray.put(table)

    def pack_block(block: pa.Table) -> pa.Table:
        chosen = [tasks[i] for i in block["task"].to_pylist()]
        known = ray.get(shared)
        return to_table([row for task in chosen for row in packer(task, known)])

    numbers = ray.data.from_arrow([pa.table({"task": [i]}) for i in range(len(tasks))])
    packed = numbers.map_batches(pack_block, batch_format="pyarrow", batch_size=None)
    for block in packed.iter_batches(batch_format="pyarrow", batch_size=None, prefetch_batches=2):
        yield from from_table(block)


def to_table(packed: Sequence[Packed]) -> pa.Table:
    """Return rows as Arrow, one list a column; the inverse of `from_table`."""
    streams, shares, rows = zip(*packed, strict=True)
    columns: dict[str, pa.Array] = {
        "stream": pa.array(streams, pa.int32()),
        "share": pa.array(shares, pa.int32()),
        "prefix_tokens": pa.array([row.prefix_tokens for row in rows], pa.int32()),
    }
    for name in ARRAYS:
        parts = [getattr(row, name) for row in rows]
        offsets = pa.array(np.concatenate([[0], np.cumsum([len(part) for part in parts])]), pa.int32())
        columns[name] = pa.ListArray.from_arrays(offsets, pa.array(np.concatenate(parts)))
    return pa.table(columns).select(ROW_SCHEMA.names).cast(ROW_SCHEMA)


def from_table(table: pa.Table) -> Iterator[Packed]:
    """Yield the rows of a table that `to_table` made."""
    for row in range(table.num_rows):
        arrays = {name: table[name][row].values.to_numpy(zero_copy_only=False) for name in ARRAYS}
        yield (
            table["stream"][row].as_py(),
            table["share"][row].as_py(),
            PackedRow(**arrays, prefix_tokens=table["prefix_tokens"][row].as_py()),
        )


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


def _in_steps(packed: Iterable[Packed], streams: Iterable[int], skip: int, size: int) -> Iterator[StepRows]:
    """Deal shares to their streams and take `size` of each stream a step, from share `skip`, until all have ended."""
    waiting: dict[int, deque[StepRows]] = {stream: deque() for stream in streams}
    for (stream, share), rows in groupby(packed, key=itemgetter(0, 1)):
        if share < skip:
            continue
        waiting[stream].append([row for _, _, row in rows])
        while all(len(shares) >= size for shares in waiting.values()):
            yield [row for shares in waiting.values() for _ in range(size) for row in shares.popleft()]
    while any(waiting.values()):
        yield [row for shares in waiting.values() for _ in range(min(size, len(shares))) for row in shares.popleft()]


def _tokens_per_target(k: int | None, spec: PackSpec, table: TokenTable) -> float:
    """Estimate tokens per target from METHOD's cost formula; k = all as 64."""
    per_interaction = float(table.lengths.mean()) + 1
    run = k if k is not None else 64
    return (len(table.prefix) + spec.n * per_interaction) / run + per_interaction + 1
