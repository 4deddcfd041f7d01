"""Histories come from the one shard that holds a user, however many partitions the requests have."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from dti_ray.data.interactions import SEQUENCES, Dataset, shard_name, write_shard
from dti_ray.score import histories
from dti_ray.score.histories import Past, partitions_of, read_pasts
from dti_ray.storage import Storage

USERS, PARTITIONS = [f"user {i}" for i in range(40)], 3


def write(root: Path, partitions: int | None) -> Dataset:
    """Write users to shards by their hash; user i has i + 1 interactions at 0, 2, 4 ... s."""
    storage, segments, files = Storage(str(root)), [], []
    for shard in range(PARTITIONS):
        users = sorted(user for user in USERS if zlib.crc32(user.encode()) % PARTITIONS == shard)
        lengths = [int(user.split()[1]) + 1 for user in users]
        times = [[2 * at for at in range(length)] for length in lengths]
        rows = {"user_id": users, "items": times, "labels": [[1] * n for n in lengths], "times": times,
                "splits": [[0] * n for n in lengths]}  # fmt: skip
        file, own = write_shard(storage, "datasets/d", shard_name(shard), pa.table(rows, SEQUENCES), 30)
        files.append(file)
        segments += own
    return Dataset(storage, "d", len(USERS), 820, 90, 1.0, (820, 0, 0), {}, tuple(segments), {},
                   partitions=partitions, files=tuple(files))  # fmt: skip


@pytest.mark.parametrize("known", [PARTITIONS, None])
def test_every_user_is_found_in_its_partition(
    tmp_path: Path, known: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(histories, "READ_INTERACTIONS", 50)
    dataset = write(tmp_path, known)
    parts = partitions_of(dataset, pairs=6_000, unit_pairs=1_000)
    assert parts == 6
    found: dict[str, Past] = {}
    for partition in range(parts):
        wanted = {user for user in [*USERS, "nobody"] if zlib.crc32(user.encode()) % parts == partition}
        found |= read_pasts(dataset, wanted, partition)
    assert sorted(found) == sorted(USERS)
    assert all(len(found[user].items) == int(user.split()[1]) + 1 for user in USERS)


def test_one_shard_is_read_once_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(histories, "READ_INTERACTIONS", 50)
    dataset, read = write(tmp_path, PARTITIONS), []
    for segments in histories._reads(dataset, 4):
        assert len({segment.shard for segment in segments}) == 1
        assert len(segments) == 1 or sum(segment.interactions for segment in segments) <= 50
        read += segments
    assert read == [segment for segment in dataset.segments if segment.shard == shard_name(1)]


def test_what_happens_at_the_moment_itself_is_not_before_it() -> None:
    past = Past(*(np.array(values) for values in ([5, 6, 7, 8], [1, 0, 1, 0], [1, 3, 3, 9])))
    assert past.before(3).items.tolist() == [5]
    assert past.before(4).items.tolist() == [5, 6, 7]
    assert past.before(None).items.tolist() == [5, 6, 7, 8]
