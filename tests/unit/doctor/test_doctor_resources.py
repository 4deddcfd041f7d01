"""A cluster is refused in words: nobody there, no token, other versions, too small."""

from __future__ import annotations

import socket
import time
from dataclasses import replace

import pytest

from dti_ray.config import ClusterConfig
from dti_ray.doctor.check import Status
from dti_ray.doctor.joined import Cluster, Node
from dti_ray.doctor.machine import Disk, Machine
from dti_ray.doctor.resources import (
    address_of,
    check_address,
    check_joined,
    check_nodes,
    check_reach,
    check_resources,
    check_this_machine,
    gpu_nodes,
    places,
)

ASKED = ClusterConfig(workers=4, cpus_per_worker=2, gpus_per_worker=1, data_cpus=2)
DISK = Disk("/tmp", 1, 10**12, 10**12)
MACHINE = Machine("a", {"ray": "2.60.0"}, 8, 65_536, None, DISK, DISK)
NODE = Node("a", {"CPU": 8.0}, MACHINE)


@pytest.mark.parametrize(
    ("configured", "environment", "address"),
    [
        (None, {}, None),
        (None, {"RAY_ADDRESS": "head:6379"}, "head:6379"),
        ("other:6379", {"RAY_ADDRESS": "head:6379"}, "other:6379"),
        ("local", {"RAY_ADDRESS": "head:6379"}, None),
    ],
)
def test_address_is_the_one_that_a_run_joins(
    configured: str | None, environment: dict[str, str], address: str | None
) -> None:
    assert address_of(ClusterConfig(address=configured), environment) == address


def test_no_address_means_a_ray_of_its_own() -> None:
    found = check_address(None, is_configured=False)
    assert (found.status, found.found) == (Status.PASS, "none is named: a run starts a Ray of its own on this machine")


def test_port_that_listens_passes_and_one_that_does_not_is_told_from_it() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        where = f"127.0.0.1:{server.getsockname()[1]}"
        assert check_address(where, is_configured=True).found == f"{where} answers (cluster.address)"
        assert check_address(f"ray://{where}", is_configured=True).status is Status.PASS
    found = check_address(where, is_configured=False)
    assert (found.status, found.found) == (Status.FAIL, f"nobody listens at {where} (RAY_ADDRESS)")


@pytest.mark.parametrize("address", ["head", "head:port", "head:99999", "ray://"])
def test_what_is_no_address_is_refused(address: str) -> None:
    found = check_address(address, is_configured=True)
    assert (found.status, found.found) == (Status.FAIL, f"cluster.address={address} is no address")


def test_address_of_the_dashboard_is_told_from_that_of_the_head() -> None:
    found = check_address("http://head:8265", is_configured=True)
    assert found.status is Status.FAIL
    assert "takes jobs but no drivers" in found.found
    assert "dti-ray submit" in found.advice


def test_name_that_nobody_knows_is_told() -> None:
    start = time.monotonic()
    found = check_address("no-such-host.invalid:6379", is_configured=True)
    assert found.status is Status.FAIL
    assert "no-such-host.invalid" in found.found
    assert time.monotonic() - start < 30


@pytest.mark.parametrize(
    ("error", "found", "advice"),
    [
        (
            RuntimeError("ray.exceptions.AuthenticationError: bad. Ensure that it"),
            "wants a token: bad.",
            "RAY_AUTH_TOKEN",
        ),
        (RuntimeError("RuntimeError: Version mismatch: Ray: 2.61.0"), "Version mismatch", "the cluster's versions"),
        (TimeoutError("no answer within 9 s"), "does not let us in: no answer within 9 s", "6379"),
        (RuntimeError("ConnectionError: Could not find any running Ray instance"), "Could not find", "dti-ray submit"),
    ],
)
def test_refusal_of_a_cluster_is_told_in_words(error: Exception, found: str, advice: str) -> None:
    check = check_joined("head:6379", error)
    assert check.status is Status.FAIL
    assert found in check.found
    assert advice in check.advice


def test_nodes_that_answer_pass_and_a_silent_one_fails() -> None:
    silent = Node("b", {}, None, "ModuleNotFoundError: No module named 'dti_ray'")
    assert check_nodes(Cluster((NODE, NODE), False)).found == "2 nodes, Ray 2.60.0"
    found = check_nodes(Cluster((NODE, silent), True))
    assert found.status is Status.FAIL
    assert found.found == "2 nodes, Ray 2.60.0, with an autoscaler; b: ModuleNotFoundError: No module named 'dti_ray'"


def test_node_that_does_not_see_what_the_driver_sees_fails() -> None:
    assert check_reach([MACHINE]).status is Status.PASS
    assert check_reach([]).status is Status.SKIP
    assert check_reach([MACHINE, replace(MACHINE, root_trouble="s3://b: no keys")]).found == "a: s3://b: no keys"
    assert check_reach([replace(MACHINE, missing=("/models/x",))]).found == "not there: /models/x on a"


@pytest.mark.parametrize(
    ("nodes", "is_autoscaled", "status", "words"),
    [
        ([{"CPU": 12, "GPU": 4}], False, Status.PASS, "fit 1 node, with CPUs to spare"),
        ([{"CPU": 5, "GPU": 2}] * 2 + [{"CPU": 4}], False, Status.PASS, "fit 3 nodes"),
        ([{"CPU": 4, "GPU": 2}] * 2 + [{"CPU": 4}], False, Status.WARN, "fill their nodes"),
        ([{"CPU": 8, "GPU": 4}], False, Status.FAIL, "leave none of 8 CPUs to packing"),
        ([{"CPU": 16, "GPU": 2}], False, Status.FAIL, "2 of 4 workers with 2 CPUs and 1 GPU each fit"),
        ([{"CPU": 16}], False, Status.FAIL, "0 of 4 workers with 2 CPUs and 1 GPU each fit; nodes have 16 CPUs 0 GPUs"),
        ([{"CPU": 1}], True, Status.WARN, "0 of 4 workers with 2 CPUs and 1 GPU each fit now"),
        ([], False, Status.FAIL, "0 of 4"),
    ],
)
def test_workers_must_fit_nodes_and_leave_a_cpu(
    nodes: list[dict[str, float]], is_autoscaled: bool, status: Status, words: str
) -> None:
    found = check_resources(ASKED, nodes, is_autoscaled)
    assert (found.status, words in found.found) == (status, True), found.found


def test_places_of_a_node_are_bounded_by_cpus_and_gpus() -> None:
    assert places(ASKED, {"CPU": 8, "GPU": 3}) == 3
    assert places(ASKED, {"CPU": 3, "GPU": 3}) == 1
    assert places(replace_gpus(0), {"CPU": 7}) == 3
    assert places(ASKED, {"CPU": -1, "GPU": 1}) == 0


def replace_gpus(gpus: float) -> ClusterConfig:
    return ASKED.model_copy(update={"gpus_per_worker": gpus})


def test_workers_of_a_local_ray_should_not_outnumber_cpus() -> None:
    assert check_this_machine(ASKED, MACHINE).status is Status.PASS
    assert check_this_machine(ASKED, replace(MACHINE, cpus=4)).status is Status.WARN


def test_gpu_nodes_are_those_for_which_ray_counts_some() -> None:
    trains = Node("b", {"CPU": 8.0, "GPU": 2.0}, MACHINE)
    assert gpu_nodes([NODE, trains]) == [trains]
