"""The tokenizer, the model and the name of a run: loadable, fitting, free.

Stage: a check. In: a configuration, and the data set if there is one. Out: `Check`s, and what was loaded, for the
checks after them.
Invariant: no weights come into memory.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from transformers import PreTrainedTokenizerBase

from dti_ray.config import RunConfig
from dti_ray.data.interactions import Dataset
from dti_ray.data.prompts import TokenTable, token_table
from dti_ray.doctor.check import Check, passed, refused, size, skipped, warned
from dti_ray.errors import ConfigError, Fault, InputError
from dti_ray.estimate import estimate
from dti_ray.model.decoder import load_tokenizer
from dti_ray.model.shape import build_shape
from dti_ray.storage import Storage
from dti_ray.train.checkpoint import list_checkpoints
from dti_ray.train.identity import check_same_run
from dti_ray.train.inputs import Inputs, anywhere, check_fits
from dti_ray.train.tokens import tokenizer_and_table

STATE_BYTES_PER_WEIGHT = 12  # the weight and AdamW's two moments, fp32
IMPORTED = ("PyTorch", "Transformers", "Ray Train")  # with this module
SAMPLE = ["text"]  # in place of a catalogue
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")

T = TypeVar("T")


@dataclass(frozen=True)
class Words:
    """The run's tokenizer and tokenised catalogue; of a sample where there is no data set yet."""

    tokenizer: PreTrainedTokenizerBase
    table: TokenTable


def look_at_tokenizer(config: RunConfig, dataset: Dataset | None) -> tuple[Check, Words | None]:
    """Load the tokenizer, see that labels are one token each, and tokenise the catalogue if it is there.

    Raises:
        ConfigError: it cannot be loaded, or labels, prefix or template do not fit it.
    """
    name, config = "tokenizer", anywhere(config)
    if config.model.name_or_path is not None:
        _check_place(config.model.name_or_path)
    if dataset is not None:
        tokenizer, table = _told(config, lambda: tokenizer_and_table(config, dataset.storage, dataset))
        cut = f", {table.cut_items:,} cut" if table.cut_items else ""
        items = f"{dataset.items:,} items of up to {int(table.lengths.max())} tokens{cut}"
        return passed(name, f"{table.vocabulary:,} tokens; {items}"), Words(tokenizer, table)
    if config.model.name_or_path is None:
        return skipped(name, "it is built from the catalogue of the data set"), None
    named, gguf = config.model.name_or_path, config.model.gguf_file
    tokenizer = _told(config, lambda: load_tokenizer(named, gguf))
    table = token_table(SAMPLE, tokenizer, config.prompt)
    return passed(name, f"{table.vocabulary:,} tokens; labels are one token each"), Words(tokenizer, table)


def look_at_model(config: RunConfig, dataset: Dataset | None, words: Words) -> tuple[Check, int | None]:
    """Build the model without its weights, look for their files, and see whether rows hold a prompt.

    Returns:
        The check, and the bytes of one state of a run.

    Raises:
        ConfigError: the model cannot be built or trained, or rows are too small.
    """
    config = anywhere(config)
    if dataset is not None:
        check_fits(config, Inputs(dataset, words.table, words.tokenizer))
    shape = build_shape(config, words.table)
    weights = sum(weight.numel() for weight in shape.parameters())
    trained = sum(weight.numel() for weight in shape.parameters() if weight.requires_grad)
    state_bytes = STATE_BYTES_PER_WEIGHT * trained
    kind = shape.decoder.config.model_type
    found = f"{kind}: {weights / 1e6:,.1f} M weights, {trained / 1e6:,.1f} M trained, a state {size(state_bytes)}"
    name, gguf = config.model.name_or_path, config.model.gguf_file
    if name is None:
        return passed("model", f"{found}; drawn at random"), state_bytes
    if missing := missing_weights(name, gguf):
        advice = "copy the model's folder again" if Path(name).is_dir() else _to_fetch(name)
        return warned("model", f"{found}; not here: {', '.join(missing)}", advice), state_bytes
    return passed("model", found), state_bytes


def look_at_run(config: RunConfig) -> Check:
    """See whether the run's name is free, or its own; a warning if not, as only training minds."""
    storage = Storage(config.storage.root).patient(0)
    try:
        check_same_run(anywhere(config), storage)
    except InputError as error:
        refusal = refused("run", error)
        return warned("run", refusal.found, f"`dti-ray train` will refuse this: {refusal.advice}")
    where = storage.display("runs", config.train.run)
    states = list_checkpoints(storage, f"runs/{config.train.run}")
    return passed("run", f"{where}: goes on from step {states[-1].progress.step:,}" if states else f"{where}: new")


def memory_of_worker(config: RunConfig, dataset: Dataset, words: Words) -> int:
    """Return the bytes that `dti-ray estimate` foretells for one GPU."""
    # Peak and MFU change hours only.
    return estimate(anywhere(config), dataset, words.table, peak_flops=1.0, mfu=1.0)[-1].memory.total


def missing_weights(name: str, gguf_file: str | None) -> list[str]:
    """Return what a model's folder, or this machine's cache of the hub, lacks of its weights."""
    folder = Path(name).expanduser()
    if gguf_file is not None:
        return [] if _find(name, folder, gguf_file) is not None else [gguf_file]
    found = {file: path for file in WEIGHTS if (path := _find(name, folder, file)) is not None}
    if not found:
        return [WEIGHTS[0]]
    first, path = next(iter(found.items()))
    if not first.endswith(".index.json"):
        return []
    parts = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
    return [part for part in parts if _find(name, folder, part) is None]


def _check_place(name: str) -> None:
    """Refuse a path without a folder; the hub would complain of its letters."""
    if (name.startswith(("/", ".", "~")) or name.count("/") > 1) and not Path(name).expanduser().is_dir():
        hint = "see the path and what is mounted, or give a name of the hub"
        raise ConfigError(Fault("model.name_or_path", f"{name} is no folder of this machine", hint=hint))


def _told(config: RunConfig, load: Callable[[], T]) -> T:
    """Load something of the hub; where that fails, say how it could be reached."""
    name = config.model.name_or_path
    try:
        return load()
    except ConfigError as error:
        if name is None or Path(name).is_dir():
            raise
        faults = (replace(one, hint=one.hint or _to_fetch(name)) for one in error.faults)
        raise ConfigError(*faults) from None


def _find(name: str, folder: Path, file: str) -> Path | None:
    if folder.is_dir():
        return folder / file if (folder / file).is_file() else None
    try:
        cached = try_to_load_from_cache(name, file)
    except HFValidationError:
        return None
    return Path(cached) if isinstance(cached, str) else None


def _to_fetch(name: str) -> str:
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        return f"HF_HUB_OFFLINE=1 forbids fetching {name}: name a folder that all nodes see"
    return "every node will fetch them once; a folder that all nodes see is safer (`hf download --local-dir`)"
