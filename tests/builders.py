"""Small worlds for tests: random users, catalogues and models whose differences are large enough to see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from pyarrow import parquet as pq

from dti_ray.config import RunConfig, load_config
from dti_ray.data.interactions import (
    ITEMS_FILE,
    SEQUENCES,
    TRAIN,
    Dataset,
    UserSequences,
    dataset_folder,
    open_dataset,
    write_shard,
)
from dti_ray.data.packing import PackedRow, PackSpec, pack, pack_spec
from dti_ray.data.prompts import GAPS, TokenTable
from dti_ray.model.backbone import ClickModel, build_model
from dti_ray.model.batch import collate
from dti_ray.report import MaskPicture
from dti_ray.storage import Storage

VOCABULARY = 60
ITEMS = 30
LARGE_STD = 0.15  # of all matrices: logits then differ by about 1 between targets
TINY = [
    "model.hidden_size=32", "model.heads=4", "model.kv_heads=2", "model.intermediate_size=48",
    "packing.k=20", "packing.n=10", "packing.row_tokens=4096", "train.rows_per_pass=8",
    "optim.lr=3e-3", "optim.targets_per_step=256",
]  # fmt: skip


def make_config(*overrides: str) -> RunConfig:
    return load_config([], [*TINY, "train.precision=fp32", *overrides])


def make_table(seed: int = 0, prefix: int = 3, longest: int = 3, gaps: bool = False) -> TokenTable:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, longest + 1, ITEMS)
    phrases = np.concatenate([[0], 1 + np.arange(len(GAPS)) % 3]) if gaps else np.zeros(1, dtype=np.int64)
    return TokenTable(
        tokens=rng.integers(0, VOCABULARY, lengths.sum()).astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        prefix=np.arange(prefix, dtype=np.int32),
        vocabulary=VOCABULARY,
        marker_ids=(None, 0, 1),
        gap_tokens=np.arange(phrases.sum(), dtype=np.int32) % VOCABULARY,
        gap_offsets=np.concatenate([[0], np.cumsum(phrases)]),
    )


def make_sequences(lengths: Sequence[int], seed: int = 0, split: int = TRAIN) -> UserSequences:
    """Return users whose interactions are all of one split; about half of them share their second."""
    rng = np.random.default_rng(seed)
    size = sum(lengths)
    return UserSequences(
        user_ids=np.array([f"user {i}" for i in range(len(lengths))]),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        items=rng.integers(0, ITEMS, size).astype(np.int32),
        labels=rng.integers(0, 2, size).astype(np.int8),
        times=np.concatenate([np.sort(rng.integers(0, max(2, n // 2), n)) for n in lengths]),
        splits=np.full(size, split, dtype=np.int8),
    )


def make_model(config: RunConfig, table: TokenTable, seed: int = 0) -> ClickModel:
    model = build_model(config, table).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=LARGE_STD, generator=generator)
    return model


def train_spec(config: RunConfig, **changes: int | None) -> PackSpec:
    return pack_spec(config.packing, config.prompt.context, TRAIN, **changes)


def score(model: ClickModel, rows: Sequence[PackedRow], table: TokenTable) -> dict[tuple[int, int], float]:
    """Return the log-odds of each (user, interaction) of some rows, padded together."""
    batch = collate(rows, table)
    with torch.no_grad():
        log_odds = model(batch)[batch.is_target].tolist()
    users = np.concatenate([row.users for row in rows]).tolist()
    interactions = np.concatenate([row.interaction[row.after] for row in rows]).tolist()
    return dict(zip(zip(users, interactions, strict=True), log_odds, strict=True))


def score_packed(
    model: ClickModel, sequences: UserSequences, table: TokenTable, spec: PackSpec, seed: int | None = None
) -> dict[tuple[int, int], float]:
    rng = None if seed is None else np.random.default_rng(seed)
    return score(model, list(pack(sequences, table, spec, rng=rng)), table)


def largest_difference(a: dict[tuple[int, int], float], b: dict[tuple[int, int], float]) -> float:
    assert a.keys() == b.keys()
    return max(abs(a[key] - b[key]) for key in a)


def write_dataset(root: Path, lengths: Sequence[int], segment_interactions: int = 40) -> Dataset:
    """Write a prepared data set of random users, each split 80/10/10 in time, and open it."""
    storage, folder = Storage(str(root)), dataset_folder("tiny")
    sequences = make_sequences(lengths)
    splits = np.concatenate([np.digitize(np.arange(n) / n, [0.8, 0.9]) for n in lengths])
    offsets = pa.array(sequences.offsets, pa.int32())
    flat = (sequences.items, sequences.labels, sequences.times, splits.astype(np.int8))
    lists = [pa.ListArray.from_arrays(offsets, pa.array(values)) for values in flat]
    table = pa.table([pa.array(sequences.user_ids.tolist()), *lists], schema=SEQUENCES)
    entry, segments = write_shard(storage, folder, "interactions/part-00000.parquet", table, segment_interactions)
    items = pa.table({"item_id": [f"{i:02d}" for i in range(ITEMS)], "title": [f"film {i}" for i in range(ITEMS)]})
    sink = pa.BufferOutputStream()
    pq.write_table(items, sink)
    catalogue = storage.write(f"{folder}/{ITEMS_FILE}", sink.getvalue().to_pybytes())
    counts = np.bincount(splits, minlength=3).tolist()
    dataset = Dataset(
        storage, "tiny", len(lengths), sum(lengths), ITEMS, float(sequences.labels.mean()),
        (counts[0], counts[1], counts[2]), {}, tuple(segments), {"split": "user_time"},
    )  # fmt: skip
    files = [entry, replace(catalogue, path=ITEMS_FILE)]
    storage.write_manifest(folder, files, dataset.manifest())
    return open_dataset(storage, "tiny")


def damage(dataset: Dataset) -> None:
    """Overwrite the middle of the data set's first shard."""
    path = Path(dataset.storage.path(dataset.folder, dataset.segments[0].shard))
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 200] = bytes(200)
    path.write_bytes(content)


def streaming_mask(context: int, targets: int, words: int = 2, prefix: int = 2, prompts: int = 1) -> MaskPicture:
    """Make the anchored mask: causal within a prompt, and [SUM] hidden from all others."""
    kind, label, prompt = [], [], []
    for number in range(prompts):
        one = ["prefix"] * prefix
        names = ["user", ":"][:prefix]
        for item in range(context + targets):
            text = "context" if item < context else "target"
            one += [text] * words + (["sum"] if text == "target" else []) + ["feedback"]
            names += [f"Film{item}", "(1995)", "noir", "x"][:words] + (["[SUM]"] if text == "target" else [])
            names += ["<yes>" if item % 3 else "<no>"]
        kind, label, prompt = kind + one, label + names, prompt + [number] * len(one)
    visible = np.tri(len(kind), dtype=bool) & (np.array(prompt)[:, None] == np.array(prompt))
    hidden = np.array([name == "sum" for name in kind])
    visible &= ~hidden[None, :] | np.eye(len(kind), dtype=bool)
    return MaskPicture(visible, kind, label, "One row: a streaming prompt with four context interactions")
