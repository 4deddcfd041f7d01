"""What the folders of `k8s/` become, rendered by kubectl's own kustomize; and what their RayJobs run."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
K8S = ROOT / "k8s"
GROUPS = ("data", "train")  # of workers, in the order in which patches count them

Manifest = dict[str, Any]


@dataclass(frozen=True)
class Pod:
    """A pod that a manifest asks for.

    Attributes:
        name: where it comes from, as in `train/workers/data`.
        role: head, data, train, submitter; else the kind of the manifest.
        spec: of the pod.
    """

    name: str
    role: str
    spec: Manifest

    @property
    def containers(self) -> list[Manifest]:
        """Those that run, and those that run before."""
        return [*self.spec["containers"], *self.spec.get("initContainers", [])]


@dataclass(frozen=True)
class EntryPoint:
    """What a RayJob runs.

    Attributes:
        name: of the RayJob.
        arguments: `python -m jobs.<name>` and the rest; they name files below `folder`.
        files: name to text, of the config map that its pods mount.
        folder: where they mount it.
    """

    name: str
    arguments: tuple[str, ...]
    files: Mapping[str, str]
    folder: str

    def written(self, to: Path) -> list[str]:
        """Write the files to a local folder, and return the arguments that name them there."""
        for name, text in self.files.items():
            (to / name).write_text(text, encoding="utf-8")
        return [argument.replace(f"{self.folder}/", f"{to}/") for argument in self.arguments]


@cache
def render(folder: Path) -> tuple[Manifest, ...]:
    """Return what `kubectl apply -k` would send; do not change it.

    Raises:
        AssertionError: with what kustomize says.
    """
    kubectl = Path(sys.executable).with_name("kubectl")
    done = subprocess.run([kubectl, "kustomize", folder], capture_output=True, text=True)
    assert done.returncode == 0, f"{folder}: {done.stderr}"
    return tuple(yaml.load_all(done.stdout, yaml.CSafeLoader))


def overlay(name: str) -> tuple[Manifest, ...]:
    """Return what an overlay of `k8s/overlays` becomes."""
    return render(K8S / "overlays" / name)


def entry_points(manifests: tuple[Manifest, ...]) -> dict[str, EntryPoint]:
    """Return what each RayJob runs, by its name."""
    maps = {one["metadata"]["name"]: one["data"] for one in manifests if one["kind"] == "ConfigMap"}
    found = {}
    for job in of_kind(manifests, "RayJob"):
        head = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
        names = {volume["name"]: volume["configMap"]["name"] for volume in head["volumes"] if "configMap" in volume}
        (mount,) = [mount for mount in head["containers"][0]["volumeMounts"] if mount["name"] in names]
        name, arguments = job["metadata"]["name"], tuple(shlex.split(job["spec"]["entrypoint"]))
        found[name] = EntryPoint(name, arguments, maps[names[mount["name"]]], mount["mountPath"])
    return found


def of_kind(manifests: tuple[Manifest, ...], kind: str) -> list[Manifest]:
    """Return the manifests of one kind."""
    return [one for one in manifests if one["kind"] == kind]


def clusters(manifests: tuple[Manifest, ...]) -> Iterator[tuple[str, Manifest]]:
    """Yield (name of its manifest, spec) of every Ray cluster."""
    for one in manifests:
        if one["kind"] == "RayCluster":
            yield one["metadata"]["name"], one["spec"]
        elif one["kind"] == "RayJob":
            yield one["metadata"]["name"], one["spec"]["rayClusterSpec"]
        elif one["kind"] == "RayService":
            yield one["metadata"]["name"], one["spec"]["rayClusterConfig"]


def pods(manifests: tuple[Manifest, ...]) -> Iterator[Pod]:
    """Yield every pod that the manifests ask for, but for what the operator adds itself."""
    for name, cluster in clusters(manifests):
        yield Pod(f"{name}/head", "head", cluster["headGroupSpec"]["template"]["spec"])
        for group in cluster["workerGroupSpecs"]:
            yield Pod(f"{name}/workers/{group['groupName']}", group["groupName"], group["template"]["spec"])
    for job in of_kind(manifests, "RayJob"):
        submitter = job["spec"]["submitterPodTemplate"]["spec"]
        yield Pod(f"{job['metadata']['name']}/submitter", "submitter", submitter)
    for one in manifests:
        if one["kind"] in ("Job", "StatefulSet"):
            yield Pod(one["metadata"]["name"], one["kind"], one["spec"]["template"]["spec"])


def quantity(text: object) -> float:
    """Return what a quantity of Kubernetes amounts to, as in 500m or 16Gi."""
    units = {"m": 1e-3, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
    number = str(text)
    unit = next((unit for unit in units if number.endswith(unit)), "")
    return float(number.removesuffix(unit)) * units.get(unit, 1)
