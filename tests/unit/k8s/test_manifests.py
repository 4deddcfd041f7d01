"""Every folder of `k8s/` renders, and what it becomes is what Kubernetes and KubeRay take."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.manifests import K8S, ROOT, Manifest, clusters, entry_points, of_kind, overlay, pods, render

README = (K8S / "README.md").read_text(encoding="utf-8")
KUBERNETES = "1.33"
KUBERAY = "ray.io"
FOREIGN = ("monitoring.coreos.com",)  # their schemas are with their operators
KUSTOMIZATIONS = [yaml.safe_load(path.read_text(encoding="utf-8")) | {"at": path.parent}
                  for path in sorted(K8S.rglob("kustomization.yaml"))]  # fmt: skip
FOLDERS = [one["at"] for one in KUSTOMIZATIONS if one["kind"] == "Kustomization"]
COMPONENTS = [one["at"] for one in KUSTOMIZATIONS if one["kind"] == "Component"]

RAYS = [folder for folder in FOLDERS if folder.relative_to(K8S).parts[0] in ("base", "jobs", "overlays", "serve")]

each_folder = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: str(folder.relative_to(K8S)))
each_of_rays = pytest.mark.parametrize("folder", RAYS, ids=lambda folder: str(folder.relative_to(K8S)))


def test_all_folders_are_tested() -> None:
    names = {str(folder.relative_to(K8S)) for folder in FOLDERS}
    overlays = {f"overlays/{name}" for name in ("dev", "kueue", "multinode", "spot")}
    assert {"base", "jobs", "serve", *overlays} <= names


@each_folder
def test_folder_renders_by_plain_kubectl(folder: Path) -> None:
    assert render(folder)


def test_every_component_is_laid_over_something() -> None:
    used = {(one["at"] / name).resolve() for one in KUSTOMIZATIONS for name in one.get("components", [])}
    assert set(COMPONENTS) <= used


def test_readme_lays_an_overlay_components_and_settings_over_each_other(tmp_path: Path) -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    text = text.replace("../k8s", os.path.relpath(K8S, tmp_path.resolve()))  # kustomize takes no absolute path
    (tmp_path / "kustomization.yaml").write_text(text, encoding="utf-8")
    for name in ("shop.yaml", "settings.yaml"):
        (tmp_path / name).write_text("train: {run: shop}\n", encoding="utf-8")
    manifests = render(tmp_path.resolve())
    (train,) = [job for job in of_kind(manifests, "RayJob") if job["metadata"]["name"] == "train"]
    workers = train["spec"]["rayClusterSpec"]["workerGroupSpecs"][1]
    assert train["spec"]["suspend"] is True
    assert (workers["replicas"], gpus(workers)) == (2, 8)
    assert "affinity" in workers["template"]["spec"]
    images = {one["image"].partition(":")[0] for pod in pods(manifests) for one in pod.containers}
    assert images == {"registry.example.com/dti-ray"}
    assert entry_points(manifests)["train"].files["run.yaml"] == "train: {run: shop}\n"


def test_readme_names_folders_and_jobs_that_there_are() -> None:
    folders, jobs = set(re.findall(r"-k (k8s/\S+)", README)), set(re.findall(r"-l dti-ray/job=(\S+)", README))
    assert {"k8s/base", "k8s/jobs"} <= folders
    assert {ROOT / folder for folder in folders} <= set(FOLDERS)
    assert jobs
    assert jobs <= set(entry_points(render(K8S / "jobs")))


@each_folder
def test_what_kubernetes_knows_itself_is_valid(folder: Path) -> None:
    for manifest in render(folder):
        if group_of(manifest) not in (KUBERAY, *FOREIGN):
            kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


@each_folder
def test_what_kuberay_knows_is_valid(folder: Path) -> None:
    for manifest in render(folder):
        if group_of(manifest) == KUBERAY:
            assert list(faults(manifest)) == []


def test_a_typo_is_found_in_a_pod_of_a_job_and_in_a_job() -> None:
    job = copy.deepcopy(of_kind(render(K8S / "jobs"), "RayJob")[0])
    job["spec"]["backoffLimits"] = 3
    job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["imagePullpolicy"] = "Always"
    job["spec"]["submissionMode"] = 4
    told = " ".join(faults(job))
    assert all(name in told for name in ("backoffLimits", "imagePullpolicy", "submissionMode"))


def test_a_typo_is_found_in_what_kubernetes_knows() -> None:
    account = copy.deepcopy(of_kind(render(K8S / "base"), "ServiceAccount")[0])
    account["automountServiceAccountTokens"] = False
    with pytest.raises(kubernetes_validate.ValidationError, match="automountServiceAccountTokens"):
        kubernetes_validate.validate(account, KUBERNETES, strict=True)


@each_of_rays
def test_config_maps_are_named_by_their_content_wherever_they_are_mounted(folder: Path) -> None:
    manifests = render(folder)
    names = {one["metadata"]["name"] for one in of_kind(manifests, "ConfigMap")}
    of_kubernetes = {"kube-root-ca.crt"}
    assert names.isdisjoint({"dti-ray"})
    assert set(mounted(list(manifests))) <= names | of_kubernetes


@each_of_rays
def test_everything_lies_in_one_namespace(folder: Path) -> None:
    elsewhere = [
        one["metadata"]["name"]
        for one in render(folder)
        if one["kind"] != "Namespace" and one["metadata"].get("namespace") != "dti-ray"
    ]
    assert elsewhere == []


def test_base_keeps_a_cluster_and_jobs_bring_their_own() -> None:
    assert [one["kind"] for one in render(K8S / "base") if group_of(one) == KUBERAY] == ["RayCluster"]
    (kept,) = [cluster for _, cluster in clusters(render(K8S / "base"))]
    train = next(cluster for name, cluster in clusters(render(K8S / "jobs")) if name == "train")
    assert train == kept
    assert not of_kind(render(K8S / "jobs"), "RayCluster")


def test_dev_has_storage_and_no_gpu() -> None:
    manifests = overlay("dev")
    assert [group for _, cluster in clusters(manifests) for group in cluster["workerGroupSpecs"] if gpus(group)] == []
    assert [one["metadata"]["name"] for one in of_kind(manifests, "StatefulSet")] == ["storage"]


def gpus(group: Manifest) -> int:
    return int(group["template"]["spec"]["containers"][0]["resources"]["limits"].get("nvidia.com/gpu", 0))


def group_of(manifest: Manifest) -> str:
    return manifest["apiVersion"].rpartition("/")[0]


def mounted(tree: Any) -> Iterator[str]:
    """Yield the config maps that volumes name, anywhere in a manifest."""
    if isinstance(tree, dict):
        if isinstance(tree.get("configMap"), dict):
            yield tree["configMap"]["name"]
        tree = list(tree.values())
    if isinstance(tree, list):
        for branch in tree:
            yield from mounted(branch)


def faults(manifest: Manifest) -> Iterator[str]:
    for error in crd(manifest["kind"]).iter_errors(manifest):
        yield f"{error.json_path}: {error.message}"


@cache
def crd(kind: str) -> jsonschema.Draft202012Validator:
    """Return what KubeRay's own definition says of a kind; fields that it does not name are faults."""
    folder = Path(os.environ.get("DTI_RAY_CRD_DIR") or ROOT.parent / "shared" / "crds")
    path = folder / f"ray.io_{kind.lower()}s.yaml"
    if not path.is_file():
        pytest.skip(f"no {path}: put KubeRay's definitions there, or name their folder with DTI_RAY_CRD_DIR")
    definition = yaml.load(path.read_text(encoding="utf-8"), yaml.CSafeLoader)
    (version,) = [one for one in definition["spec"]["versions"] if one["name"] == "v1"]
    return jsonschema.Draft202012Validator(closed(version["schema"]["openAPIV3Schema"]))


def closed(schema: Any) -> Any:
    """Return a schema in which an object has the fields that it names and no others."""
    if isinstance(schema, list):
        return [closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {key: closed(value) for key, value in schema.items()}
    is_open = "additionalProperties" in schema or schema.get("x-kubernetes-preserve-unknown-fields")
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object" and not is_open:
        inner["additionalProperties"] = False
    return inner
