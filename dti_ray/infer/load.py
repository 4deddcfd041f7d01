"""A trained model from where it lies: a run below a storage root, or a folder that `dti-ray export` wrote.

Stage: scoring. In: a name, folder or URI. Out: `Trained`: configuration, weights, catalogue, and their `Origin`.
Invariant: every file is held against the hash in its manifest, and the origin is told from the manifest that was read,
whatever lies there by now; both sources give the same log-odds.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import torch
from pyarrow import parquet as pq

from dti_ray.config import RunConfig, from_yaml
from dti_ray.config.schema import StorageConfig
from dti_ray.data.interactions import open_dataset, read_items
from dti_ray.data.prompts import TokenTable, token_table
from dti_ray.errors import Fault, InputError
from dti_ray.export import ADAPTER, CONFIG_FILE, HOW_FILE, ITEM_TOKENS_FILE, MERGED, TOKENIZER, TOKENS
from dti_ray.infer.calibration import IDENTITY, Calibration
from dti_ray.infer.requests import Catalogue
from dti_ray.model.attention import NAME, register
from dti_ray.model.backbone import ClickModel, build_model
from dti_ray.model.decoder import load_tokenizer, load_whole
from dti_ray.storage import FileEntry, Storage, fingerprint
from dti_ray.train.checkpoint import Checkpoint, holds_weights, read_best
from dti_ray.train.identity import load_run
from dti_ray.train.tokens import tokenizer_and_table


@dataclass(frozen=True)
class Origin:
    """Which bytes a model is made of; another model has another origin.

    Attributes:
        checkpoint: path of the run's state.
        sha256: of the state's weights, or of all files of an export, as `fingerprint` shortens them.
        is_export: an export may be written anew from the same state.
    """

    checkpoint: str
    sha256: str
    is_export: bool

    @classmethod
    def of_state(cls, checkpoint: Checkpoint) -> Origin:
        """Return the origin of a model that is read from a run's state."""
        weights = (file for file in checkpoint.files if holds_weights(file.path))
        return cls(checkpoint.path, fingerprint(weights), is_export=False)

    @classmethod
    def of_export(cls, files: Iterable[FileEntry], body: Mapping[str, str]) -> Origin:
        """Return the origin of a model that is read from an export with this manifest."""
        return cls(body["checkpoint"], fingerprint(files), is_export=True)

    @property
    def name(self) -> str:
        """Name of the state; of an export, with digits that tell one from the next."""
        state = self.checkpoint.rpartition("/")[2]
        return f"{state}/{self.sha256[:8]}" if self.is_export else state


@dataclass(frozen=True)
class Trained:
    """What scoring needs.

    Attributes:
        config: of the run.
        model: on the CPU, in fp32.
        catalogue: its items.
        origin: what was read.
        calibration: as stored with an export; none of a run.
    """

    config: RunConfig
    model: ClickModel
    catalogue: Catalogue
    origin: Origin
    calibration: Calibration = IDENTITY


def load_trained(uri: str, root: str | None) -> Trained:
    """Load the best state of a run, or an export.

    Args:
        uri: `<root>/runs/<name>`, the name alone, or an export's folder.
        root: storage root of a run that is given by its name; None: `outputs`.

    Raises:
        InputError: there is no such run or export, or it has no usable state.
        StorageError: a file is missing, or is not what was written.
    """
    if root is None:
        found = find_export(uri)
        if found is not None:
            return _from_export(Storage(uri), *found)
    storage, run = run_of(uri, root)
    config = load_run(storage, run)
    dataset = open_dataset(storage, config.data.name)
    tokenizer, table = tokenizer_and_table(config, storage, dataset)
    checkpoint, weights = read_best(storage, f"runs/{run}")
    model = build_model(config, table)
    model.load_trained(weights)
    catalogue = Catalogue(_numbers(read_items(dataset)), table, tokenizer, config.prompt)
    return Trained(config, model, catalogue, Origin.of_state(checkpoint))


def find_export(uri: str) -> tuple[list[FileEntry], Origin] | None:
    """Return files and origin of an export; None where there is no manifest, as in a run's folder.

    Raises:
        InputError: what lies there cannot score.
        StorageError: it cannot be read.
    """
    place = Storage(uri)
    found = place.read_manifest("")
    if found is None:
        return None
    files, body = found
    missing = {CONFIG_FILE, HOW_FILE, ITEM_TOKENS_FILE} - {entry.path for entry in files}
    if missing:
        problem = f"has no {sorted(missing)[0]}"
        raise InputError(Fault(place.display(), problem, "an export that can score", "export the run again"))
    return files, Origin.of_export(files, body)


def run_of(uri: str, root: str | None) -> tuple[Storage, str]:
    """Return (storage root, name of the run)."""
    if root is not None:
        return Storage(root), uri
    path, question, query = uri.partition("?")
    *above, name = path.rstrip("/").split("/")
    if not above:
        return Storage(StorageConfig().root), name
    if above[-1] != "runs":
        expected = "<root>/runs/<name>, the name of a run, or a folder that `dti-ray export` wrote"
        raise InputError(Fault(uri, "is neither a run nor an export", expected))
    return Storage(("/".join(above[:-1]) or ".") + question + query), name


def _from_export(place: Storage, files: list[FileEntry], origin: Origin) -> Trained:
    with tempfile.TemporaryDirectory(prefix="dti-ray-export-") as local:
        folder = Path(local)
        place.download("", [one for one in files if not one.path.startswith(f"{ADAPTER}/")], folder)
        config = from_yaml((folder / CONFIG_FILE).read_text())
        how = json.loads((folder / HOW_FILE).read_text())
        items = pq.read_table(folder / ITEM_TOKENS_FILE)
        tokenizer = load_tokenizer(str(folder / TOKENIZER))
        table = _table(items, token_table([], tokenizer, config.prompt))
        model = _model(folder / MERGED, config, table, how["log_odds_bias"])
    catalogue = Catalogue(_numbers(items), table, tokenizer, config.prompt)
    return Trained(config, model, catalogue, origin, Calibration(**how["calibration"] or {}))


def _table(items: pa.Table, bare: TokenTable) -> TokenTable:
    """Return the catalogue's tokens as they were exported."""
    lists = items["tokens"].combine_chunks()
    return replace(bare, tokens=lists.flatten().to_numpy(), offsets=lists.offsets.to_numpy())


def _model(folder: Path, config: RunConfig, table: TokenTable, bias: float) -> ClickModel:
    """Take markers and label rows out of the merged model again; see `dti_ray.export`."""
    register()
    whole = load_whole(str(folder), None, NAME)
    output = whole.get_output_embeddings()
    assert output is not None  # what is exported has an LM head
    read, answers = (torch.arange(*span) + table.vocabulary for span in ((0, 3), (3, len(TOKENS))))
    with torch.no_grad():
        markers, labels = whole.get_input_embeddings()(read), output.weight[answers]
        model = ClickModel(whole.get_decoder(), labels, markers, table.vocabulary, config)
        if model.head.kind == "linear":
            model.head.rows.weight.copy_(labels[1:])
            model.head.rows.bias.fill_(bias)
    return model


def _numbers(items: pa.Table) -> dict[str, int]:
    return {item: number for number, item in enumerate(items["item_id"].to_pylist())}
