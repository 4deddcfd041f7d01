"""Plain Ray Data map jobs: so many tasks, each told its number, each of which returns one small tree.

Stage: below prepare. In: a function of a number. Out: its results, in the order of the numbers.
Invariant: Ray may run a task again, even while its first attempt still runs, so a task must write the same bytes to the
same names; rows lie in storage, and only names and counts pass through Ray.

    run(count_users, [0, 1, 4], Watch(), "counting") → {0: {...}, 1: {...}, 4: {...}}
"""

from __future__ import annotations

import io
import json
import logging
import resource
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray.data
from ray.exceptions import RayTaskError

from dti_ray.errors import DtiRayError

Tree = dict[str, Any]


class Watch:
    """Follows the jobs.

    Args:
        show: called with (stage, tasks done, tasks in all).

    Attributes:
        peak_rss_mb: largest resident memory of any process so far, this one included (MB of 2^20 bytes).
        worker_rss_mb: the same of those that ran a task.
    """

    def __init__(self, show: Callable[[str, int, int], None] = lambda _stage, _done, _total: None) -> None:
        self.show = show
        self.peak_rss_mb = self.worker_rss_mb = 0.0

    def measure(self, rss_mb: float) -> None:
        """Take note of the size of a process that ran a task."""
        self.worker_rss_mb = max(self.worker_rss_mb, rss_mb)
        self.peak_rss_mb = max(self.peak_rss_mb, rss_mb, peak_rss_mb())


@dataclass(frozen=True)
class Actors:
    """Processes that run task after task.

    Attributes:
        count: of them.
        cpus: of each; Ray wants either CPUs or GPUs, so they count where `gpus` is 0.
        gpus: of each.
    """

    count: int
    cpus: float
    gpus: float


def peak_rss_mb() -> float:
    """Return the largest resident memory that this process has had (MB of 2^20 bytes)."""
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def run(
    task: Callable[[int], Tree], numbers: Sequence[int], watch: Watch, stage: str, actors: Actors | None = None
) -> dict[int, Tree]:
    """Run a task for each number as one Ray Data job.

    Args:
        task: given a number; in actors, each has a copy of its own, and what that holds stays from call to call.
        numbers: of the tasks.
        watch: who follows.
        stage: what they do.
        actors: which run them; None: any process.

    Raises:
        DtiRayError: the first that a task raised, as itself.
    """
    if not numbers:
        return {}
    watch.show(stage, 0, len(numbers))
    results: dict[int, Tree] = {}
    with plain_ray_data():
        rows = ray.data.range(len(numbers), override_num_blocks=len(numbers))
        if actors is None:
            answers = rows.map(lambda given: _Row(task, numbers)(given))
        else:
            actor: Any = _Row  # Ray's types know functions only
            cpus, gpus = (None, actors.gpus) if actors.gpus else (actors.cpus, None)
            pool = ray.data.ActorPoolStrategy(size=actors.count)
            answers = rows.map(
                actor, fn_constructor_args=(task, numbers), compute=pool, num_cpus=cpus, num_gpus=gpus
            )  # fmt: skip
        for found in answers.iter_rows():
            results[found["number"]] = json.loads(found["result"])
            watch.measure(found["rss_mb"])
            watch.show(stage, len(results), len(numbers))
    return dict(sorted(results.items()))


class _Row:
    """What Ray Data maps over its rows: a class, which it makes an actor of."""

    def __init__(self, task: Callable[[int], Tree], numbers: Sequence[int]) -> None:
        self.task, self.numbers = task, numbers

    def __call__(self, given: Tree) -> Tree:
        number = self.numbers[given["id"]]
        result = self.task(number)
        return {"number": number, "result": json.dumps(result), "rss_mb": peak_rss_mb()}


@contextmanager
def plain_ray_data() -> Iterator[None]:
    """Run Ray Data without its bars and messages, and let an error of ours come back as itself.

    Ray Data takes the trace off what goes wrong inside it, and only logs it: here it is put back, as a note.
    Its log files are left as they are.
    """
    context, log = ray.data.DataContext.get_current(), logging.getLogger("ray.data")
    before = (context.enable_progress_bars, context.raise_original_map_exception)
    context.enable_progress_bars, context.raise_original_map_exception = False, True
    consoles = [handler for handler in log.handlers if isinstance(handler, logging.StreamHandler)]
    trace = io.StringIO()
    kept = logging.StreamHandler(trace)
    kept.setLevel(logging.ERROR)
    log.handlers = [kept, *(handler for handler in log.handlers if handler not in consoles)]
    try:
        yield
    except RayTaskError as error:
        if isinstance(error.cause, DtiRayError):
            raise error.cause from None
        error.add_note(trace.getvalue())
        raise
    except Exception as error:
        error.add_note(trace.getvalue())
        raise
    finally:
        log.handlers = [*consoles, *(handler for handler in log.handlers if handler is not kept)]
        context.enable_progress_bars, context.raise_original_map_exception = before
