"""Raw logs for tests of `prepare`: written in every format, and what a data set made of them holds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import csv as pa_csv
from pyarrow import parquet as pq

from dti_ray.config import RunConfig, load_config
from dti_ray.data.interactions import Dataset, read_all, read_items

NOON = 1_709_294_400  # 2024-03-01 12:00 UTC
HEADING = ("user_id", "item_id", "rating", "timestamp")


def make_log(interactions: int, users: int = 20, items: int = 12, seed: int = 0) -> pa.Table:
    """Return random interactions, no two of them in one second; users come in several lengths."""
    rng = np.random.default_rng(seed)
    shares = rng.dirichlet(np.ones(users) * 2)
    columns = (
        rng.choice(users, interactions, p=shares),
        rng.integers(0, items, interactions),
        rng.integers(1, 6, interactions),
        NOON + rng.permutation(interactions) * 997,
    )
    return pa.table(dict(zip(HEADING, map(pa.array, columns), strict=True)))


def write_log(path: Path, table: pa.Table) -> Path:
    """Write a table as the ending of the path says; text files hold its values as Python writes them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(table, path, write_page_checksum=True)
    elif path.suffix == ".csv":
        pa_csv.write_csv(table, path)
    else:
        lines = (json.dumps(row, default=str, ensure_ascii=False) + "\n" for row in table.to_pylist())
        path.write_text("".join(lines), encoding="utf-8")
    return path


def write_lines(path: Path, *lines: object) -> Path:
    """Write a text file; lines that are sequences of values are joined by commas."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = [
        ",".join(map(str, line)) if isinstance(line, Sequence) and not isinstance(line, str) else str(line)
        for line in lines
    ]
    path.write_text("\n".join(text) + "\n", encoding="utf-8")
    return path


def cut(table: pa.Table, parts: int, seed: int = 0) -> list[pa.Table]:
    """Shuffle a table's rows and cut them into parts of about the same size."""
    order = np.random.default_rng(seed).permutation(len(table))
    return [table.take(pa.array(part)) for part in np.array_split(order, parts)]


def tabular(path: Path | str, *overrides: str) -> RunConfig:
    """Return a configuration that prepares a log by a mapping."""
    return load_config([], ["data.name=tiny", "data.source=tabular", f"data.path={path}", *overrides])


def contents(dataset: Dataset) -> dict[str, bytes]:
    """Return path below the data set's folder → bytes, for all files."""
    files = dataset.storage.list(dataset.folder, recursive=True)
    return {path.removeprefix(f"{dataset.folder}/"): dataset.storage.read(path) for path in files}


def learnt(dataset: Dataset) -> dict[str, bytes]:
    """Return the files that training reads: shards and catalogue."""
    return {
        path: content for path, content in contents(dataset).items() if path.startswith(("interactions/", "items."))
    }


def quarantined(dataset: Dataset) -> list[dict[str, Any]]:
    """Return the refused rows, sorted by file and row."""
    files = [path for path in contents(dataset) if path.startswith("quarantine/")]
    rows = [row for path in files for row in pq.read_table(dataset.storage.path(dataset.folder, path)).to_pylist()]
    return sorted(rows, key=lambda row: (row["file"], row["row"] or 0))


def users_of(dataset: Dataset) -> dict[str, list[tuple[str, int, int, int]]]:
    """Return user → (item id, label, second, split) in order, as the shards hold them."""
    users, ids = read_all(dataset), read_items(dataset)["item_id"].to_pylist()
    found = {}
    for at, user in enumerate(users.user_ids.tolist()):
        own = slice(users.offsets[at], users.offsets[at + 1])
        columns = (users.items[own], users.labels[own], users.times[own], users.splits[own])
        found[user] = [(ids[item], *rest) for item, *rest in zip(*(c.tolist() for c in columns), strict=True)]
    return found


def expected_users(rows: Sequence[Mapping[str, Any]], config: RunConfig) -> dict[str, list[tuple[str, int, int, int]]]:
    """Do with loops what `prepare` does with a log of distinct seconds: `rating > 3`, time in seconds, no bad row."""
    data, found = config.data, {}
    whole = sorted(row["timestamp"] for row in rows)
    shares = (data.train_fraction, data.train_fraction + data.valid_fraction)
    for user in {str(row["user_id"]) for row in rows}:
        own = sorted(
            (row["timestamp"], str(row["item_id"]), row["rating"]) for row in rows if str(row["user_id"]) == user
        )
        if len(own) < data.min_interactions:
            continue
        found[user] = []
        for rank, (time, item, rating) in enumerate(own):
            if data.split == "leave_last":
                later = [rank >= len(own) - 2 * data.leave_last, rank >= len(own) - data.leave_last]
            elif data.split == "user_time":
                later = [rank >= int(share * len(own) + 1e-9) for share in shares]
            else:
                later = [whole.index(time) >= share * len(whole) - 1e-9 for share in shares]
            found[user].append((item, int(rating > 3), time, sum(later)))
    return found
