"""The files that a run fills while it runs: JSON Lines and TensorBoard below its folder.

Stage: beside training. In: named numbers at a step. Out: `metrics/*.jsonl` and `tensorboard/`.
Invariant: a line that was flushed stays; a run that goes on from step s drops what it had said after s, so
no step stands twice.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from dti_ray.storage import Storage
from dti_ray.telemetry.sinks import LINES, Line


class MetricSink:
    """Collects lines per kind (`train`, `valid`) and writes them on `flush`, and where its block ends without an error.

    However the block ends, no event file of it stays on this machine.

    Args:
        storage: the root.
        run_folder: `runs/<name>`.
        start_step: step that the run goes on from; later lines of an earlier attempt are dropped.
    """

    def __init__(self, storage: Storage, run_folder: str, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # whoever only reads lines need not wait for torch

        self.storage, self.run_folder = storage, run_folder
        self.lines: dict[str, list[Line]] = {}
        for kind in LINES:
            earlier = read_lines(storage, run_folder, kind)
            self.lines[kind] = [line for line in earlier if line["step"] <= start_step]
        self.events = Path(tempfile.mkdtemp(prefix="dti-ray-tensorboard-"))
        self.writer = SummaryWriter(str(self.events), purge_step=start_step + 1 if start_step else None)

    def __enter__(self) -> MetricSink:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.flush()
        finally:
            self.writer.close()
            shutil.rmtree(self.events)

    def add(self, kind: str, line: Line) -> None:
        """Remember one line; TensorBoard counts in targets, which compare across batch sizes."""
        self.lines[kind].append(line)
        for name, value in line.items():
            if name not in ("step", "targets"):
                self.writer.add_scalar(f"{kind}/{name}", value, line["targets"])

    def flush(self) -> None:
        """Write everything below the run's folder."""
        for kind, lines in self.lines.items():
            text = "".join(json.dumps(line) + "\n" for line in lines)
            self.storage.write(_path(self.run_folder, kind), text.encode())
        self.writer.flush()
        self.storage.upload(self.events, f"{self.run_folder}/tensorboard")


def read_lines(storage: Storage, run_folder: str, kind: str) -> list[Line]:
    """Return the lines of one kind, oldest first; empty where there are none."""
    path = _path(run_folder, kind)
    if not storage.exists(path):
        return []
    return [json.loads(line) for line in storage.read(path).decode().splitlines()]


def write_json(storage: Storage, path: str, tree: Mapping[str, object]) -> None:
    """Write one JSON document."""
    storage.write(path, json.dumps(tree, indent=1).encode())


def _path(run_folder: str, kind: str) -> str:
    return f"{run_folder}/metrics/{kind}.jsonl"
