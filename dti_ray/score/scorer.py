"""Units of work: how they are cut, and what an actor does with one.

Stage: batch scoring, inside actors. In: scratch files of `scatter`. Out: a shard per unit, and a tree that tells of it.
Invariant: units are a function of the log and `score.unit_pairs`; a unit has as many rows out as in.

    pairs of partition 0 in four scratch files: 3, 4, 0, 2; unit_pairs 5   →   files 0 to 1, files 2 to 3
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa

from dti_ray.data.gather import read_batch, write_parquet
from dti_ray.data.interactions import Dataset, open_dataset, read_items
from dti_ray.errors import Fault, IncompleteError
from dti_ray.infer.model import CtrModel
from dti_ray.score.histories import read_pasts
from dti_ray.score.log import USER
from dti_ray.score.plan import Job
from dti_ray.score.unit import Judge, score_requests
from dti_ray.train.host import settle


@dataclass(frozen=True)
class Unit:
    """What one actor call scores: a partition of some scratch files that follow each other."""

    partition: int
    first: int
    stop: int


def cut_units(weights: Sequence[Sequence[int]], partitions: int, unit_pairs: int) -> list[Unit]:
    """Cut each partition into units of about `unit_pairs` pairs, at scratch files; a heavy user fills several.

    Args:
        weights: of each scratch file, the pairs of each partition.
        partitions: P.
        unit_pairs: a unit ends with the file that fills it.
    """
    units = []
    for partition in range(partitions):
        first, held = 0, 0
        for block, of_block in enumerate(weights):
            held += of_block[partition]
            if held >= unit_pairs or (held and block == len(weights) - 1):
                units.append(Unit(partition, first, block + 1))
                first, held = block + 1, 0
    return units


@dataclass(frozen=True)
class Scorer:
    """Scores units; an actor has one, which keeps model and catalogue from call to call.

    Attributes:
        job: everything that is known before.
        units: all of them.
        blocks: scratch files, relative to the root.
        per_second: what the log's times are divided by.
    """

    job: Job
    units: tuple[Unit, ...]
    blocks: tuple[str, ...]
    per_second: int

    @cached_property
    def model(self) -> CtrModel:
        """The model, loaded at the first call, where an error comes out as itself."""
        cluster = self.job.config.cluster
        model = self.job.model.load(None if cluster.gpus_per_worker else "cpu")
        settle(model.reader.device, max(1, int(cluster.cpus_per_worker)))
        return model

    @cached_property
    def dataset(self) -> Dataset:
        """The data set that holds the histories."""
        return open_dataset(self.job.storage, self.job.dataset)

    @cached_property
    def judge(self) -> Judge:
        """What decides how requests are scored."""
        ids, known = read_items(self.dataset)["item_id"].to_pylist(), self.job.model.item_ids().to_pylist()
        size = self.job.model.config.eval_n + 1
        return Judge(self.job.config.score, self.job.log, ids, frozenset(known), size, self.per_second)

    def __call__(self, number: int) -> dict[str, Any]:
        """Score one unit and write its shard.

        Raises:
            IncompleteError: rows out are not rows in.
        """
        unit, job = self.units[number], self.job
        batches = [read_batch(job.storage, block, unit.partition) for block in self.blocks[unit.first : unit.stop]]
        requests = pa.Table.from_batches(batches, job.rules.schema)
        users = {user for user in requests[USER].to_pylist() if user is not None}
        pasts = read_pasts(self.dataset, users, unit.partition)
        rows, counts = score_requests(requests, pasts, self.judge, self.model.score_batch)
        if len(rows) != len(requests):
            raise IncompleteError(Fault(f"unit {number}", f"{len(rows)} rows scored", f"{len(requests)}"))
        file = write_parquet(job.storage, job.folder, f"scores/part-{number:05d}.parquet", rows)
        return {"file": asdict(file), "rows": len(rows), "counts": dict(counts)}
