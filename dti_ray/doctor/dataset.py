"""The data set: prepared or not, whole or damaged.

Stage: a check; free of PyTorch. In: a configuration. Out: a `Check`, and the open data set.
"""

from __future__ import annotations

import contextlib
import time

from dti_ray.config import RunConfig
from dti_ray.data.asked import open_asked
from dti_ray.data.interactions import Dataset, dataset_folder
from dti_ray.doctor.check import Check, Look, passed, size, skipped
from dti_ray.storage import Storage

VERIFY_S = 5.0


def look_at_dataset(config: RunConfig) -> tuple[Check, Dataset | None]:
    """Open the data set and hold its files against their hashes, for `VERIFY_S` at most.

    Raises:
        InputError: another version wrote it, or it was prepared another way than the configuration says.
        StorageError: a file is missing or damaged.
    """
    storage = Storage(config.storage.root).patient(0)
    folder = dataset_folder(config.data.name)
    if storage.read_manifest(folder) is None:
        return skipped("data set", f"{storage.display(folder)} is not prepared yet (`dti-ray prepare`)"), None
    dataset = open_asked(config.data, storage)
    verified = _verify_some(dataset)
    total = sum(entry.size_bytes for entry in dataset.files)
    rest = "" if verified == len(dataset.files) else f" within {VERIFY_S:g} s; a launch verifies all"
    found = (
        f"{storage.display(folder)}: {dataset.users:,} users, {dataset.interactions:,} interactions, {size(total)}; "
        f"{verified} of {len(dataset.files)} files verified{rest}"
    )
    return passed("data set", found), dataset


def _verify_some(dataset: Dataset) -> int:
    """Verify files for a while; return how many were."""
    verified: list[str] = []
    is_over = time.monotonic() + VERIFY_S

    def verify() -> None:
        for entry in dataset.files:
            if time.monotonic() > is_over:
                return
            dataset.storage.verify(dataset.folder, [entry])
            verified.append(entry.path)

    with contextlib.suppress(TimeoutError):  # within a file that is very large, or slowly read
        Look(verify).wait(VERIFY_S)
    return len(verified)
