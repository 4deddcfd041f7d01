"""The entry points of k8s/'s RayJobs, with their own config map, on three Ray nodes and a real S3 server."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml

from dti_ray.data.gather import write_parquet
from dti_ray.storage import Storage
from tests.conftest import INTER_HEADING, ITEM_HEADING
from tests.jobs import ROOT, JobCluster, job_cluster
from tests.manifests import K8S, entry_points, of_kind, render
from tests.seaweed import Seaweed

pytestmark = [
    pytest.mark.cluster, pytest.mark.long, pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(900),
]  # fmt: skip

USERS, ITEMS, INTERACTIONS = 30, 20, 20
SMALL = {
    "model": {"layers": 1, "hidden_size": 32, "heads": 4, "kv_heads": 2, "intermediate_size": 48},
    "packing": {"k": 4, "n": 3, "window": "off", "row_tokens": 512},
    "optim": {"lr": 1e-3, "epochs": 1, "targets_per_step": 32},
    "eval": {"every_targets": 200, "bootstrap": 100},
}
SPACE = {
    "tune": {
        "sweep": "two", "space": {"packing.k": {"grid": [2, 4]}}, "search": "grid", "scheduler": "none",
        "max_concurrent": 2,
    }
}  # fmt: skip


@pytest.fixture
def cluster(running_seaweed: Seaweed) -> Iterator[JobCluster]:
    running_seaweed.wait()
    # As in the image: the code lies on every node, and jobs are found wherever a driver starts.
    with job_cluster({**running_seaweed.environment, "PYTHONPATH": str(ROOT)}) as found:
        yield found


def lay_out(storage: Storage, folder: Path) -> None:
    """Write a small log in MovieLens-100K's layout to where `data get` puts it."""
    events = [
        f"{user}\t{(user * 7 + step) % ITEMS}\t{(user + step) % 5 + 1}\t{1_000_000 + step * 60 + user}"
        for user in range(USERS)
        for step in range(INTERACTIONS)
    ]
    items = [f"{item}\tFilm {item}\t1990\tDrama" for item in range(ITEMS)]
    for name, lines in (("inter", [INTER_HEADING, *events]), ("item", [ITEM_HEADING, *items])):
        (folder / f"ml-100k.{name}").write_text("\n".join(lines) + "\n")
    storage.upload(folder, "raw/ml-100k")
    asked = pa.table({"user_id": range(USERS), "candidates": [[1, 2, 3]] * USERS})
    write_parquet(storage, "requests", "part-0.parquet", asked)


def write_overlay(folder: Path, root: str) -> None:
    """Write what a user keeps beside k8s/: the overlay for one node, with a run and settings of their own."""
    run = yaml.safe_load((ROOT / "configs/demo.yaml").read_text())
    (settings,) = (
        yaml.safe_load(one["data"]["cluster.yaml"])
        for one in of_kind(render(K8S / "overlays/dev"), "ConfigMap")
        if "cluster.yaml" in one["data"]
    )
    settings["storage"]["root"] = root
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "namespace": "dti-ray",
        "resources": [os.path.relpath(K8S / "overlays/dev", folder)],
        "configMapGenerator": [
            {"name": "dti-ray", "behavior": "merge", "files": ["run.yaml", "tune.yaml", "cluster.yaml", "score.yaml"]}
        ],
    }
    place, mark, options = root.partition("?")
    asked = {"score": {"name": "asked", "input": f"{place}/requests{mark}{options}"}}
    texts = {
        "kustomization": kustomization, "run": {**run, **SMALL}, "tune": SPACE, "cluster": settings, "score": asked,
    }  # fmt: skip
    for name, tree in texts.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(tree))


def test_jobs_of_the_manifests_go_from_a_raw_log_to_a_finished_sweep(
    cluster: JobCluster, running_seaweed: Seaweed, tmp_path: Path
) -> None:
    for name in ("raw", "overlay", "mounted"):
        (tmp_path / name).mkdir()
    root = running_seaweed.root("manifests")
    storage = Storage(root)
    lay_out(storage, tmp_path / "raw")
    write_overlay(tmp_path / "overlay", root)
    manifests = render(tmp_path / "overlay")
    points = entry_points(manifests)
    jobs: dict[str, Any] = {one["metadata"]["name"]: one["spec"] for one in of_kind(manifests, "RayJob")}

    for name in ("prepare", "train", "evaluate", "tune", "score"):
        arguments = points[name].written(tmp_path / "mounted")
        cpus = str(jobs[name].get("entrypointNumCpus", 0))
        # What KubeRay's submitter runs.
        code, told = cluster.run(
            sys.executable, "-m", "ray.scripts.scripts", "job", "submit", f"--address={cluster.address}",
            f"--submission-id={name}", f"--entrypoint-num-cpus={cpus}", "--", *arguments,
        )  # fmt: skip
        assert code == 0, told

    assert storage.read_manifest("datasets/ml-100k") is not None
    evaluation = json.loads(storage.read("runs/demo/metrics/evaluation_test.json"))
    assert evaluation["metrics"]["targets"] == USERS * INTERACTIONS // 10
    assert storage.exists("sweeps/two/best.yaml")
    scores = storage.read_manifest("scores/asked")
    assert scores is not None
    assert (scores[1]["rows_out"], scores[1]["counts"]["pairs_scored"]) == (USERS, 3 * USERS)
    ledger = [json.loads(line) for line in storage.read("sweeps/two/ledger.jsonl").splitlines()]
    assert sum(one["event"] == "done" for one in ledger) == 2
