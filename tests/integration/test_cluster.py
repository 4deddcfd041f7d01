"""Jobs on a cluster of three Ray nodes and a real S3 server: sent, followed, killed, sent again, stopped."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from dti_ray.storage import Storage
from dti_ray.telemetry import read_lines
from dti_ray.train.checkpoint import list_checkpoints
from tests.builders import write_dataset
from tests.jobs import RUN, JobCluster, drivers, job_cluster, wait_until
from tests.seaweed import Seaweed

pytestmark = [pytest.mark.cluster, pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(900)]

LENGTHS = [30, 12, 25, 40, 18, 33]
LONG = "optim.epochs=200"  # it does not end by itself


@pytest.fixture(scope="module")
def cluster(running_seaweed: Seaweed) -> Iterator[JobCluster]:
    running_seaweed.wait()
    with job_cluster(running_seaweed.environment) as found:
        yield found


@pytest.fixture(scope="module")
def root(running_seaweed: Seaweed, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A root on S3 that holds a small data set."""
    running_seaweed.wait()
    folder = tmp_path_factory.mktemp("log")
    write_dataset(folder, LENGTHS, segment_interactions=30)
    found = running_seaweed.root("cluster")
    Storage(found).upload(folder, "")
    return found


def train(root: str, run: str, *more: str) -> list[str]:
    return ["submit", "train", "--root", root, *RUN, f"train.run={run}", *more]


def steps(root: str, run: str) -> list[int]:
    return [int(line["step"]) for line in read_lines(Storage(root), f"runs/{run}", "train")]


def is_training(root: str, run: str) -> bool:
    return len(steps(root, run)) > 5


def result(told: str) -> dict[str, object]:
    return json.loads(told.strip().splitlines()[-1])


def test_job_killed_is_failed_sent_again_goes_on_and_stopped_keeps_its_state(cluster: JobCluster, root: str) -> None:
    command = train(root, "killed", LONG, "--json")
    first = cluster.start(*command)
    wait_until(lambda: is_training(root, "killed"), "the job trains")
    twin = cluster.start(*command)
    assert twin.stdout is not None
    assert "job train.killed: lives already, attached" in twin.stdout.readline()
    (driver,) = drivers(["train.run=killed"])
    driver.kill()
    for follower in (first, twin):
        told, _ = follower.communicate(timeout=120)
        assert follower.returncode == 3, told
        assert result(told)["status"] == "FAILED"

    reached = steps(root, "killed")[-1]
    again = cluster.start(*command)
    wait_until(lambda: steps(root, "killed")[-1] > reached + 5, "it goes on")
    code, told = cluster.call(*train(root, "killed", "optim.epochs=1"))
    assert code == 2
    assert "train.killed~2: runs there with another configuration" in told
    code, told = cluster.call("jobs", "stop", "train.killed", "--json")
    assert (code, result(told)) == (0, {"id": "train.killed~2", "status": "STOPPED"}), told
    told, _ = again.communicate(timeout=120)
    assert again.returncode == 3, told
    assert "restored step" in told
    assert "SIGTERM: saving the state" in told
    assert not drivers(["train.run=killed"])

    trained = steps(root, "killed")
    newest = list_checkpoints(Storage(root), "runs/killed")[-1]
    assert newest.progress.step >= trained[-1], "the state was saved when it was stopped"
    assert trained == sorted(set(trained)), "no step twice"


def test_job_ends_well_though_a_node_of_its_workers_is_taken_away(cluster: JobCluster, root: str) -> None:
    job = cluster.start(*train(root, "moved", "optim.epochs=40", "--json"))
    wait_until(lambda: is_training(root, "moved"), "the job trains")
    cluster.replace_node(cluster.node_of("ray::RayTrainWorker"))
    told, _ = job.communicate(timeout=400)
    assert job.returncode == 0, told
    assert "attempt 2: 2 workers" in told
    assert "restored step" in told
    trained = steps(root, "moved")
    assert trained == sorted(set(trained)), "no step twice"


def test_log_can_be_left_and_read_again(cluster: JobCluster, root: str) -> None:
    code, told = cluster.call(*train(root, "left", "optim.epochs=1", "--detach", "--json"))
    assert (code, result(told)) == (0, {"id": "train.left", "attached": False}), told
    code, followed = cluster.call("jobs", "logs", "train.left", "--follow")
    assert code == 0, followed
    code, told = cluster.call("jobs", "logs", "train.left")
    assert told in followed, "the same text, and the word that it ended"
    code, told = cluster.call("jobs", "stop", "train.left")
    assert code == 0
    assert "had ended before (SUCCEEDED)" in told


def test_what_is_wrong_on_the_cluster_ends_the_command_here_with_the_same_code(cluster: JobCluster, root: str) -> None:
    code, told = cluster.call(*train(root, "nodata", "data.name=nowhere"))
    assert code == 2, told
    assert "nowhere" in told
    code, told = cluster.call("jobs", "logs", "train.nothing")
    assert code == 2
    assert "train.nothing: no such job; expected one of: train." in told


def test_wrong_token_is_told_in_words(cluster: JobCluster, root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cluster.environment, "RAY_AUTH_TOKEN", "wrong")
    code, told = cluster.call(*train(root, "refused"))
    assert code == 2, told
    assert "the cluster refused us" in told
    assert "RAY_AUTH_TOKEN" in told
    assert "Traceback" not in told
