"""What the RayService of `k8s/serve` serves, to whom, and what KubeRay and Ray Serve take of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from ray import serve
from ray.serve.schema import ServeDeploySchema

from dti_ray.config import load_config
from dti_ray.serve import app as serving
from dti_ray.serve.local import SLACK_S
from tests.manifests import K8S, Manifest, of_kind, pods, quantity, render

MANIFESTS = render(K8S / "serve")
ARGUMENTS = ("/etc/dti-ray/run.yaml", "/etc/dti-ray/cluster.yaml")


def spec() -> Manifest:
    (service,) = of_kind(MANIFESTS, "RayService")
    return service["spec"]


def served() -> dict[str, Any]:
    return yaml.safe_load(spec()["serveConfigV2"])


def written(folder: Path) -> dict[str, Any]:
    """Write the config map's files, and return the application's arguments as they name them there."""
    (texts,) = [one["data"] for one in of_kind(MANIFESTS, "ConfigMap")]
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    arguments = dict(served()["applications"][0]["args"])
    arguments["config"] = [str(folder / Path(file).name) for file in arguments["config"]]
    return arguments


def test_it_is_a_configuration_of_ray_serve() -> None:
    config = ServeDeploySchema.model_validate(served())
    (application,) = config.applications
    assert application.import_path == f"{serving.__name__}:{serving.app.__name__}"
    assert set(application.args) <= serving.ARGUMENTS
    assert tuple(application.args["config"]) == ARGUMENTS


def test_its_application_is_built_without_a_model(tmp_path: Path) -> None:
    assert isinstance(serving.app(written(tmp_path)), serve.Application)


def test_its_proxy_waits_longer_than_a_door(tmp_path: Path) -> None:
    arguments = written(tmp_path)
    limits = load_config(arguments["config"], arguments["overrides"]).serve
    assert served()["http_options"]["request_timeout_s"] == limits.timeout_s + SLACK_S


def test_its_model_fits_on_a_node_beside_a_door(tmp_path: Path) -> None:
    arguments = written(tmp_path)
    limits = load_config(arguments["config"], arguments["overrides"]).serve
    node = spec()["rayClusterConfig"]["workerGroupSpecs"][1]
    size = node["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert quantity(size["cpu"]) >= limits.cpus_per_replica + 1
    assert quantity(size["nvidia.com/gpu"]) >= limits.gpus_per_replica
    assert node["minReplicas"] == node["replicas"] >= limits.replicas


def test_no_worker_starts_without_the_token() -> None:
    for pod in pods(MANIFESTS):
        if pod.role != "head":
            (ray,) = pod.spec["containers"]
            (token,) = [one for one in ray["env"] if one["name"] == "DTI_RAY_SERVE_TOKEN"]
            assert token["valueFrom"] == {"secretKeyRef": {"name": "dti-ray-serve", "key": "token"}}


def test_only_pods_that_are_labelled_as_clients_reach_its_port() -> None:
    (policy,) = of_kind(MANIFESTS, "NetworkPolicy")
    port = served()["http_options"]["port"]
    senders = [rule["from"] for rule in policy["spec"]["ingress"] if {"port": port} in rule.get("ports", [])]
    assert senders == [[{"namespaceSelector": {}, "podSelector": {"matchLabels": {"dti-ray/client": "true"}}}]]


def test_only_pods_with_a_proxy_get_requests() -> None:
    assert spec()["excludeHeadPodFromServeSvc"] is True
    for group in spec()["rayClusterConfig"]["workerGroupSpecs"]:
        assert "readinessProbe" not in group["template"]["spec"]["containers"][0], (
            "KubeRay adds its own where there is none"
        )
