"""When a state is copied, written, and made visible, by all ranks together and beside the training.

Stage: between loop and checkpoint. In: an engine between two steps. Out: complete checkpoints, in the order in which
they were taken.
Invariant: collectives run in the loop's own thread only. A rank writes its share in the background; the step after
which every rank has written is the step at which rank 0, again in the background, writes the manifest, and deletes
what is no longer kept.

    step 50   every rank copies its share to the CPU and hands it to its thread
    step 53   the ranks' sum says that all shares are written: rank 0 is given their hashes and writes the manifest
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass

from dti_ray.config import RunConfig, config_hash
from dti_ray.storage import MANIFEST, FileEntry, Storage
from dti_ray.train.checkpoint import (
    Checkpoint,
    Restored,
    TrainState,
    complete,
    folder_of,
    list_checkpoints,
    restore,
    survey,
    write_share,
)
from dti_ray.train.engine import Engine
from dti_ray.train.retention import is_cut_off, to_keep
from dti_ray.train.state import Progress
from dti_ray.train.upload import Background
from dti_ray.train.world import World


@dataclass(frozen=True)
class Pending:
    """A state whose shares are being written."""

    path: str
    state: TrainState
    share: Future[list[FileEntry]]


class Saver:
    """Restores and saves the states of one attempt at a run; every rank has one.

    Args:
        storage: the root.
        run_folder: `runs/<name>`.
        engine: whose state it is.
        world: the other ranks.
        config: of the run.
        attempt: name of this attempt, the same on every rank and different from any other's.
    """

    def __init__(
        self, storage: Storage, run_folder: str, engine: Engine, world: World, config: RunConfig, attempt: str
    ) -> None:
        self.storage = storage.patient(config.checkpoint.patience_s)
        self.run_folder, self.engine, self.world = run_folder, engine, world
        self.config, self.attempt = config, attempt
        self.background = Background(config.checkpoint.queue)
        self.pending: deque[Pending] = deque()
        self.manifests: list[Future[None]] = []
        self.refused: list[str] = []
        self.last: Progress | None = None

    def restore(self) -> Restored:
        """Bring the engine to the newest verified state; every rank must call it. See `checkpoint.restore`."""
        restored = restore(self.storage, self.run_folder, self.engine, self.world, config_hash(self.config))
        self.refused = [one.path for one in restored.refused]
        self.last = restored.checkpoint.progress if restored.checkpoint is not None else None
        if self.world.rank == 0:
            self.manifests.append(self.background.give_small(self._remove_litter))
        return restored

    def save(self, progress: Progress, tally: Mapping[str, float]) -> float:
        """Copy the state and have it written, unless that was done; every rank must call it.

        Args:
            progress: where the run stands.
            tally: this rank's sums since the last line of metrics.

        Returns:
            Seconds for which training waited.
        """
        if self.last is not None and (self.last.step, self.last.validated) == (progress.step, progress.validated):
            return 0.0
        self.last, started = progress, time.monotonic()
        state = TrainState(progress, tuple(self.world.gather(dict(tally))), config_hash(self.config))
        path, share, rank = (
            folder_of(self.run_folder, progress.step, self.attempt),
            self.engine.state(),
            self.world.rank,
        )
        written = self.background.give(lambda: write_share(self.storage, path, rank, share))
        self.pending.append(Pending(path, state, written))
        return time.monotonic() - started

    def is_share_written(self) -> bool:
        """Say whether this rank's share of the oldest state under way is written.

        Raises:
            StorageError: it could not be, or a manifest could not.
        """
        for manifest in [future for future in self.manifests if future.done()]:
            manifest.result()
            self.manifests.remove(manifest)
        if not self.pending or not self.pending[0].share.done():
            return False
        self.pending[0].share.result()
        return True

    def complete(self) -> None:
        """Make the oldest state under way visible; every rank must call it, once all shares are written."""
        pending = self.pending.popleft()
        shares = self.world.gather(pending.share.result())
        if self.world.rank == 0:
            files = [entry for share in shares for entry in share]
            self.manifests.append(self.background.give_small(lambda: self._complete(pending, files)))

    def finish(self) -> None:
        """Wait until all states are visible; every rank must call it.

        Raises:
            StorageError: one cannot be written.
        """
        while self.pending:
            self.complete()
        for manifest in self.manifests:
            manifest.result()
        self.world.gather(None)  # no rank goes on before the manifest is there
        self.background.close()

    def _complete(self, pending: Pending, files: list[FileEntry]) -> None:
        done = complete(self.storage, pending.path, files, pending.state)
        found = list_checkpoints(self.storage, self.run_folder)
        usable = [one for one in found if one.path not in self.refused]
        assert done in usable, "a manifest that was written is read"
        stay = {one.path for one in to_keep(usable, self.config.checkpoint)}
        for one in found:
            if one.path not in stay:
                self._delete(one)

    def _delete(self, checkpoint: Checkpoint) -> None:
        self.storage.delete(f"{checkpoint.path}/{MANIFEST}")  # first, so that no reader meets a torso
        self.storage.delete(checkpoint.path)

    def _remove_litter(self) -> None:
        for one in survey(self.storage, self.run_folder)[1]:
            if not one.path.endswith(self.attempt):
                self.storage.delete(one.path)
        for path in self.storage.list(self.run_folder, recursive=True):
            if is_cut_off(path):
                self.storage.delete(path)
