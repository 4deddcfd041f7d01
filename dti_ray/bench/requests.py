"""A log of requests made up for a data set, to see how fast it is scored.

Stage: bench. In: a data set. Out: Parquet files of (user, candidates) on the storage root.
Invariant: the same seed and sizes make the same log; users and items are the data set's own.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from dti_ray.data.gather import write_parquet
from dti_ray.data.interactions import Dataset, read_items, read_segment

FILE_ROWS = 2_000
FOLDER = "bench/requests"


def write_requests(dataset: Dataset, rows: int, candidates: int, seed: int) -> str:
    """Write a log in place of an earlier one.

    Args:
        dataset: whose users ask, one after the other; the first ones again where there are fewer than rows.
        rows: slates.
        candidates: random items of each.
        seed: of the items.

    Returns:
        The log's folder, as a user would type it.
    """
    rng, storage = np.random.default_rng(seed), dataset.storage
    items = np.array(read_items(dataset)["item_id"].to_pylist(), dtype=np.str_)
    users: list[str] = []
    for segment in dataset.segments:
        users += read_segment(dataset, segment).user_ids.tolist()
        if len(users) >= rows:
            break
    storage.delete(FOLDER)
    for number, first in enumerate(range(0, rows, FILE_ROWS)):
        size = min(FILE_ROWS, rows - first)
        asking = [users[row % len(users)] for row in range(first, first + size)]
        asked = items[rng.integers(0, len(items), (size, candidates))].tolist()
        table = pa.table({"user_id": asking, "candidates": asked})
        write_parquet(storage, FOLDER, f"part-{number:05d}.parquet", table)
    return storage.display(FOLDER) + dataset.storage.root.partition("?")[1] + dataset.storage.root.partition("?")[2]
