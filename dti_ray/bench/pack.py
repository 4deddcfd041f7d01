"""Packing speed on one core: interactions in, rows out.

Stage: bench. In: a configuration and a prepared data set. Out: targets and tokens per second.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dti_ray.bench.timing import interleave
from dti_ray.config import RunConfig
from dti_ray.data.interactions import TRAIN, Dataset, read_all
from dti_ray.data.packing import check_capacity, pack, pack_spec
from dti_ray.data.prompts import TokenTable


@dataclass(frozen=True)
class PackRow:
    """One k: rates of one core."""

    k: int | str
    targets_per_s_per_core: float
    tokens_per_s_per_core: float
    spread: float


def bench_pack(
    config: RunConfig, dataset: Dataset, table: TokenTable, ks: Sequence[int | str], repeats: int
) -> list[PackRow]:
    """Pack the whole training split for each k in turns; nothing is read from storage meanwhile."""
    for k in ks:
        check_capacity(pack_spec(config.packing, config.prompt.context, TRAIN, k=None if k == "all" else int(k)), table)
    sequences = read_all(dataset)
    sizes: dict[str, tuple[int, int]] = {}

    def packing(k: int | str) -> Callable[[], None]:
        spec = pack_spec(config.packing, config.prompt.context, TRAIN, k=None if k == "all" else int(k))

        def run() -> None:
            rows = list(pack(sequences, table, spec, rng=np.random.default_rng(config.train.seed)))
            sizes[str(k)] = (sum(row.targets for row in rows), sum(row.size_tokens for row in rows))

        return run

    timings = interleave({str(k): [packing(k)] for k in ks}, repeats, torch.device("cpu"))
    return [
        PackRow(
            k,
            sizes[str(k)][0] / timings[str(k)].seconds,
            sizes[str(k)][1] / timings[str(k)].seconds,
            timings[str(k)].spread,
        )
        for k in ks
    ]
