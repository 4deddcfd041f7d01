"""The Ray cluster of this process: join the one that is named, or start one on this machine.

Stage: below the jobs that run on Ray. In: the `cluster` section. Out: a connected process.
"""

from __future__ import annotations

import logging
import math
import os

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dti_ray.config import ClusterConfig


def connect(cluster: ClusterConfig, runs: int = 1) -> None:
    """Join `cluster.address` or RAY_ADDRESS's cluster; otherwise start one here.

    A cluster of our own counts the trainers' CPUs, `data_cpus` for packing, and one to spare for each run: without a
    spare one Ray cannot replace a dead worker.

    Args:
        cluster: what a run asks of Ray.
        runs: that train at the same time.
    """
    if ray.is_initialized():
        return
    if cluster.address is not None or "RAY_ADDRESS" in os.environ:
        ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
        return
    wanted = runs * (math.ceil(cluster.workers * cluster.cpus_per_worker) + cluster.data_cpus + 1)
    ray.init(
        address="local",  # not the one that `ray start` may have left on this machine
        num_cpus=max(os.cpu_count() or 1, wanted),
        object_store_memory=cluster.object_store_mb * 2**20,
        include_dashboard=True,  # without its state API, placement groups of ended runs may leak
        log_to_driver=False,
        logging_level=logging.ERROR,
    )


def this_node() -> NodeAffinitySchedulingStrategy:
    """Place an actor where this process runs: a node of its own could die before this process does."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
