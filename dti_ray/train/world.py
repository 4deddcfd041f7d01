"""The other ranks, as far as the loop needs them.

Stage: training. In: small Python values of one rank. Out: sums and lists over all ranks.
Invariant: every rank makes the same calls in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import distributed


class World:
    """All ranks of a run; a world of one needs no process group.

    Args:
        device: where small tensors for the collective live.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.is_distributed = distributed.is_available() and distributed.is_initialized()
        self.rank = distributed.get_rank() if self.is_distributed else 0
        self.size = distributed.get_world_size() if self.is_distributed else 1

    def sum(self, values: Sequence[float]) -> list[float]:
        """Return the sum of each value over all ranks, in fp64."""
        if not self.is_distributed:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        distributed.all_reduce(tensor)
        return tensor.tolist()

    def limit_waits(self, seconds: float) -> None:
        """Let no collective wait longer, DeepSpeed's included: a group that is made later has torch's 30 minutes."""
        if self.is_distributed:
            for group in list(distributed.distributed_c10d._world.pg_map):
                distributed.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value, in the order of ranks."""
        if not self.is_distributed:
            return [value]
        values: list[Any] = [None] * self.size
        distributed.all_gather_object(values, value)
        return values
