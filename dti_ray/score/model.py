"""Which model scores: a run's best state or an export, named so that no other one can take its place unnoticed.

Stage: batch scoring. In: the `score` section, the root. Out: `Chosen`.
Invariant: `origin` names the bytes of the weights. Whoever loads the model holds what was read against that, so that
a job never mixes two states of a run, also when it goes on after a break.
"""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa
from pyarrow import parquet as pq

from dti_ray.config import RunConfig, config_hash, from_yaml
from dti_ray.data.interactions import open_dataset, read_items
from dti_ray.errors import Fault, InputError, RunError
from dti_ray.export import CONFIG_FILE, ITEM_TOKENS_FILE
from dti_ray.infer.load import Origin, find_export
from dti_ray.infer.model import CtrModel
from dti_ray.storage import Storage, absolute
from dti_ray.train.checkpoint import find_best
from dti_ray.train.identity import load_run


@dataclass(frozen=True)
class Chosen:
    """The model that scores.

    Attributes:
        uri: the run's name, or the export.
        root: storage root of a run; None for an export.
        config: that it was trained with.
        origin: the bytes that it is made of.
    """

    uri: str
    root: str | None
    config: RunConfig
    origin: Origin

    @property
    def identity(self) -> dict[str, str]:
        """What it is, in words that JSON takes."""
        names = {"run": self.uri} if self.root is not None else {"export": self.uri, "run": self.config.train.run}
        origin = self.origin
        hashes = {"config_hash": config_hash(self.config), "sha256": origin.sha256}
        return {**names, "checkpoint": origin.checkpoint, **hashes}

    def load(self, device: str | None) -> CtrModel:
        """Load it.

        Args:
            device: such as cpu; None takes the GPU if there is one.

        Raises:
            RunError: by now the run has another best state, or the export was written anew.
            InputError, StorageError: it cannot be loaded.
        """
        model = CtrModel.load(self.uri, device, self.root)
        if model.origin != self.origin:
            where = self.uri if self.origin.is_export else f"best state of run {self.uri}"
            hint = "choose another score.name, or export the run and score by score.model, which nobody writes to"
            expected = f"{self.origin.name}, as when scoring began"
            raise RunError(Fault(where, f"is {model.origin.name} by now", expected, hint))
        return model

    def item_ids(self) -> pa.Array:
        """Return the ids that it knows."""
        if self.root is not None:
            return read_items(open_dataset(Storage(self.root), self.config.data.name))["item_id"].combine_chunks()
        content = Storage(self.uri).read(ITEM_TOKENS_FILE)
        return pq.read_table(pa.BufferReader(content), columns=["item_id"])["item_id"].combine_chunks()


def choose(config: RunConfig, storage: Storage) -> Chosen:
    """Find the model that a configuration names, without loading it.

    Raises:
        InputError: there is none, or it has no usable state.
        StorageError: it cannot be read.
    """
    uri, root = config.score.model, absolute(storage.root)  # workers may run in another folder
    if uri is None:
        stored = load_run(storage, config.train.run)
        best = find_best(storage, f"runs/{config.train.run}")
        return Chosen(config.train.run, root, stored, Origin.of_state(best))
    uri = absolute(uri)
    found = find_export(uri)
    if found is None:
        hint = "`dti-ray export RUN --to FOLDER` writes one; a run is named by train.run"
        raise InputError(Fault(f"score.model={config.score.model}", "is no export that can score", hint=hint))
    stored = from_yaml(Storage(uri).read(CONFIG_FILE).decode())
    return Chosen(uri, None, stored, found[1])
