"""The doctor before a real Ray cluster and a real S3 server, sound and unsound."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from dti_ray.doctor.check import Check, Look, Status, result
from dti_ray.doctor.examine import examine
from dti_ray.doctor.joined import Request, ask_cluster
from dti_ray.doctor.machine import Question
from dti_ray.doctor.place import check_clock, reach
from dti_ray.doctor.resources import check_joined
from dti_ray.storage import Storage
from tests.builders import make_config, write_dataset
from tests.ray_nodes import MEMORY, start_nodes
from tests.seaweed import Seaweed

pytestmark = [pytest.mark.long, pytest.mark.integration]


@pytest.fixture(scope="module")
def nodes() -> Iterator[Cluster]:
    """A head, a node of two CPUs, and one that claims a GPU."""
    cluster, _ = start_nodes(1, cpus=2)
    cluster.add_node(num_cpus=2, num_gpus=1, object_store_memory=MEMORY)
    yield cluster
    cluster.shutdown()


def checks_of(root: str, address: str, *overrides: str) -> dict[str, Check]:
    given = [f"storage.root={root}", "data.name=tiny", "packing.n=4", f"cluster.address={address}", *overrides]
    return {check.name: check for group in examine(make_config(*given)) for check in group.checks}


def failed(found: dict[str, Check]) -> list[str]:
    return [name for name, check in found.items() if check.status is Status.FAIL]


def test_sound_cluster_and_object_store_pass(nodes: Cluster, seaweed: Seaweed, tmp_path: Path) -> None:
    write_dataset(tmp_path, [30, 25, 41])
    root = seaweed.root("doctor")
    storage = Storage(root)
    storage.upload(tmp_path, "")
    found = checks_of(root, nodes.address)
    assert failed(found) == []
    assert found["cluster"].found.startswith("3 nodes, Ray 2.")
    assert found["node storage"].status is Status.PASS
    assert found["data set"].found.endswith("2 of 2 files verified")
    assert found["open files"].found.startswith("3 of 3 machines")
    assert storage.list("") == ["datasets"], "nothing is left behind"


def test_cluster_that_is_too_small_fails_and_a_folder_is_looked_for_on_every_node(
    nodes: Cluster, tmp_path: Path
) -> None:
    found = checks_of(str(tmp_path), nodes.address, "cluster.workers=4", "cluster.cpus_per_worker=2")
    assert failed(found) == ["resources"]
    assert "2 of 4 workers with 2 CPUs each fit" in found["resources"].found
    assert found["node storage"].status is Status.PASS, "all nodes are this machine, and see its folders"


def test_gpus_are_looked_for_on_the_nodes_that_claim_them(nodes: Cluster, tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has GPUs")
    found = checks_of(str(tmp_path), nodes.address, "cluster.workers=1", "cluster.gpus_per_worker=1")
    assert failed(found) == ["gpus"]
    assert socket.gethostname() in found["gpus"].found, "the node that claims it is named"
    assert found["resources"].status is Status.PASS


@pytest.mark.parametrize("mode", ["token", "disabled"])
def test_token_that_is_wrong_or_not_shown_is_refused_in_words(
    mode: str, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = ray.get_runtime_context().gcs_address  # what `ray.init` starts asks for a token
    monkeypatch.setenv("RAY_AUTH_MODE", mode)
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    with pytest.raises(RuntimeError) as caught:
        ask_cluster(Request(address, Question(), 30), limit_s=120)
    check = check_joined(address, caught.value)
    assert check.status is Status.FAIL
    assert f"{address} wants a token: RPC error: InvalidAuthToken" in check.found
    assert "RAY_AUTH_TOKEN" in check.advice


def test_port_that_is_not_rays_is_not_waited_for() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        start = time.monotonic()
        with pytest.raises((RuntimeError, TimeoutError)) as caught:
            ask_cluster(Request(f"127.0.0.1:{silent.getsockname()[1]}", Question(), 5), limit_s=15)
    assert time.monotonic() - start < 30
    assert check_joined("there", caught.value).status is Status.FAIL


@pytest.mark.slow
def test_node_that_stands_still_is_named_and_the_others_answer(nodes: Cluster) -> None:
    frozen = nodes.add_node(num_cpus=1, object_store_memory=MEMORY, resources={"frozen": 1})
    time.sleep(5)  # until all others know of it
    raylet = frozen.all_processes["raylet"][0].process.pid
    os.kill(raylet, signal.SIGSTOP)
    try:
        found = ask_cluster(Request(nodes.address, Question(), 30), limit_s=120)
    finally:
        os.kill(raylet, signal.SIGCONT)
        nodes.remove_node(frozen)
    assert len(found.nodes) == 4
    silent = [node for node in found.nodes if node.machine is None]
    assert [list(node.resources) for node in silent if "frozen" in node.resources], silent
    assert {node.trouble for node in silent} == {"no answer within 30 s"}
    assert len(silent) == 1


def test_object_store_answers_and_its_clock_agrees(seaweed: Seaweed) -> None:
    found = reach(seaweed.root("clock"))
    assert found.skew_s is not None
    assert check_clock(found.skew_s).status is Status.PASS
    assert Storage(seaweed.root("clock")).list("") == []


def test_wrong_key_is_refused_in_words_that_do_not_hold_it(seaweed: Seaweed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-key")
    found = result("storage", Look(lambda: reach(seaweed.root("keys"))), 30)
    assert isinstance(found, Check)
    assert found.status is Status.FAIL
    assert "cannot be listed" in found.found
    assert "not-the-key" not in found.found + found.advice
