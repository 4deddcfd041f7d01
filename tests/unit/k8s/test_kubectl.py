"""Which manifests kubectl sends for the commands of `k8s/README.md`: it asks a cluster only what kinds there are."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.manifests import K8S, ROOT, render

KINDS = {
    "v1": {"Namespace": "namespaces", "ServiceAccount": "serviceaccounts", "ConfigMap": "configmaps"},
    "policy/v1": {"PodDisruptionBudget": "poddisruptionbudgets"},
    "networking.k8s.io/v1": {"NetworkPolicy": "networkpolicies"},
    "ray.io/v1": {"RayJob": "rayjobs", "RayCluster": "rayclusters", "RayService": "rayservices"},
}
APPLY = re.findall(r"kubectl apply -k (?:\S+)(?: -l \S+)?", (K8S / "README.md").read_text(encoding="utf-8"))


class Discovery(BaseHTTPRequestHandler):
    """Says what kinds a cluster with KubeRay has; holds nothing."""

    def do_GET(self) -> None:
        groups = [
            {"name": name.partition("/")[0], "versions": [{"groupVersion": name, "version": "v1"}],
             "preferredVersion": {"groupVersion": name, "version": "v1"}}
            for name in KINDS if "/" in name
        ]  # fmt: skip
        answers = {
            "/api": {"kind": "APIVersions", "versions": ["v1"]},
            "/apis": {"kind": "APIGroupList", "groups": groups},
        }
        for name, kinds in KINDS.items():
            resources = [
                {"kind": kind, "name": plural, "namespaced": kind != "Namespace", "verbs": ["get", "patch", "create"]}
                for kind, plural in kinds.items()
            ]
            path = f"/apis/{name}" if "/" in name else f"/api/{name}"
            answers[path] = {"kind": "APIResourceList", "groupVersion": name, "resources": resources}
        found = answers.get(self.path.partition("?")[0])
        self.send_response(404 if found is None else 200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(found or {"kind": "Status", "reason": "NotFound", "code": 404}).encode())

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name is http.server's
        """Be silent."""


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Discovery) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()


@pytest.mark.parametrize("command", APPLY)
def test_a_command_of_the_readme_sends_one_job_or_none_or_all(command: str, server: str, tmp_path: Path) -> None:
    kubectl = Path(sys.executable).with_name("kubectl")
    dry = ["--dry-run=client", "--validate=false", "--output=name", f"--server={server}", f"--cache-dir={tmp_path}"]
    words = shlex.split(command)
    done = subprocess.run([kubectl, *words[1:], *dry], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    sent = {line.partition("/")[2] for line in done.stdout.splitlines()}
    asked = words[5] if "-l" in words else ""
    all_of_it = render(ROOT / words[3])
    jobs = {one["metadata"]["name"] for one in all_of_it if one["kind"] == "RayJob"}
    others = {one["metadata"]["name"] for one in all_of_it if one["kind"] != "RayJob"}
    wanted = {"": jobs | others, "!dti-ray/job": others}
    assert sent == wanted.get(asked, {asked.rpartition("=")[2]})


def test_the_readme_has_commands() -> None:
    assert len(APPLY) >= 4
