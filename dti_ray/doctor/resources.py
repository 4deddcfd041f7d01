"""The Ray cluster: does it answer, let us in, hold the run's workers, and do its nodes have what the driver has.

Stage: a check. In: the `cluster` section; what `joined` found. Out: `Check`s.
"""

from __future__ import annotations

import math
import socket
from collections.abc import Mapping, Sequence
from urllib.parse import urlsplit

from dti_ray.config import ClusterConfig
from dti_ray.doctor.check import Check, failed, one_line, passed, skipped, warned
from dti_ray.doctor.joined import Cluster, Node
from dti_ray.doctor.machine import Machine

CONNECT_S = 3.0
SPARE = "leave one CPU more on every node: without it Ray cannot start a dead worker again"
TOKEN = "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH, to the cluster's token"  # noqa: S105
OF_TOKENS = "AuthenticationError: "  # of Ray


def address_of(cluster: ClusterConfig, environment: Mapping[str, str]) -> str | None:
    """Return the address that a run would join; None where it would start a Ray of its own."""
    address = cluster.address if cluster.address is not None else environment.get("RAY_ADDRESS")
    return None if address == "local" else address


def check_address(address: str | None, is_configured: bool) -> Check:
    """Try whether somebody listens at an address, within `CONNECT_S`.

    Args:
        address: from `address_of`.
        is_configured: it is `cluster.address`, and not RAY_ADDRESS.
    """
    name = "ray address"
    if address is None:
        return passed(name, "none is named: a run starts a Ray of its own on this machine")
    source = "cluster.address" if is_configured else "RAY_ADDRESS"
    if address in ("auto", ""):
        return passed(name, f"{source} is {address!r}: the cluster that this machine belongs to")
    parts = urlsplit(address if "://" in address else f"//{address}")
    if parts.scheme in ("http", "https"):
        expected = "name the head's HOST:6379 (cluster.address=auto on a node), or send the job by `dti-ray submit`"
        return failed(name, f"{source}={address} is the dashboard's, which takes jobs but no drivers", expected)
    try:
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if host is None or port is None:
        return failed(name, f"{source}={address} is no address", "name the head's HOST:6379, or auto on a node")
    return _knock(name, host, port, source)


def check_joined(address: str, error: BaseException) -> Check:
    """Say in words why a cluster did not let us in."""
    name, told = "cluster", one_line(error)
    if OF_TOKENS in str(error):
        words = str(error).rpartition(OF_TOKENS)[2].partition(" Ensure that")[0]  # the rest is as our advice
        return failed(name, f"{address} wants a token: {words}", TOKEN)
    if "version mismatch" in told.lower():
        return failed(name, told, "install the cluster's versions here, or run this on one of its nodes")
    if isinstance(error, TimeoutError):
        return failed(name, f"{address} does not let us in: {told}", "see whether Ray's head listens there (6379)")
    return failed(name, told, "run this on one of the cluster's nodes, or send the job by `dti-ray submit`")


def check_nodes(cluster: Cluster) -> Check:
    """Say which nodes answer."""
    silent = [f"{node.host}: {node.trouble}" for node in cluster.nodes if node.machine is None]
    there = [node.machine for node in cluster.nodes if node.machine is not None]
    version = next((machine.versions.get("ray", "") for machine in there), "")
    found = f"{_count(len(cluster.nodes), 'node')}{f', Ray {version}' if version else ''}{_scaled(cluster)}"
    advice = "install dti-ray in the nodes' image, and see what the node is busy with"
    return failed("cluster", f"{found}; {'; '.join(silent)}", advice) if silent else passed("cluster", found)


def check_reach(machines: Sequence[Machine]) -> Check:
    """Say whether each node that answered sees storage and files as the driver does."""
    name = "node storage"
    if not machines:
        return skipped(name, "no node answered")
    if away := [f"{machine.host}: {machine.root_trouble}" for machine in machines if machine.root_trouble]:
        return failed(
            name, "; ".join(away), "give the nodes the keys, the endpoint and a way through the network policy"
        )
    if blind := [f"{', '.join(machine.missing)} on {machine.host}" for machine in machines if machine.missing]:
        advice = "use an object store or a folder that all nodes share; put model files there or into the image"
        return failed(name, f"not there: {'; '.join(blind)}", advice)
    return passed(name, f"{_count(len(machines), 'node')} reached the root and the model's files")


def check_resources(cluster: ClusterConfig, nodes: Sequence[Mapping[str, float]], is_autoscaled: bool) -> Check:
    """Hold the nodes' CPUs and GPUs against the workers, packing, and a spare CPU.

    Args:
        cluster: what is asked for.
        nodes: resources of each node.
        is_autoscaled: nodes are added to a cluster that is too small.
    """
    name, wanted = "resources", _wanted(cluster)
    fit = sum(places(cluster, node) for node in nodes)
    cpus = sum(node.get("CPU", 0.0) for node in nodes)
    cpus_wanted = cluster.workers * cluster.cpus_per_worker + cluster.data_cpus
    have = ", ".join(f"{_count(node.get('CPU', 0), 'CPU')} {_count(node.get('GPU', 0), 'GPU')}" for node in nodes)
    if fit < cluster.workers or cpus < cpus_wanted:
        lack = f"{fit} of {wanted} fit" if fit < cluster.workers else f"{wanted} leave none of {cpus:g} CPUs to packing"
        if is_autoscaled:
            return warned(name, f"{lack} now", "the autoscaler has to bring the rest: see its limits, and the quota")
        advice = "lower cluster.workers or what each takes, or add nodes"
        return failed(name, f"{lack}; nodes have {have}", advice)
    with_spare = sum(places(cluster, {**node, "CPU": node.get("CPU", 0.0) - 1}) for node in nodes)
    if with_spare < cluster.workers or cpus < cpus_wanted + 1:
        return warned(name, f"{wanted} fit, and fill their nodes; nodes have {have}", SPARE)
    return passed(name, f"{wanted} fit {_count(len(nodes), 'node')}, with CPUs to spare")


def check_this_machine(cluster: ClusterConfig, machine: Machine) -> Check:
    """Hold this machine's CPUs against the workers of a Ray that is started here."""
    needed = math.ceil(cluster.workers * cluster.cpus_per_worker)
    found = f"{_count(machine.cpus, 'CPU')} for {_wanted(cluster)}"
    if needed > machine.cpus:
        advice = "lower cluster.workers or cpus_per_worker: they will wait for each other"
        return warned("resources", found, advice)
    return passed("resources", found)


def places(cluster: ClusterConfig, node: Mapping[str, float]) -> int:
    """Return how many of the run's workers fit a node with these resources."""
    needs = {"CPU": cluster.cpus_per_worker, "GPU": cluster.gpus_per_worker}
    return max(0, min(int(node.get(name, 0.0) // need) for name, need in needs.items() if need))


def gpu_nodes(nodes: Sequence[Node]) -> list[Node]:
    """Return the nodes for which Ray counts GPUs."""
    return [node for node in nodes if node.resources.get("GPU", 0.0) > 0]


def _knock(name: str, host: str, port: int, source: str) -> Check:
    where = f"{host}:{port}"
    try:
        with socket.create_connection((host, port), CONNECT_S):
            return passed(name, f"{where} answers ({source})")
    except socket.gaierror:
        return failed(name, f"the name {host} is not known here ({source})", "see the service's name and the DNS")
    except ConnectionRefusedError:
        advice = "start the cluster, or name its head's HOST:6379"
        return failed(name, f"nobody listens at {where} ({source})", advice)
    except TimeoutError:
        advice = "see the address, network policies and firewalls"
        return failed(name, f"{where} gave no answer within {CONNECT_S:g} s ({source})", advice)
    except OSError as error:
        return failed(name, f"{where} cannot be reached: {error.strerror or error} ({source})", "see the network")


def _wanted(cluster: ClusterConfig) -> str:
    gpus = f" and {_count(cluster.gpus_per_worker, 'GPU')}" if cluster.gpus_per_worker else ""
    return f"{_count(cluster.workers, 'worker')} with {_count(cluster.cpus_per_worker, 'CPU')}{gpus} each"


def _count(number: float, of: str) -> str:
    return f"{number:g} {of}{'' if number == 1 else 's'}"


def _scaled(cluster: Cluster) -> str:
    return ", with an autoscaler" if cluster.is_autoscaled else ""
