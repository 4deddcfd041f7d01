"""What tests of scoring share: a reader over a random model, and users as histories."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from dti_ray.config import RunConfig, config_hash
from dti_ray.data.interactions import TEST, TRAIN
from dti_ray.data.prompts import TokenTable
from dti_ray.infer.requests import History
from dti_ray.infer.slate import Reader, Slate
from dti_ray.model.backbone import build_model
from dti_ray.storage import Storage
from dti_ray.train.checkpoint import TrainState, complete, folder_of, write_share
from dti_ray.train.engine import TorchEngine
from dti_ray.train.identity import write_identity
from dti_ray.train.state import Progress
from dti_ray.train.tokens import tokenizer_and_table
from tests.builders import (
    LARGE_STD,
    make_config,
    make_model,
    make_sequences,
    make_table,
    score_packed,
    train_spec,
    write_dataset,
)

CPU = torch.device("cpu")
LENGTHS = [30, 12, 25]
WINDOWS = {
    "interactions": ["packing.window=interactions"],
    "tokens": ["packing.window=tokens", "packing.window_tokens=9"],
    "off": ["packing.window=off"],
}
DEBIAS = [[], ["debias.strength=0.4"], ["debias.strength=0.3", "debias.rotary=drop", "debias.distance=log1p"]]
RESETS = {
    "off": [],
    "uniform": ["reset.mode=uniform", "reset.alpha=0.3"],
    "distance": ["reset.mode=distance", "reset.alpha=0.6"],
    "constant": ["reset.mode=constant", "reset.alpha=1.0"],
}
LATER_S = 100  # what comes after a history is so much later


def make_reader(*overrides: str, prefix: int = 3, gaps: bool = False, seed: int = 0) -> Reader:
    config = make_config("packing.n=4", "packing.k=3", *overrides)
    table = make_table(seed, prefix=prefix, gaps=gaps)
    return Reader(make_model(config, table), config, table, CPU)


def make_history(size: int, seed: int = 0, table: TokenTable | None = None) -> History:
    """Return one random user; about half of its interactions share their second."""
    table = table or make_table()
    sequences = make_sequences([max(size, 1)], seed)
    texts = [table.tokens[table.offsets[item] : table.offsets[item + 1]] for item in sequences.items]
    lengths = np.array([len(text) for text in texts], dtype=np.int64)
    return History(np.concatenate(texts), lengths, sequences.labels, sequences.times)[:size]


def make_slate(
    size: int, candidates: int, seed: int = 0, same_second: bool = False, table: TokenTable | None = None
) -> Slate:
    history = make_history(size, seed, table)
    latest = history.latest or 0
    moment = np.full(candidates, latest if same_second else latest + LATER_S)
    return Slate(history, replace(make_history(candidates, seed + 1, table), times=moment))


def alone(reader: Reader, slate: Slate, n: int | None = None) -> np.ndarray:
    """Score each candidate in a stand-alone prompt of its own, through packing and the model's own backend."""
    found = []
    for i in range(len(slate.candidates)):
        whole = slate.history + slate.candidates[i : i + 1]
        found.append(score_last(reader, whole, reader.n if n is None else n))
    return np.array(found)


def score_last(reader: Reader, history: History, n: int) -> float:
    """Score the last interaction after the n before it."""
    splits = np.full(len(history), TEST, dtype=np.int8)
    splits[-1] = TRAIN
    spec = train_spec(reader.config, k=1, n=n, row_tokens=2000)
    scored = score_packed(reader.model, replace(history.sequences(), splits=splits), own_table(reader, history), spec)
    return scored[0, len(history) - 1]


def own_table(reader: Reader, history: History) -> TokenTable:
    """Return a table whose items are the interactions of a history."""
    return replace(
        reader.table, tokens=history.tokens, offsets=np.concatenate([[0], np.cumsum(history.lengths)])
    )  # fmt: skip


def streamed(reader: Reader, history: History, k: int | None, n: int) -> np.ndarray:
    """Score every interaction in training's packed prompts."""
    spec = train_spec(reader.config, k=k, n=n, row_tokens=5000)
    scored = score_packed(reader.model, history.sequences(), own_table(reader, history), spec)
    return np.array([scored[0, i] for i in range(len(history))])


def write_run(root: Path, *overrides: str, lengths: Sequence[int] = LENGTHS) -> RunConfig:
    """Write a run as training leaves it, with random weights whose predictions differ visibly, and its data set."""
    dataset = write_dataset(root, lengths)
    config = make_config(
        f"storage.root={root}", "data.name=tiny", "train.engine=torch", "cluster.workers=1", "packing.n=4",
        "model.layers=2", "prompt.item_template=word{item_id} of {title}", *overrides,
    )  # fmt: skip
    storage = Storage(str(root))
    tokenizer, table = tokenizer_and_table(config, storage, dataset)
    write_identity(config, storage, tokenizer)
    model = build_model(config, table)
    generator = torch.Generator().manual_seed(0)
    for weight in model.trained().values():
        if weight.ndim >= 2:
            torch.nn.init.normal_(weight, std=LARGE_STD, generator=generator)
    path = folder_of(f"runs/{config.train.run}", 1, "test")
    files = write_share(storage, path, 0, TorchEngine(model, config, CPU).state())
    complete(storage, path, files, TrainState(Progress(step=1), (), config_hash(config)))
    return config
