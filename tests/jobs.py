"""A small Ray cluster that takes jobs, and commands sent to it as a user would send them."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import requests

from tests.builders import TINY
from tests.processes import living

ROOT = Path(__file__).parents[1]
CPUS = 4  # of a node: two workers of a run, one for packing, one to spare
MEMORY = 200 * 2**20
WAIT_S = 300
RUN = [
    *TINY, "model.layers=1", "train.precision=fp32", "data.name=tiny", "packing.k=4", "packing.n=3",
    "packing.streams=2", "optim.targets_per_step=16", "train.log_targets=16", "eval.every_targets=300",
    "checkpoint.every_steps=5", "checkpoint.patience_s=15", "cluster.workers=2", "cluster.collective_timeout_s=30",
    "cluster.setup_timeout_s=120",
]  # fmt: skip


@dataclass
class JobCluster:
    """A head without CPUs, as in Kubernetes, and nodes beside it, each started by `ray start`.

    Attributes:
        environment: of whoever starts nodes or sends jobs: storage keys, the cluster's token.
        folder: where each node keeps its own files.
    """

    environment: dict[str, str]
    folder: str
    gcs: str = ""
    address: str = ""  # URL of the dashboard
    nodes: list[subprocess.Popen[bytes]] = field(default_factory=list)  # head first

    def start_head(self) -> None:
        """Start the head and wait until it takes jobs."""
        port, dashboard = _free_port(), _free_port()
        self.gcs, self.address = f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}"
        self._start("--head", f"--port={port}", f"--dashboard-port={dashboard}", cpus=0)
        wait_until(self._answers, "the head answers")
        self.environment["RAY_API_SERVER_ADDRESS"] = self.address

    def add_node(self) -> None:
        """Start one more node."""
        self._start(f"--address={self.gcs}", cpus=CPUS)

    def replace_node(self, index: int) -> None:
        """Let a node die, with all that runs on it, and another come."""
        _kill(self.nodes.pop(index))
        self.add_node()

    def node_of(self, words: str) -> int:
        """Return the number of the first node on which a process of that name runs."""
        for index, node in enumerate(self.nodes):
            if any(living(words, node.pid)):
                return index
        raise AssertionError(f"{words} runs on no node")

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Start a command of ours that knows this cluster."""
        return self._begin([sys.executable, "-m", "dti_ray.cli", *arguments])

    def call(self, *arguments: str) -> tuple[int, str]:
        """Run one to its end; return its exit code and all that it said."""
        return self.run(sys.executable, "-m", "dti_ray.cli", *arguments)

    def run(self, *command: str) -> tuple[int, str]:
        """Run any command that knows this cluster to its end; return its exit code and all that it said."""
        process = self._begin(command)
        told, _ = process.communicate(timeout=2 * WAIT_S)
        return process.returncode, told

    def close(self) -> None:
        """End all nodes."""
        while self.nodes:
            _kill(self.nodes.pop())

    def _begin(self, command: Sequence[str]) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command, cwd=ROOT, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def _start(self, *where: str, cpus: int) -> None:
        # Nodes that share a folder remove each other's copies of a job's working directory, under its feet.
        folder = tempfile.mkdtemp(dir=self.folder)
        command = [
            sys.executable, "-m", "ray.scripts.scripts", "start", *where, "--block", "--disable-usage-stats",
            f"--temp-dir={folder}", f"--num-cpus={cpus}", f"--object-store-memory={MEMORY}",
            f"--dashboard-agent-listen-port={_free_port()}", "--node-ip-address=127.0.0.1",
        ]  # fmt: skip
        with (Path(self.folder) / "start.log").open("ab") as log:
            self.nodes.append(subprocess.Popen(command, env=self.environment, stdout=log, stderr=log))

    def _answers(self) -> bool:
        assert self.nodes[0].poll() is None, (Path(self.folder) / "start.log").read_text()
        try:
            return requests.get(f"{self.address}/api/version", timeout=5).status_code in (200, 401)
        except requests.ConnectionError:
            return False


@contextmanager
def job_cluster(environment: dict[str, str]) -> Iterator[JobCluster]:
    """Start a head and two nodes, which want a token.

    Args:
        environment: variables that jobs inherit, such as storage keys.
    """
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    scripts = str(Path(sys.executable).parent)  # where a job finds `python`
    environment = {
        **inherited, **environment, "PATH": f"{scripts}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16),
    }  # fmt: skip
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short: sockets lie below it
    cluster = JobCluster(environment, folder)
    try:
        cluster.start_head()
        for _ in range(2):
            cluster.add_node()
        yield cluster
    finally:
        cluster.close()
        shutil.rmtree(folder, ignore_errors=True)


def drivers(words: Sequence[str]) -> list[psutil.Process]:
    """Return the processes of this machine that run a job whose command line holds all these words."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if len(line) > 2 and line[1] == "-m" and line[2].startswith("jobs.") and set(words) <= set(line):
            found.append(process)
    return found


def wait_until(holds: Callable[[], object], what: str, seconds: float = WAIT_S) -> None:
    """Wait for something to become true."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.2)


def _kill(node: subprocess.Popen[bytes]) -> None:
    """End a node as a power cut does: all of its processes at once."""
    processes = [psutil.Process(node.pid), *psutil.Process(node.pid).children(recursive=True)]
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    node.wait(30)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
