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
from dti_ray.errors import ConfigError, Fault

log = logging.getLogger(__name__)


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


def check_room(cluster: ClusterConfig) -> None:
    """Refuse workers of which no node can hold one, unless an autoscaler may bring such a node.

    Raises:
        ConfigError: they would be waited for without an end.
    """
    wanted = {"CPU": cluster.cpus_per_worker, "GPU": cluster.gpus_per_worker}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if any(all(node.get(name, 0.0) >= amount for name, amount in wanted.items()) for node in nodes):
        return
    problem = f"no node has {cluster.cpus_per_worker:g} CPUs and {cluster.gpus_per_worker:g} GPUs for a worker"
    if not is_autoscaled():
        expected = "cluster.cpus_per_worker and cluster.gpus_per_worker that a node has"
        raise ConfigError(Fault("cluster", problem, expected, "cluster.gpus_per_worker=0 computes on CPUs"))
    log.warning("%s: waiting for one", problem)


def is_autoscaled() -> bool:
    """Say whether an autoscaler (its version 2) reports to the head; one that only watches knows no instances."""
    from ray.autoscaler.v2.sdk import get_cluster_status

    status = get_cluster_status(ray.get_runtime_context().gcs_address)
    nodes = [*status.active_nodes, *status.idle_nodes]
    return int(status.stats.autoscaler_version or 0) > 0 and any(node.instance_id for node in nodes)


def this_node() -> NodeAffinitySchedulingStrategy:
    """Place an actor where this process runs: a node of its own could die before this process does."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


class Starts:
    """Counts, as an actor, the starts of workers: Ray Data starts one that has died again and again, without an end.

    It stands here because its process imports what stands beside it, and needs nothing of a model.
    """

    def __init__(self) -> None:
        self.count = 0

    @ray.method
    def add(self) -> int:
        """Count one more; return how many there were."""
        self.count += 1
        return self.count
