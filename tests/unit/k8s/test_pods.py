"""What no pod of `k8s/` may do, and what each must say."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml

from tests.manifests import K8S, ROOT, Manifest, Pod, clusters, of_kind, overlay, pods, quantity, render

FOLDERS = [
    K8S / "base",
    K8S / "jobs",
    K8S / "serve",
    *sorted(path for path in (K8S / "overlays").iterdir() if path.is_dir()),
]
RESOURCES = {"cpu", "memory", "ephemeral-storage"}
SECRET_NAME = re.compile("KEY|SECRET|TOKEN|PASSWORD", re.IGNORECASE)
SECRET_VALUE = re.compile(r"AKIA[0-9A-Z]{16}|-----BEGIN|\bstringData:|kind: Secret\b|secretGenerator")
PINNED = re.compile(r"^[a-z0-9./-]+:v?\d+(\.\d+)+[a-z0-9.-]*$")
ENDING_S = 15  # of Ray's own processes, once a node is drained

each_folder = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: str(folder.relative_to(K8S)))


def containers(folder: Path) -> list[tuple[str, Manifest]]:
    """Return (where, container) of all pods, the autoscaler that KubeRay adds included."""
    manifests = render(folder)
    found = [(f"{pod.name}/{one['name']}", one) for pod in pods(manifests) for one in pod.containers]
    autoscalers = [
        (f"{name}/autoscaler", cluster["autoscalerOptions"])
        for name, cluster in clusters(manifests)
        if cluster["enableInTreeAutoscaling"]
    ]
    return [*found, *autoscalers]


@each_folder
def test_no_pod_runs_as_root_or_shares_its_node(folder: Path) -> None:
    for pod in pods(render(folder)):
        context = pod.spec["securityContext"]
        assert context["runAsNonRoot"] is True, pod.name
        assert context["runAsUser"] == context["runAsGroup"] == context["fsGroup"] == 1000, pod.name
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}, pod.name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod.spec), pod.name
        assert all("hostPath" not in volume for volume in pod.spec["volumes"]), pod.name


@each_folder
def test_no_container_is_privileged_or_writes_its_root_file_system(folder: Path) -> None:
    for where, container in containers(folder):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }, where
        writable = {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
        assert "/tmp" in writable, where
        assert {"name": "HOME", "value": "/tmp"} in container["env"], where


@each_folder
def test_every_container_asks_for_what_it_may_take(folder: Path) -> None:
    for where, container in containers(folder):
        assert container["resources"]["requests"] == container["resources"]["limits"], where
        assert set(container["resources"]["limits"]) - {"nvidia.com/gpu"} == RESOURCES, where


@each_folder
def test_every_image_has_an_exact_tag(folder: Path) -> None:
    images = {container["image"] for pod in pods(render(folder)) for container in pod.containers}
    assert [image for image in images if not PINNED.match(image)] == []


@each_folder
def test_our_images_carry_our_version_and_rays(folder: Path) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    pins = (ROOT / ".ci" / "constraints.txt").read_text(encoding="utf-8").split()
    images = {container["image"] for pod in pods(render(folder)) for container in pod.containers}
    assert {image for image in images if image.startswith("dti-ray")} <= {
        f"dti-ray:{version}-cpu",
        f"dti-ray:{version}-cuda",
    }
    assert all(f"ray=={cluster['rayVersion']}" in pins for _, cluster in clusters(render(folder)))


@each_folder
def test_heads_have_no_gpu_and_take_no_work(folder: Path) -> None:
    for name, cluster in clusters(render(folder)):
        assert cluster["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}, name
    for pod in pods(render(folder)):
        if pod.role != "train":
            assert all("nvidia.com/gpu" not in one["resources"]["limits"] for one in pod.containers), pod.name


@each_folder
def test_secrets_are_named_and_never_written(folder: Path) -> None:
    for where, container in containers(folder):
        for variable in container.get("env", []):
            if SECRET_NAME.search(variable["name"]):
                wanted = "dti-ray-serve" if variable["name"] == "DTI_RAY_SERVE_TOKEN" else "dti-ray-storage"
                assert variable["valueFrom"]["secretKeyRef"]["name"] == wanted, where


def test_no_file_holds_a_secret() -> None:
    files = [path for path in K8S.rglob("*") if path.is_file() and path.suffix != ".md"]
    assert [path.name for path in files if SECRET_VALUE.search(path.read_text(encoding="utf-8"))] == []


@each_folder
def test_only_the_autoscaler_speaks_to_kubernetes(folder: Path) -> None:
    manifests = render(folder)
    assert all(account["automountServiceAccountToken"] is False for account in of_kind(manifests, "ServiceAccount"))
    assert not of_kind(manifests, "Role") + of_kind(manifests, "RoleBinding") + of_kind(manifests, "ClusterRoleBinding")
    for pod in pods(manifests):
        assert pod.spec["automountServiceAccountToken"] is False, pod.name
        assert pod.spec["serviceAccountName"] == ("dti-ray-autoscaler" if pod.role == "head" else "dti-ray"), pod.name
        tokens = {volume["name"] for volume in pod.spec["volumes"] if "projected" in volume}
        mounts = {mount["name"] for one in pod.containers for mount in one["volumeMounts"]}
        assert not tokens & mounts, pod.name


@each_folder
def test_the_namespace_refuses_what_these_tests_would(folder: Path) -> None:
    (namespace,) = of_kind(render(folder), "Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


@each_folder
def test_nobody_else_reaches_a_pod(folder: Path) -> None:
    (policy,) = of_kind(render(folder), "NetworkPolicy")
    assert policy["spec"]["podSelector"] == {}
    assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]
    for rule in policy["spec"]["ingress"]:
        (sender,) = rule["from"]
        assert "namespaceSelector" not in sender or ("ports" in rule and "matchLabels" in sender["podSelector"])


@each_folder
def test_heads_are_not_evicted(folder: Path) -> None:
    (budget,) = of_kind(render(folder), "PodDisruptionBudget")
    assert budget["spec"]["selector"] == {"matchLabels": {"ray.io/node-type": "head"}}
    assert budget["spec"]["minAvailable"] > len(list(clusters(render(folder))))


@each_folder
def test_nodes_have_time_to_save_and_say_whether_they_live(folder: Path) -> None:
    for pod in nodes(folder):
        (ray,) = pod.spec["containers"]
        seconds = {one["name"]: one.get("value") for one in ray["env"]}
        for name in ("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "RAY_JOB_STOP_WAIT_TIME_S"):
            assert int(seconds[name]) + ENDING_S <= pod.spec["terminationGracePeriodSeconds"], pod.name
        if not pod.name.startswith("serve/workers/"):  # KubeRay's own probe asks for Serve's proxy
            assert ray["readinessProbe"]["httpGet"] == ray["livenessProbe"]["httpGet"], pod.name


@each_folder
def test_nodes_have_shared_memory(folder: Path) -> None:
    for pod in nodes(folder):
        kinds = {volume["name"]: volume.get("emptyDir") for volume in pod.spec["volumes"]}
        (shared,) = [one["name"] for one in pod.spec["containers"][0]["volumeMounts"] if one["mountPath"] == "/dev/shm"]
        assert kinds[shared] == {"medium": "Memory"}, pod.name


def test_the_doctor_is_no_larger_than_its_head() -> None:
    for folder in FOLDERS:
        for pod in pods(render(folder)):
            for one in pod.spec.get("initContainers", []):
                size, head = one["resources"]["limits"], pod.spec["containers"][0]["resources"]["limits"]
                assert all(quantity(size[name]) <= quantity(head[name]) for name in RESOURCES), pod.name


def test_spot_takes_training_and_nothing_else() -> None:
    for pod in nodes(K8S / "overlays" / "spot"):
        tolerated = {one["key"] for one in pod.spec.get("tolerations", [])}
        terms = pod.spec["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"][
            "nodeSelectorTerms"
        ]
        labels = {one["key"]: one["operator"] for term in terms for one in term["matchExpressions"]}
        assert len(labels) == 4
        if pod.role == "train":
            assert {"cloud.google.com/gke-spot", "kubernetes.azure.com/scalesetpriority"} < tolerated
            assert set(labels.values()) == {"In"}
            assert len(terms) == 4, "any of the clouds' labels will do"
        else:
            assert not tolerated
            assert set(labels.values()) == {"NotIn"}
            assert len(terms) == 1, "none of them may be there"


def test_dev_fetches_to_where_its_jobs_read_and_storage_listens() -> None:
    manifests = overlay("dev")
    (settings,) = [yaml.safe_load(one["data"]["cluster.yaml"]) for one in of_kind(manifests, "ConfigMap")]
    (job,), (service,) = of_kind(manifests, "Job"), of_kind(manifests, "Service")
    root = settings["storage"]["root"]
    assert job["spec"]["template"]["spec"]["containers"][0]["args"] == [f"--root={root}"]
    host, port = service["metadata"]["name"], service["spec"]["ports"][0]["port"]
    assert root.endswith(f"?endpoint_override=http://{host}:{port}")
    (storage,) = of_kind(manifests, "StatefulSet")
    (server,) = storage["spec"]["template"]["spec"]["containers"]
    assert {f"-s3.port={port}", f"-bucket={root.split('/')[2]}"} < set(server["args"])
    assert service["spec"]["selector"].items() <= storage["spec"]["template"]["metadata"]["labels"].items()


def nodes(folder: Path) -> list[Pod]:
    """Return the pods that are nodes of Ray."""
    return [pod for pod in pods(render(folder)) if pod.role in ("head", "data", "train")]
