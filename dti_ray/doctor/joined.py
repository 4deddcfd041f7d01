"""A cluster as a driver sees it: its nodes, and what each says of itself.

Stage: below the checks of clusters; runs as `python -m dti_ray.doctor.joined REQUEST`. In: a `Request` as JSON.
Out: a `Cluster`, one line of JSON on stdout.
Invariant: a process of its own joins, so that a head that never answers, or whose client ends the process, ends this
one only. Nodes are asked by tasks that take no CPU and no GPU, so nothing is scaled up or waited for.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import TypeAdapter

from dti_ray.config import ClusterConfig
from dti_ray.doctor.check import one_line
from dti_ray.doctor.machine import MACHINE, QUESTION, Machine, Question, ask_as_task, run_module

if TYPE_CHECKING:  # who only asks a cluster's question need not wait for Ray
    from ray import ObjectRef

MODULE = "dti_ray.doctor.joined"


@dataclass(frozen=True)
class Request:
    """What is wanted of a cluster.

    Attributes:
        address: to join; None: as Ray finds it.
        question: for each node; its GPUs are looked at where Ray counts some.
        node_limit_s: a node is waited for so long.
    """

    address: str | None
    question: Question
    node_limit_s: float


@dataclass(frozen=True)
class Node:
    """One living node.

    Attributes:
        host: its name.
        resources: as Ray counts them; memory in bytes.
        machine: what it said; None where it did not.
        trouble: why not.
    """

    host: str
    resources: dict[str, float]
    machine: Machine | None
    trouble: str = ""


@dataclass(frozen=True)
class Cluster:
    """All living nodes, and whether an autoscaler adds more."""

    nodes: tuple[Node, ...]
    is_autoscaled: bool


REQUEST, CLUSTER = TypeAdapter(Request), TypeAdapter(Cluster)


def ask_cluster(request: Request, limit_s: float) -> Cluster:
    """Join a cluster in a process of its own, and ask every node.

    Raises:
        TimeoutError: it was not done in time.
        RuntimeError: the cluster cannot be joined; with Ray's words.
    """
    return CLUSTER.validate_json(run_module(MODULE, REQUEST.dump_json(request).decode(), limit_s, os.environ))


def look(request: Request) -> Cluster:
    """Join the cluster, and ask every node."""
    import ray

    from dti_ray.cluster import connect, is_autoscaled

    connect(ClusterConfig(address=request.address))
    known = [node for node in ray.nodes() if node["Alive"]]
    machines = _ask_nodes([node["NodeID"] for node in known], [node["Resources"] for node in known], request)
    nodes = tuple(
        Node(node["NodeManagerHostname"], node["Resources"], machine, trouble)
        for node, (machine, trouble) in zip(known, machines, strict=True)
    )
    return Cluster(nodes, is_autoscaled())


def _ask_nodes(
    ids: Sequence[str], resources: Sequence[dict[str, float]], request: Request
) -> list[tuple[Machine | None, str]]:
    """Return each node's answer, or why there is none."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(num_cpus=0, max_retries=0)(ask_as_task)
    asked = []
    for node_id, has in zip(ids, resources, strict=True):
        with_gpus = request.question.with_gpus and has.get("GPU", 0.0) > 0
        question = Question(with_gpus, request.question.root, request.question.paths)
        here = NodeAffinitySchedulingStrategy(node_id, soft=False)
        text = QUESTION.dump_json(question).decode()
        asked.append(task.options(scheduling_strategy=here).remote(text, request.node_limit_s))
    answered = set(ray.wait(asked, num_returns=len(asked), timeout=request.node_limit_s)[0])
    return [
        _answer(one) if one in answered else (None, f"no answer within {request.node_limit_s:g} s") for one in asked
    ]


def _answer(asked: ObjectRef[str]) -> tuple[Machine | None, str]:
    import ray
    from ray.exceptions import RayError

    try:
        return MACHINE.validate_json(ray.get(asked)), ""
    except RayError as error:
        cause = getattr(error, "cause", None)
        return None, one_line(cause if isinstance(cause, BaseException) else error)


if __name__ == "__main__":
    sys.stdout.write(CLUSTER.dump_json(look(REQUEST.validate_json(sys.argv[1]))).decode() + "\n")
