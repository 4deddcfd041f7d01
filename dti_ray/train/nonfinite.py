"""What a loss or a gradient that is not a number does to a run, and whose rows it came from.

Stage: beside the loop. In: a step's rows, and which of their targets gave no finite loss. Out: the users' ids; then a
`RunError`, or the `Progress` of a run that goes on without the step.
Invariant: the engine has changed nothing in such a step, on any rank; so all ranks decide alike, and a resumed run
decides as the first one did.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from dti_ray.config import RunConfig
from dti_ray.data.interactions import read_segment
from dti_ray.data.packing import PackedRow
from dti_ray.data.pipeline import TrainingRows, concatenate
from dti_ray.data.plan import Position
from dti_ray.errors import Fault, RunError
from dti_ray.train.state import Progress
from dti_ray.train.world import World

NAMED = 10  # users in a message

Users = list[str]


def users_of_step(rows: TrainingRows, position: Position, world: World, suspect: np.ndarray) -> tuple[Users, Users]:
    """Return the ids of the users whose targets are suspect, and those of all users of this rank's part of a step.

    Rows carry users as numbers within the task that packed them, so the step's tasks are packed once more.

    Args:
        rows: of the run.
        position: of the step.
        world: this rank among the others.
        suspect: bool, one per target of this rank's rows, in their order.
    """
    ids = np.concatenate([np.zeros(0, dtype=object), *_user_ids(rows, position, world)])
    assert len(ids) == len(suspect), "a task packs into the same rows again"
    return sorted(set(ids[suspect])), sorted(set(ids))


def leave_out(config: RunConfig, progress: Progress, found: Sequence[tuple[Users, Users]]) -> tuple[Progress, str]:
    """Count a step that was left out; return the new progress and what to say of it.

    Args:
        config: of the run.
        progress: before the step.
        found: of every rank, what `users_of_step` returned.

    Raises:
        RunError: `train.on_nonfinite` is fail, or the limit is passed.
    """
    suspects = sorted({user for some, _ in found for user in some})
    users = suspects or sorted({user for _, every in found for user in every})
    what = "loss" if suspects else "gradient"
    where = f"step {progress.step + 1}"
    names = ", ".join(users[:NAMED]) + (f" and {len(users) - NAMED} more" if len(users) > NAMED else "")
    problem = f"its {what} is not finite; rows of users {names}"
    train = config.train
    if train.on_nonfinite == "fail":
        hint = "lower optim.lr, look at these users, or set train.on_nonfinite=skip; the state before it is kept"
        raise RunError(Fault(where, problem, hint=hint))
    if progress.skipped >= train.max_skipped:
        hint = f"{progress.skipped} steps were left out before (train.max_skipped); the state before it is kept"
        raise RunError(Fault(where, problem, hint=hint))
    return replace(progress, skipped=progress.skipped + 1), f"{where}: {problem}; left out"


def _user_ids(rows: TrainingRows, position: Position, world: World) -> Iterator[np.ndarray]:
    """Yield the user ids of each row's targets, in the order in which `TrainingRows.steps` yields the rows."""
    streams, first = rows.config.packing.streams, position.step * rows.rows_per_step
    plan, packer = rows.plan(position.epoch), rows.packer
    for stream in range(world.rank * streams // world.size, (world.rank + 1) * streams // world.size):
        for task in plan.streams[stream]:
            if task.first_row < first + rows.rows_per_step and task.first_row + task.rows > first:
                known = concatenate([read_segment(rows.dataset, segment) for segment in task.segments]).user_ids
                for place, row in packer(task, rows.table):
                    if first <= place.share < first + rows.rows_per_step:
                        yield _named(row, known)


def _named(row: PackedRow, known: np.ndarray) -> np.ndarray:
    return known[row.users].astype(object)
