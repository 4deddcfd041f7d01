"""A very small sweep, and what is looked at when it is over."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from dti_ray.config import RunConfig, load_config
from tests.builders import TINY, write_dataset

ROOT = Path(__file__).parents[1]
LENGTHS = [30, 12, 25, 40, 18, 33]
SMALL = [
    *TINY, "model.layers=1", "train.precision=fp32", "data.name=tiny", "packing.k=4", "packing.n=3",
    "packing.streams=2", "optim.targets_per_step=16", "cluster.workers=1", "cluster.collective_timeout_s=150",
    "checkpoint.keep_last=1",
]  # fmt: skip
TIMES = ("at", "seconds")  # of an event: what differs between two sweeps that are equal


def lay_out(folder: Path) -> None:
    """Write the data set that the sweeps here search on, below a folder."""
    write_dataset(folder, LENGTHS, segment_interactions=30)


def write_space(folder: Path, **tune: object) -> Path:
    """Write a configuration file with a `tune` section."""
    path = folder / "tune.yaml"
    path.write_text(yaml.safe_dump({"tune": {"sweep": "s", "scheduler": "none", **tune}}))
    return path


def config_of(folder: Path, root: str, *overrides: str, **tune: object) -> RunConfig:
    """Return the configuration of a small sweep."""
    root_override = f"storage.root={json.dumps(root)}"
    return load_config([write_space(folder, **tune)], [*SMALL, root_override, *overrides])


def command(file: Path, root: str, *overrides: str) -> list[str]:
    """Return the command line of a small sweep."""
    return [sys.executable, "-m", "dti_ray.cli", "tune", "-c", str(file), "--root", root, "--json", *SMALL, *overrides]


def start(arguments: Sequence[str], log: Path, env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """Start a command in a session of its own."""
    with log.open("a") as stderr:
        return subprocess.Popen(
            arguments, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}, text=True,
            stdout=subprocess.PIPE, stderr=stderr, start_new_session=True,
        )  # fmt: skip


def read_ledger(folder: Path) -> list[dict[str, Any]]:
    """Return the events of a sweep on a local root."""
    path = folder / "sweeps/s/ledger.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def content(events: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what was planned and what came of it, without times, in an order that does not depend on luck."""
    kinds = ("trial", "cost", "report", "done")
    kept = {
        json.dumps({key: value for key, value in event.items() if key not in TIMES}, sort_keys=True)
        for event in events
        if event["event"] in kinds
    }
    return sorted(kept)
