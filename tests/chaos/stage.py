"""The real parts on which faults happen: Ray with several local nodes, a real S3 server behind a proxy, a run.

A `Stage` stands for one session: the cluster, the server, the data set and an undisturbed run. Each fault gets a run
of its own name in it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dti_ray.storage import Storage
from dti_ray.telemetry import read_lines
from dti_ray.train.checkpoint import survey
from dti_ray.train.retention import is_cut_off
from tests.builders import TINY, write_dataset
from tests.chaos.proxy import Proxy
from tests.ray_nodes import add_node, start_nodes
from tests.seaweed import KEYS, Seaweed

ROOT = Path(__file__).parents[2]
LENGTHS = [30, 12, 25, 40, 18, 33, 21, 27, 35, 22, 16, 29]
CPUS = 3  # of a node
TIMEOUT_S = 20  # of collectives
RUN_S = 420  # longest run, recovery included
RUN = [
    *TINY, "model.layers=1", "train.precision=fp32", "data.name=tiny", "packing.k=4", "packing.n=3",
    "packing.streams=4", "optim.targets_per_step=16", "optim.epochs=3", "train.log_targets=1", "eval.every_targets=300",
    "train.zero_stage=2", "checkpoint.every_steps=5", "checkpoint.keep_last=3", "model.dropout=0.1",
    "checkpoint.patience_s=15", f"cluster.collective_timeout_s={TIMEOUT_S}", "cluster.workers=2",
    "cluster.setup_timeout_s=120",
    "cluster.cpus_per_worker=2", "train.max_failures=6",
]  # fmt: skip


started: list[Run] = []


def end_all() -> None:
    """Kill what drivers are left, and what they started."""
    while started:
        run = started.pop()
        if run.process.poll() is None:
            os.killpg(run.process.pid, signal.SIGKILL)
            run.process.wait(30)


def pass_on(_method: str, _path: str) -> int | None:
    return None


@dataclass
class Run:
    """A driver process and what it has said."""

    process: subprocess.Popen[str]
    folder: Path
    said: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                if line.startswith('{"at"'):
                    self.said.append(json.loads(line))

    def wait_for_step(self, step: int, timeout_s: float = RUN_S) -> None:
        deadline = time.monotonic() + timeout_s
        while self.newest_step() < step:
            assert time.monotonic() < deadline, f"step {step} did not come; {self.told()}"
            assert self.process.poll() is None, f"the driver ended before step {step}: {self.told()}"
            time.sleep(0.02)

    def newest_step(self) -> int:
        return max((int(line["step"]) for line in list(self.said) if line.get("kind") == "train"), default=0)

    def wait(self, timeout_s: float = RUN_S) -> int:
        code = self.process.wait(timeout=timeout_s)
        self.reader.join(10)
        return code

    def pid(self, rank: int) -> int:
        return int((self.folder / f"pid-{rank}").read_text())

    def texts(self) -> list[str]:
        return [one["text"] for one in list(self.said) if "text" in one]

    @property
    def error(self) -> str:
        return next((one["error"] for one in self.said if "error" in one), "")

    def told(self) -> str:
        log = (self.folder / "stderr").read_text()[-3000:]
        return "\n".join([*self.texts(), self.error, log])

    def seconds_to_recover(self, since: float, step: int) -> float:
        """Seconds from a moment to the first line behind a step reached by then, and behind the restore, if any.

        Where the last step was done and its state alone was lost, to the restore: nothing was left to be trained.
        """
        restored = [o["at"] for o in self.said if o.get("text", "").startswith("restored") and o["at"] > since]
        begin = min(restored, default=since)
        later = (o["at"] for o in self.said if o.get("kind") == "train" and o["step"] > step and o["at"] > begin)
        return next(later, begin) - since


class Stage:
    def __init__(self, folder: Path) -> None:
        self.folder, self.runs, self.name = folder, 0, ""
        self.s3 = Seaweed(_made(folder / "s3"))
        self.proxy = Proxy(self.s3.port, pass_on)

    def set(self) -> None:
        """Start Ray, lay out the data set, train the run that all others are compared with."""
        os.environ.update({**KEYS, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
        self.start_s3()
        self.cluster, self.nodes = start_nodes(2, CPUS)
        write_dataset(self.folder / "local", LENGTHS, segment_interactions=30)
        self.storage = Storage(self.root(self.s3.port))
        self.storage.upload(self.folder / "local", "")
        undisturbed = self.start()
        assert undisturbed.wait() == 0, undisturbed.told()
        self.expected = self.losses("run-1")
        assert len(self.expected) > 40

    def root(self, port: int | None = None) -> str:
        return f"s3://dti/chaos?endpoint_override=http://127.0.0.1:{port or self.proxy.port}"

    def start_s3(self) -> None:
        self.s3.start()
        self.s3.wait()

    def add_node(self) -> Any:
        return add_node(self.cluster, CPUS)

    def start(self, fault: dict[str, Any] | None = None, name: str | None = None, *overrides: str) -> Run:
        """Start a driver; without a name, of a new run."""
        if name is None:
            self.runs += 1
            name = f"run-{self.runs}"
        folder = _made(self.folder / name)
        self.name = name
        command = [sys.executable, "-m", "tests.chaos.driver", self.cluster.address, f"storage.root={self.root()}"]
        return spawn([*command, f"train.run={name}", *RUN, *overrides], folder, fault or {})

    def losses(self, name: str | None = None) -> dict[int, tuple[float, float]]:
        lines = read_lines(self.storage, f"runs/{name or self.name}", "train")
        return {int(line["step"]): (line["loss"], line["targets"]) for line in lines}

    def litter(self, name: str | None = None) -> list[str]:
        folder = f"runs/{name or self.name}"
        refused = [one.path for one in survey(self.storage, folder)[1]]
        return [*refused, *(path for path in self.storage.list(folder, recursive=True) if is_cut_off(path))]

    def close(self) -> None:
        end_all()
        if hasattr(self, "cluster"):
            self.cluster.shutdown()
        self.proxy.close()
        self.s3.kill()


def spawn(command: list[str], folder: Path, fault: dict[str, Any]) -> Run:
    env = {**os.environ, "DTI_CHAOS": json.dumps({"folder": str(folder), **fault})}
    with (folder / "stderr").open("a") as log:
        process = subprocess.Popen(
            command, env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True
        )
    run = Run(process, folder)
    started.append(run)
    return run


@contextmanager
def stage() -> Iterator[Stage]:
    with tempfile.TemporaryDirectory(prefix="chaos-", ignore_cleanup_errors=True) as folder:
        built, environment = Stage(Path(folder)), dict(os.environ)
        try:
            built.set()
            yield built
        finally:
            built.close()
            os.environ.clear()
            os.environ.update(environment)


def kill(pid: int, how: signal.Signals = signal.SIGKILL) -> float:
    """Send a signal to a process; return when."""
    os.kill(pid, how)
    return time.time()


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
