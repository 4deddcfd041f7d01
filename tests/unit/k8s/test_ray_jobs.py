"""What the RayJobs of `k8s/` run, with which configuration, on nodes of which size; and what KubeRay checks itself."""

from __future__ import annotations

import importlib.util
import math
import re
import shlex
from pathlib import Path

import pytest
import typer
from typer.core import TyperGroup

from dti_ray.cli import app
from dti_ray.config import RunConfig, load_config
from tests.manifests import GROUPS, K8S, ROOT, EntryPoint, Manifest, clusters, entry_points, of_kind, quantity, render

FOLDERS = [K8S / "jobs", *sorted(path for path in (K8S / "overlays").iterdir() if path.is_dir())]
JOBS = sorted(path.stem for path in (ROOT / "jobs").glob("[a-z]*.py"))
LONGEST_NAME = 47  # that leaves room for what KubeRay appends

each_folder = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: str(folder.relative_to(K8S)))
each_run = pytest.mark.parametrize(
    ("folder", "name"), [(folder, name) for folder in FOLDERS for name in JOBS], ids=lambda part: Path(part).name
)


def parsed(arguments: list[str]) -> dict[str, object]:
    """Return what our command line reads in its arguments, command first."""
    commands = typer.main.get_command(app)
    assert isinstance(commands, TyperGroup)
    return commands.commands[arguments[0]].make_context(arguments[0], arguments[1:]).params


def config_of(entry: EntryPoint, folder: Path) -> RunConfig:
    """Return the configuration that a job will run with."""
    words = parsed([entry.name, *entry.written(folder)[3:]])
    files, rest = words["files"], words.get("overrides", words.get("arguments"))
    assert isinstance(files, list)
    assert isinstance(rest, list)
    return load_config(files, rest)


@each_folder
def test_there_is_a_job_for_each_module(folder: Path) -> None:
    assert sorted(entry_points(render(folder))) == JOBS


@each_run
def test_entry_point_is_a_command_of_ours(folder: Path, name: str, tmp_path: Path) -> None:
    entry = entry_points(render(folder))[name]
    assert entry.arguments[:3] == ("python", "-m", f"jobs.{name}")
    assert importlib.util.find_spec(entry.arguments[2])
    assert parsed([name, *entry.arguments[3:]])["as_json"] is True
    assert config_of(entry, tmp_path)


@each_folder
def test_doctor_looks_at_what_is_run(folder: Path) -> None:
    for name, cluster in clusters(render(folder)):
        (doctor,) = cluster["headGroupSpec"]["template"]["spec"]["initContainers"]
        (ray,) = cluster["headGroupSpec"]["template"]["spec"]["containers"]
        assert doctor["command"][0] == "dti-ray"
        assert [doctor[key] for key in ("image", "env", "volumeMounts")] == [
            ray[key] for key in ("image", "env", "volumeMounts")
        ], name
        words = parsed([*doctor["command"][1:], *doctor["args"]])
        entry = entry_points(render(folder))[name]
        assert words["no_cluster"] is True
        assert {str(file) for file in words["files"]} <= set(entry.arguments)  # type: ignore[attr-defined]


@each_run
def test_nodes_hold_their_workers_and_a_spare_cpu(folder: Path, name: str, tmp_path: Path) -> None:
    if name not in ("train", "tune", "evaluate", "score"):
        return
    run = config_of(entry_points(render(folder))[name], tmp_path)
    config, trials = run.cluster, run.tune.max_concurrent if name == "tune" else 1
    cluster = next(cluster for other, cluster in clusters(render(folder)) if other == name)
    data, train = cluster["workerGroupSpecs"]
    node = train["template"]["spec"]["containers"][0]["resources"]["limits"]
    on_a_node = math.ceil(trials * config.workers / train["replicas"])
    assert quantity(node["cpu"]) >= on_a_node * config.cpus_per_worker + 1
    assert quantity(node.get("nvidia.com/gpu", 0)) >= on_a_node * config.gpus_per_worker
    assert train["replicas"] <= train["maxReplicas"]
    packers = data["replicas"] * quantity(data["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"])
    spare = train["replicas"] * quantity(node["cpu"]) - trials * config.workers * config.cpus_per_worker
    assert packers + spare >= trials * config.data_cpus + train["replicas"]


def test_multinode_is_two_nodes_of_eight_gpus(tmp_path: Path) -> None:
    manifests = render(K8S / "overlays" / "multinode")
    cluster = next(cluster for name, cluster in clusters(manifests) if name == "train")
    train = cluster["workerGroupSpecs"][1]
    assert (train["replicas"], train["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]) == (
        2,
        8,
    )
    assert config_of(entry_points(manifests)["train"], tmp_path).cluster.workers == 16


def test_a_run_goes_on_from_one_gpu_to_sixteen(tmp_path: Path) -> None:
    small, large = (entry_points(render(K8S / name))["train"] for name in ("jobs", "overlays/multinode"))
    small_config, large_config = config_of(small, tmp_path), config_of(large, tmp_path)
    assert small_config.packing == large_config.packing
    assert small_config.storage == large_config.storage


@each_folder
def test_jobs_that_prepare_wait_for_no_node_that_trains(folder: Path) -> None:
    replicas = {name: [group["replicas"] for group in cluster["workerGroupSpecs"]]
                for name, cluster in clusters(render(folder))}  # fmt: skip
    assert replicas["prepare"][1] == 0
    assert all(replicas[name][1] >= 1 for name in JOBS if name != "prepare")
    assert all(counts[0] >= 1 for counts in replicas.values()), "a trial's own process needs a CPU"


@each_folder
def test_drivers_ask_for_nothing_since_workers_compute(folder: Path) -> None:
    for job in of_kind(render(folder), "RayJob"):
        assert not [key for key in job["spec"] if key.startswith("entrypointNum")], job["metadata"]["name"]


@each_folder
def test_jobs_can_be_applied_one_by_one(folder: Path) -> None:
    labels = {one["metadata"]["name"]: one["metadata"]["labels"] for one in of_kind(render(folder), "RayJob")}
    assert {name: label["dti-ray/job"] for name, label in labels.items()} == {name: name for name in JOBS}
    others = [one for one in render(folder) if one["kind"] not in ("RayJob", "Job")]
    assert not [one["metadata"]["name"] for one in others if "dti-ray/job" in one["metadata"]["labels"]]


@each_folder
def test_kuberay_accepts_what_no_schema_says(folder: Path) -> None:
    for job in of_kind(render(folder), "RayJob"):
        check_job(job["metadata"]["name"], job["spec"])
    for name, cluster in clusters(render(folder)):
        check_cluster(name, cluster)


def test_kueue_gets_whole_clusters_that_give_their_nodes_back() -> None:
    for job in of_kind(render(K8S / "overlays" / "kueue"), "RayJob"):
        assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "dti-ray"
        assert job["spec"]["suspend"] is True
        assert job["spec"]["shutdownAfterJobFinishes"] is True
        assert job["spec"]["rayClusterSpec"]["enableInTreeAutoscaling"] is False
        assert len(job["spec"]["rayClusterSpec"]["workerGroupSpecs"]) <= 7


def check_job(name: str, spec: Manifest) -> None:
    """Hold a RayJob against what KubeRay 1.7 checks before it acts."""
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name)
    assert len(name) <= LONGEST_NAME
    assert spec["submissionMode"] == "K8sJobMode"
    assert spec["backoffLimit"] > 0 < spec["submitterConfig"]["backoffLimit"]
    assert spec["activeDeadlineSeconds"] > spec["preRunningDeadlineSeconds"] > 0
    assert not spec.get("suspend") or spec.get("shutdownAfterJobFinishes")
    assert bool(spec.get("shutdownAfterJobFinishes")) != ("deletionStrategy" in spec), "either, not both"
    rules = spec.get("deletionStrategy", {}).get("deletionRules", [])
    for end in ({"jobStatus": "SUCCEEDED"}, {"jobDeploymentStatus": "Failed"}):
        after_s = [
            (one["policy"], one["condition"]["ttlSeconds"]) for one in rules if end.items() <= one["condition"].items()
        ]
        assert not rules or [policy for policy, _ in after_s] == ["DeleteCluster", "DeleteSelf"]
        assert [seconds for _, seconds in after_s] == sorted(seconds for _, seconds in after_s)
    assert shlex.join(shlex.split(spec["entrypoint"])) == spec["entrypoint"], "KubeRay hands it to a shell as it is"


def check_cluster(name: str, spec: Manifest) -> None:
    """Hold a cluster against what KubeRay 1.7 checks before it acts."""
    assert tuple(group["groupName"] for group in spec["workerGroupSpecs"]) == GROUPS, name
    assert spec["authOptions"] == {"mode": "token"}, name
    assert ("autoscalerOptions" in spec) == spec["enableInTreeAutoscaling"], name
    for group in spec["workerGroupSpecs"]:
        assert 0 <= group["minReplicas"] <= group["maxReplicas"], name
        assert group["replicas"] <= group["maxReplicas"], name
    templates = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    assert all("restartPolicy" not in one["template"]["spec"] for one in templates), name
