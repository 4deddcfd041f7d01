"""An evaluation on many workers, by Ray Data.

Stage: evaluate, on a cluster. In: a `Plan`, whose checks are done. Out: the `Evaluation` that `evaluate_run` writes.
Invariant: workers read the users of a unit where they lie, and only scores come back; a worker that dies is started
again and what it had is scored again, `train.max_failures` times; nothing is lost or counted twice, or it is an error.

    units 0 1 2 3 4 → worker a: 0 2 4    worker b: 1 3 → this process, in any order
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Iterator
from functools import cached_property
from typing import cast

import pyarrow as pa
import ray
import ray.data
import torch
from ray.actor import ActorProxy
from ray.data import ActorPoolStrategy

from dti_ray.cluster import Starts, check_room, this_node
from dti_ray.data.prompts import TokenTable
from dti_ray.data.ray_jobs import plain_ray_data
from dti_ray.errors import Fault, RunError
from dti_ray.infer.evaluate import OnProgress, Plan, Scorer
from dti_ray.infer.outcome import Evaluation, conclude
from dti_ray.infer.units import TargetScores, collect, from_table, to_table
from dti_ray.train.host import settle


def evaluate_on_workers(plan: Plan, table: TokenTable, on_progress: OnProgress) -> Evaluation:
    """Score a plan's units on `cluster.workers` workers and write the result below the run.

    Args:
        plan: its root and its model's path must mean the same on every node; Ray must be running.
        table: item texts as tokens.
        on_progress: called with (targets scored, targets in all).

    Raises:
        ConfigError: no node can hold a worker.
        IncompleteError: rows scored are not rows asked for.
        StorageError: users or checkpoint cannot be read.
        RunError: workers died more often than `train.max_failures` allows.
    """
    config, started = plan.config, time.monotonic()
    check_room(config.cluster)
    with plain_ray_data():
        scores = collect(plan.units, _scored(plan, table), config.packing.min_context, on_progress)
    return conclude(config, plan.dataset, plan.split, plan.checkpoint.path, scores, time.monotonic() - started)


class _Worker:
    """Scores units; it loads its model with the first one, so that what goes wrong then is told like any other error.

    Args:
        plan: without units.
        shared: item texts as tokens, in the object store.
        starts: told of this one.
        workers: that start if none dies.
    """

    def __init__(self, plan: Plan, shared: ray.ObjectRef[TokenTable], starts: ActorProxy[Starts], workers: int) -> None:
        self.plan, self.shared = plan, shared
        self.deaths = ray.get(starts.add.remote()) - workers

    @cached_property
    def scorer(self) -> Scorer:
        cluster = self.plan.config.cluster
        device = torch.device("cuda" if cluster.gpus_per_worker > 0 else "cpu")
        settle(device, threads=max(1, int(cluster.cpus_per_worker)))
        return Scorer.load(self.plan, ray.get(self.shared), device)

    def __call__(self, block: pa.Table) -> pa.Table:
        train = self.plan.config.train
        if self.deaths > train.max_failures:
            problem = f"workers died {self.deaths} times, train.max_failures allows {train.max_failures}"
            hint = "see Ray's logs; if memory ran out, lower train.rows_per_pass or eval.row_tokens"
            raise RunError(Fault(f"evaluation of {train.run}", problem, hint=hint))
        units = [pickle.loads(unit) for unit in block["unit"].to_pylist()]  # noqa: S301 - this package wrote it
        return pa.concat_tables([to_table(unit.number, self.scorer.score(unit)) for unit in units])


def _scored(plan: Plan, table: TokenTable) -> Iterator[tuple[int, TargetScores]]:
    """Yield (number of the unit, its scores) as they come."""
    cluster = plan.config.cluster
    workers = min(cluster.workers, len(plan.units))
    starts = ray.remote(num_cpus=0)(Starts).options(scheduling_strategy=this_node()).remote()
    units = ray.data.from_arrow([pa.table({"unit": [pickle.dumps(unit)]}) for unit in plan.units])
    scored = units.map_batches(
        _Worker,
        fn_constructor_args=(plan.without_units, ray.put(table), starts, workers),
        batch_size=1,
        batch_format="pyarrow",
        # One at a time: a worker with another unit in its queue would keep it from an idle one.
        compute=ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=1),
        num_cpus=cluster.cpus_per_worker,
        num_gpus=cluster.gpus_per_worker,
    )
    for block in scored.iter_batches(batch_format="pyarrow", batch_size=None, prefetch_batches=1):
        yield from from_table(cast("pa.Table", block))
