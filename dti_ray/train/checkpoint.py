"""States of a run on object storage: complete when the manifest is there, verified when they are read.

Stage: checkpoint. In: what all ranks wrote below `<run>/checkpoints/step-00000400-<attempt>/`: weights and optimizer
state as safetensors, one file each per rank that holds some, and a manifest with sizes and SHA-256, written last.
Out: the newest state whose every byte is as its manifest says, for all ranks the same one.
Invariant: a reader never sees half a checkpoint. Nothing is unpickled. A folder belongs to one attempt, so two
attempts never mix.

    step-00000400-9f31c2aa/  manifest.json  weights-00000.safetensors  weights-00001…  moments-00000…  moments-00001…
    step-00000450-9f31c2aa/  weights-00000.safetensors           no manifest: refused, the one above is taken
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from dti_ray.data.plan import Position
from dti_ray.errors import DamagedError, Fault, InputError
from dti_ray.storage import FileEntry, Storage
from dti_ray.train.engine import Engine
from dti_ray.train.state import EngineState, Progress, StateFiles
from dti_ray.train.world import World

Used = TypeVar("Used")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainState:
    """What a manifest says of the run, beside its files.

    The learning rate and every random number are functions of the configuration and the position, so neither is kept.

    Attributes:
        progress: where the run stands.
        tallies: per rank, its sums since the last line of metrics.
        config_hash: of what the run learns.
    """

    progress: Progress
    tallies: tuple[Mapping[str, float], ...]
    config_hash: str


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint, as its manifest describes it."""

    path: str
    files: tuple[FileEntry, ...]
    state: TrainState

    @property
    def progress(self) -> Progress:
        """Where the run stood."""
        return self.state.progress

    @property
    def size_bytes(self) -> int:
        """Size of all files."""
        return sum(entry.size_bytes for entry in self.files)


@dataclass(frozen=True)
class Refused:
    """A folder that is not used, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class Restored:
    """Where a run goes on.

    Attributes:
        checkpoint: the newest verified one; None where the run starts.
        refused: newer ones.
    """

    checkpoint: Checkpoint | None
    refused: tuple[Refused, ...]


def folder_of(run_folder: str, step: int, attempt: str) -> str:
    """Return the folder of one attempt's state."""
    return f"{run_folder}/checkpoints/step-{step:08d}-{attempt}"


def write_share(storage: Storage, path: str, rank: int, state: EngineState) -> list[FileEntry]:
    """Write one rank's share of a state; return its entries in the manifest."""
    entries = []
    if state.pieces:
        for name, content in (("weights", state.weights), ("moments", state.moments)):
            file = f"{name}-{rank:05d}.safetensors"
            written = storage.write(f"{path}/{file}", content())
            entries.append(FileEntry(file, written.size_bytes, written.sha256))
    return entries


def complete(storage: Storage, path: str, files: Sequence[FileEntry], state: TrainState) -> Checkpoint:
    """Write the manifest, once all shares are written."""
    storage.write_manifest(path, files, asdict(state))
    return Checkpoint(path, tuple(files), state)


def adopt(storage: Storage, checkpoint: Checkpoint, run_folder: str, config_hash: str) -> Checkpoint:
    """Copy a run's state to another run, which goes on from it under its own configuration.

    Raises:
        DamagedError: a file is missing, or its hash differs.
    """
    path = folder_of(run_folder, checkpoint.progress.step, "adopted")
    with tempfile.TemporaryDirectory(prefix="dti-ray-state-") as folder:
        storage.download(checkpoint.path, checkpoint.files, Path(folder))
        files = storage.upload(Path(folder), path)
    return complete(storage, path, files, replace(checkpoint.state, config_hash=config_hash))


def survey(storage: Storage, run_folder: str) -> tuple[list[Checkpoint], list[Refused]]:
    """Return the complete checkpoints of a run, oldest first, and what has no usable manifest."""
    found, refused = [], []
    for path in storage.list(f"{run_folder}/checkpoints"):
        try:
            manifest = storage.read_manifest(path)
            if manifest is None:
                refused.append(Refused(path, "has no manifest: its upload did not end"))
            else:
                found.append(Checkpoint(path, tuple(manifest[0]), _state(manifest[1])))
        except (DamagedError, KeyError, TypeError) as error:
            refused.append(Refused(path, f"has a damaged manifest: {error}"))
    return sorted(found, key=lambda one: (one.progress.step, one.path)), refused


def list_checkpoints(storage: Storage, run_folder: str) -> list[Checkpoint]:
    """Return the complete checkpoints of a run, oldest first; none of them is verified yet."""
    return survey(storage, run_folder)[0]


def by_quality(checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
    """Return checkpoints by validation AUC, best first; newer before older where none was validated."""
    return sorted(
        checkpoints,
        key=lambda c: (c.progress.valid_auc is not None, c.progress.valid_auc or 0.0, c.progress.step),
        reverse=True,
    )


def restore(storage: Storage, run_folder: str, engine: Engine, world: World, config_hash: str) -> Restored:
    """Bring an engine to the newest state that every rank could verify; every rank must call it.

    Raises:
        InputError: there are complete checkpoints and none can be used, or one is of another configuration.
        StorageError: storage cannot be reached.
    """
    complete, refused = world.gather(survey(storage, run_folder) if world.rank == 0 else ([], []))[0]
    for checkpoint in reversed(complete):
        if checkpoint.state.config_hash != config_hash:
            problem = f"was written under configuration {checkpoint.state.config_hash}"
            raise InputError(Fault(storage.display(checkpoint.path), problem, config_hash, "choose another train.run"))
        with tempfile.TemporaryDirectory(prefix="dti-ray-state-") as folder:
            damage = _fetch(storage, checkpoint, Path(folder), lambda _: True)
            damages = [found for found in world.gather(damage) if found is not None]
            if not damages:
                with StateFiles(sorted(Path(folder).iterdir())) as files:
                    engine.load_state(files)
                return Restored(checkpoint, tuple(refused))
        refused.append(Refused(checkpoint.path, damages[0]))
    if complete:
        lines = [Fault(storage.display(one.path), one.reason) for one in refused]
        hint = "delete the run's checkpoints to start it anew"
        raise InputError(Fault(run_folder, "no checkpoint of it can be used", hint=hint), *lines)
    return Restored(None, tuple(refused))


def read_best(storage: Storage, run_folder: str) -> tuple[Checkpoint, dict[str, Tensor]]:
    """Return the best checkpoint that can be verified, and its weights.

    Raises:
        InputError: there is none.
    """
    return _best_usable(storage, run_folder, lambda checkpoint: read_weights(storage, checkpoint))


def find_best(storage: Storage, run_folder: str) -> Checkpoint:
    """Return the best checkpoint whose weights are as its manifest says; others will read them.

    Raises:
        InputError: there is none.
    """

    def verify(checkpoint: Checkpoint) -> None:
        storage.verify(checkpoint.path, [entry for entry in checkpoint.files if holds_weights(entry.path)])

    return _best_usable(storage, run_folder, verify)[0]


def read_weights(storage: Storage, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Return the trained weights of a checkpoint, verified.

    Raises:
        DamagedError: a file is missing, its hash differs, or a stretch of a weight is nowhere.
    """
    with tempfile.TemporaryDirectory(prefix="dti-ray-weights-") as folder:
        damage = _fetch(storage, checkpoint, Path(folder), holds_weights)
        if damage is not None:
            raise DamagedError(Fault(storage.display(checkpoint.path), damage))
        with StateFiles(sorted(Path(folder).iterdir())) as files:
            return {name: weight.clone() for name, weight in files.weights()}


def _best_usable(storage: Storage, run_folder: str, use: Callable[[Checkpoint], Used]) -> tuple[Checkpoint, Used]:
    """Return the best checkpoint that does not turn out to be damaged when it is used, and what using it gives."""
    refused: list[Fault] = []
    for checkpoint in by_quality(list_checkpoints(storage, run_folder)):
        try:
            return checkpoint, use(checkpoint)
        except DamagedError as error:
            log.warning("checkpoint %s is refused: %s", checkpoint.path, error)
            refused.extend(error.faults)
    raise InputError(
        Fault(f"{run_folder}/checkpoints", "holds no usable state", hint="train it first: `dti-ray train`"), *refused
    )


def holds_weights(file: str) -> bool:
    """Say whether a file of a checkpoint is one that scoring needs."""
    return file.startswith("weights-")


def _fetch(storage: Storage, checkpoint: Checkpoint, to: Path, wanted: Callable[[str], bool]) -> str | None:
    """Copy files and hold them against their hashes; return what is wrong with them, or None."""
    try:
        storage.download(checkpoint.path, [entry for entry in checkpoint.files if wanted(entry.path)], to)
    except DamagedError as error:
        return str(error)
    return None


def _state(body: Mapping[str, Any]) -> TrainState:
    progress = body["progress"]
    position = Position(**progress["position"])
    return TrainState(Progress(**{**progress, "position": position}), tuple(body["tallies"]), body["config_hash"])
