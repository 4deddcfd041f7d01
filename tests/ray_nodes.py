"""A Ray cluster of several nodes on this machine, each with a raylet of its own."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample
from ray.cluster_utils import Cluster

MEMORY = 200 * 2**20
HEAD = {
    "num_cpus": 1,
    "object_store_memory": MEMORY,
    # Any free port: where another Ray holds the usual one, Ray gives up its dashboard and leaves a socket open.
    "dashboard_port": None,
}


def start_nodes(count: int, cpus: int) -> tuple[Cluster, list[object]]:
    """Start a head of one CPU and some nodes beside it.

    Args:
        count: number of nodes without the head.
        cpus: of each of them.

    Returns:
        The cluster, to be shut down by the caller, and its nodes without the head.
    """
    cluster = Cluster(initialize_head=True, head_node_args=HEAD)
    return cluster, [add_node(cluster, cpus) for _ in range(count)]


def add_node(cluster: Cluster, cpus: int) -> object:
    """Add one more node to a running cluster and return it."""
    return cluster.add_node(num_cpus=cpus, object_store_memory=MEMORY)


def samples() -> Iterator[Sample]:
    """Yield what all nodes of the cluster export now."""
    import ray

    for node in ray.nodes():
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        with urllib.request.urlopen(url, timeout=10) as answer:
            for family in text_string_to_metric_families(answer.read().decode()):
                yield from family.samples
