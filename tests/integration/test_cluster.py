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


def test_job_outlives_its_driver_and_a_node_and_is_stopped_with_its_state_saved(cluster: JobCluster, root: str) -> None:
    command = train(root, "long", LONG, "--json")
    first = cluster.start(*command)
    wait_until(lambda: is_training(root, "long"), "the job trains")
    twin = cluster.start(*command)
    assert twin.stdout is not None
    assert "job train.long: lives already, attached" in twin.stdout.readline()
    (driver,) = drivers(["train.run=long"])
    driver.kill()
    for follower in (first, twin):
        told, _ = follower.communicate(timeout=120)
        assert follower.returncode == 3, told
        assert result(told)["status"] == "FAILED"

    reached = steps(root, "long")[-1]
    again = cluster.start(*command)
    wait_until(lambda: steps(root, "long")[-1] > reached + 5, "it goes on")
    code, told = cluster.call(*train(root, "long", "optim.epochs=1"))
    assert code == 2
    assert "train.long~2: runs there with another configuration" in told

    cluster.replace_node(cluster.node_of("ray::RayTrainWorker"))
    reached = steps(root, "long")[-1]
    wait_until(lambda: steps(root, "long")[-1] > reached + 5, "it goes on without a person")
    code, told = cluster.call("jobs", "stop", "train.long", "--json")
    assert (code, result(told)) == (0, {"id": "train.long~2", "status": "STOPPED"}), told
    told, _ = again.communicate(timeout=120)
    assert again.returncode == 3, told
    for words in ("attempt 1: 2 workers", "attempt 2: 2 workers", "restored step", "SIGTERM: saving the state"):
        assert words in told, told
    assert not drivers(["train.run=long"])

    trained = steps(root, "long")
    newest = list_checkpoints(Storage(root), "runs/long")[-1]
    assert newest.progress.step >= trained[-1], "the state was saved when it was stopped"
    assert trained == sorted(set(trained)), "no step twice"


def test_log_can_be_left_and_read_again(cluster: JobCluster, root: str) -> None:
    code, told = cluster.call("submit", "evaluate", "--root", root, "train.run=long", "--detach", "--json")
    assert (code, result(told)) == (0, {"id": "evaluate.long", "attached": False}), told
    code, followed = cluster.call("jobs", "logs", "evaluate.long", "--follow")
    assert code == 0, followed
    code, told = cluster.call("jobs", "logs", "evaluate.long")
    assert told in followed, "the same text, and the word that it ended"
    code, told = cluster.call("jobs", "stop", "evaluate.long")
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
