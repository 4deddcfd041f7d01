"""What a run is: its configuration, tokenizer, versions and machine, written once below its folder.

Stage: before training. In: a `RunConfig`. Out: `config.yaml`, `meta.json`, `tokenizer.json`, and the
configuration back.
Invariant: a run's name and its configuration belong together; `config.yaml` is written last and never changed.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dti_ray.config import RunConfig, config_hash, differences, from_yaml, to_yaml
from dti_ray.errors import Fault, InputError
from dti_ray.storage import Storage
from dti_ray.telemetry import write_json

PACKAGES = ("dti-ray", "ray", "torch", "transformers", "deepspeed", "peft", "pyarrow", "numpy", "pydantic")


def load_run(storage: Storage, run: str) -> RunConfig:
    """Return the configuration that a run was started with.

    Raises:
        InputError: there is no such run; the message lists the ones that exist.
    """
    path = f"runs/{run}/config.yaml"
    if not storage.exists(path):
        known = [name.rpartition("/")[2] for name in storage.list("runs")]
        raise InputError(
            Fault(storage.display("runs", run), "is no run", f"one of {known}" if known else "a trained run")
        )
    return from_yaml(storage.read(path).decode())


def check_same_run(config: RunConfig, storage: Storage) -> None:
    """Refuse a run name that was used with another configuration.

    Raises:
        InputError: with every dotted key that differs.
    """
    path = f"runs/{config.train.run}/config.yaml"
    if not storage.exists(path):
        return
    _refuse("train.run", config.train.run, "configuration", differences(from_yaml(storage.read(path).decode()), config))


def check_same_base(key: str, name: str, config: RunConfig, storage: Storage) -> None:
    """Refuse the name of a sweep or a study under which other runs stand; nothing is refused where none is stored.

    Args:
        key: that names it, such as `tune.sweep`.
        name: its value, a folder below `<root>/sweeps`.
        config: that its runs change.
        storage: the root.

    Raises:
        InputError: with every dotted key that differs.
    """
    path = f"sweeps/{name}/config.yaml"
    if not storage.exists(path):
        return
    stored = from_yaml(storage.read(path).decode())
    found, was, now = differences(stored, config), stored.eval.every_targets, config.eval.every_targets
    if was != now:  # runs are compared, and their best states chosen, where they are validated
        found.append(Fault("eval.every_targets", f"got {now}", f"{was} as it is stored"))
    _refuse(key, name, "base configuration", found)


def _refuse(key: str, name: str, what: str, found: Sequence[Fault]) -> None:
    if found:
        hint = f"choose another {key}, or use the stored values:"
        raise InputError(Fault(f"{key}={name}", f"exists with another {what}", hint=hint), *found)


def write_identity(config: RunConfig, storage: Storage, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write what the run is, unless it is written already."""
    folder = f"runs/{config.train.run}"
    if storage.exists(f"{folder}/config.yaml"):
        return
    if config.model.name_or_path is None:
        assert isinstance(tokenizer, PreTrainedTokenizerFast)
        storage.write(f"{folder}/tokenizer.json", tokenizer.backend_tokenizer.to_str().encode())
    meta = {
        "run": config.train.run,
        "config_hash": config_hash(config),
        "versions": versions(),
        "git_commit": git_commit(),
        "machine": machine(),
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_json(storage, f"{folder}/meta.json", meta)
    storage.write(f"{folder}/config.yaml", to_yaml(config).encode())


def versions() -> dict[str, str | None]:
    """Return the versions of the packages that matter; None where one is not installed."""
    return {name: _version(name) for name in PACKAGES}


def machine() -> dict[str, object]:
    """Return what this machine computes with: `cpus`, `cpu`, `gpus`."""
    return {"cpus": os.cpu_count(), "cpu": _cpu_name(), "gpus": _gpu_names()}


def git_commit() -> str | None:
    """Return the commit of this source tree; None where it is not a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        if names:
            return names[0]
    return platform.processor() or platform.machine()


def _gpu_names() -> list[str]:
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
