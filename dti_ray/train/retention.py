"""Which states of a run stay.

Stage: retention; pure decisions. In: the complete checkpoints of a run, `CheckpointConfig`. Out: what stays.
Invariant: the newest state always stays; whoever deletes does so after a newer state is complete.

    AUC  - .70 .74 .71 -   with keep_best=1, keep_last=2: the third, the fourth and the fifth stay;
    with a budget of two states: the third and the fifth
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from dti_ray.config import CheckpointConfig
from dti_ray.train.checkpoint import Checkpoint

GB = 10**9
UNFINISHED = re.compile(r"/\.[^/]+\.[0-9a-f]{32}$")  # what Storage writes before it renames


def to_keep(checkpoints: Sequence[Checkpoint], keep: CheckpointConfig) -> list[Checkpoint]:
    """Return what stays, most precious first: the newest, the best by validation AUC, then newer before older.

    Args:
        checkpoints: complete ones, oldest first.
        keep: numbers and budget.
    """
    if not checkpoints:
        return []
    validated = [one for one in checkpoints if one.progress.valid_auc is not None]
    by_auc = sorted(validated, key=lambda one: (one.progress.valid_auc, one.progress.step), reverse=True)
    newest = list(checkpoints[::-1])
    wanted = [newest[0], *by_auc[: keep.keep_best], *newest[: keep.keep_last]]
    stay: list[Checkpoint] = []
    room = None if keep.max_gb is None else keep.max_gb * GB
    for one in {one.path: one for one in wanted}.values():
        if room is None or not stay or one.size_bytes <= room:
            stay.append(one)
            room = None if room is None else room - one.size_bytes
    return stay


def is_cut_off(path: str) -> bool:
    """Say whether a file is what a write left behind that was killed before it was renamed."""
    return UNFINISHED.search(path) is not None
