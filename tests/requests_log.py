"""Logs of requests for tests of batch scoring."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet as pq

from dti_ray.config import RunConfig, load_config
from dti_ray.score.log import RequestLog, locate
from dti_ray.score.scatter import Rules

USERS = ["user 0", "user 1", "user 2", "nobody", None]


def write_log(folder: Path, columns: Mapping[str, Any], files: int = 1, row_group_size: int = 4) -> Path:
    """Write a log of requests, cut into files of several row groups."""
    table, folder = pa.table(columns), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    size = -(-len(table) // files)
    for number in range(files):
        part = table.slice(number * size, size)
        pq.write_table(part, folder / f"part-{number}.parquet", row_group_size=row_group_size)
    return folder


def slates(rows: int, seed: int = 0) -> dict[str, list[Any]]:
    """Return requests of all sorts of users, with some empty slates and unknown items."""
    items = [f"{(7 * i + seed) % 30:02d}" for i in range(rows * 5)]
    candidates: list[list[str] | None] = [items[5 * row : 5 * row + row % 6] for row in range(rows)]
    for row in range(3, rows, 11):
        candidates[row] = None
    for row in range(4, rows, 9):
        candidates[row] = [*items[row : row + 2], "new"]
    times = [None if row % 4 == 0 else 3 + row % 9 for row in range(rows)]
    return {"user_id": [USERS[row % len(USERS)] for row in range(rows)], "candidates": candidates, "time": times,
            "request": [f"r{row}" for row in range(rows)]}  # fmt: skip


def config_for(log: Path, root: Path, *overrides: str) -> RunConfig:
    """Return a configuration that scores a log by the run of `tests.scoring.write_run`."""
    return load_config([], [f"storage.root={root}", f"score.input={log}", "score.unknown_item=null", *overrides])


def rules_of(config: RunConfig, needs_time: bool = False) -> Rules:
    return Rules(locate(config.score), config.score, config.data, needs_time)


def located(log: Path, *overrides: str) -> RequestLog:
    return locate(load_config([], [f"score.input={log}", *overrides]).score)


def requests_of(config: RunConfig) -> pa.Table:
    """Return all requests of a log as the scoring half reads them, in the order of the log."""
    from dti_ray.score.scatter import Scattered, _blocks

    rules = rules_of(config)
    blocks: Sequence[pa.Table] = [block for piece in rules.log.pieces for block in _blocks(piece, rules, Scattered())]
    return pa.concat_tables(blocks)
