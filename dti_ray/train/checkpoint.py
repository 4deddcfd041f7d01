"""The training state on object storage: complete when its manifest is there, verified when it is read.

Stage: checkpoint. In: an engine and a `Progress`. Out: `<run>/checkpoints/step-00000400/` with
`weights.safetensors` (for readers), `engine/` (each rank's optimizer state, to go on) and a manifest, written
last; and back.
Invariant: a reader never sees half a checkpoint: folders without a manifest are ignored, files with another
hash are refused. The best state and the newest ones are kept; a delete follows the next manifest.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load as load_weights
from safetensors.torch import save as save_weights
from torch import Tensor

from dti_ray.config import CheckpointConfig
from dti_ray.data.plan import Position
from dti_ray.errors import Fault, InputError
from dti_ray.storage import FileEntry, Storage
from dti_ray.train.engine import Engine
from dti_ray.train.world import World

WEIGHTS = "weights.safetensors"
ENGINE = "engine"


@dataclass(frozen=True)
class Progress:
    """How far a run has come.

    Attributes:
        step: optimizer steps done.
        targets: targets trained, all ranks, all epochs.
        tokens: tokens trained.
        seconds: time spent in the loop, restarts included.
        position: where the data stands.
        valid_auc: of the last validation; None before the first.
    """

    step: int = 0
    targets: int = 0
    tokens: int = 0
    seconds: float = 0.0
    position: Position = field(default_factory=Position)
    valid_auc: float | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint, as its manifest describes it."""

    path: str
    files: tuple[FileEntry, ...]
    progress: Progress


def save(storage: Storage, run_folder: str, engine: Engine, progress: Progress, world: World) -> Checkpoint:
    """Write one checkpoint; every rank must call it.

    Each rank uploads its own part; rank 0 adds the weights and, when all have finished, the manifest.
    """
    path = f"{run_folder}/checkpoints/step-{progress.step:08d}"
    weights = engine.weights()
    with tempfile.TemporaryDirectory() as folder:
        engine.save(Path(folder))
        mine = storage.upload(Path(folder), f"{path}/{ENGINE}")
    entries = [FileEntry(f"{ENGINE}/{entry.path}", entry.size_bytes, entry.sha256) for entry in mine]
    if world.rank == 0:
        written = storage.write(f"{path}/{WEIGHTS}", save_weights(weights))
        entries.append(FileEntry(WEIGHTS, written.size_bytes, written.sha256))
    files = [entry for rank in world.gather(entries) for entry in rank]
    if world.rank == 0:
        storage.write_manifest(path, files, {"progress": asdict(progress)})
    world.gather(None)  # nobody reads before the manifest is there
    return Checkpoint(path, tuple(files), progress)


def list_checkpoints(storage: Storage, run_folder: str) -> list[Checkpoint]:
    """Return the complete checkpoints of a run, oldest first."""
    found = []
    for path in storage.list(f"{run_folder}/checkpoints"):
        manifest = storage.read_manifest(path)
        if manifest is not None:
            files, body = manifest
            found.append(Checkpoint(path, tuple(files), _progress(body["progress"])))
    return sorted(found, key=lambda checkpoint: checkpoint.progress.step)


def best(checkpoints: list[Checkpoint]) -> Checkpoint:
    """Return the one with the highest validation AUC, the newest where none was validated.

    Raises:
        InputError: the list is empty.
    """
    if not checkpoints:
        raise InputError(Fault("checkpoints", "the run has none", hint="train it first: `dti-ray train`"))
    return max(
        checkpoints,
        key=lambda c: (c.progress.valid_auc is not None, c.progress.valid_auc or 0.0, c.progress.step),
    )


def prune(storage: Storage, checkpoints: list[Checkpoint], keep: CheckpointConfig) -> None:
    """Delete all but the newest and the best; the manifest goes first, so that no reader meets a torso."""
    validated = [c for c in checkpoints if c.progress.valid_auc is not None]
    by_auc = sorted(validated, key=lambda c: (c.progress.valid_auc, c.progress.step), reverse=True)
    kept = {c.path for c in checkpoints[-keep.keep_last :]} | {c.path for c in by_auc[: keep.keep_best]}
    for checkpoint in checkpoints:
        if checkpoint.path not in kept:
            storage.delete(f"{checkpoint.path}/manifest.json")
            storage.delete(checkpoint.path)


def restore(storage: Storage, checkpoint: Checkpoint, engine: Engine) -> Progress:
    """Bring an engine to a checkpoint's state; every rank must call it.

    Raises:
        StorageError: a file is missing or its hash differs.
    """
    parts = [entry for entry in checkpoint.files if entry.path.startswith(f"{ENGINE}/")]
    with tempfile.TemporaryDirectory() as folder:
        storage.download(checkpoint.path, parts, Path(folder))
        engine.load(Path(folder) / ENGINE)
    return checkpoint.progress


def read_weights(storage: Storage, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Return the trainable weights of a checkpoint, verified.

    Raises:
        StorageError: the file is missing or its hash differs.
    """
    entry = next(entry for entry in checkpoint.files if entry.path == WEIGHTS)
    storage.verify(checkpoint.path, [entry])
    return load_weights(storage.read(f"{checkpoint.path}/{WEIGHTS}"))


def _progress(body: Mapping[str, Any]) -> Progress:
    return Progress(**{**body, "position": Position(**body["position"])})
