"""Readers of raw logs: each finds its files, checks their columns, and says how rows and items are read from them.

Stage: first of the data path. In: raw files and the `data` section. Out: a `RawLog`.
Invariant: a reader converts names, never values; what is wrong with a row is for `checks` to say.
"""

from __future__ import annotations

from collections.abc import Callable

from dti_ray.config.data import DataConfig
from dti_ray.data.sources import amazon, kuairand, movielens, tabular
from dti_ray.data.sources.raw import RawLog
from dti_ray.storage import Storage

SOURCES: dict[str, Callable[[DataConfig, Storage], RawLog]] = {
    "amazon": amazon.locate,
    "kuairand": kuairand.locate,
    "movielens": movielens.locate,
    "tabular": tabular.locate,
}


def locate(config: DataConfig, storage: Storage) -> RawLog:
    """Find the raw files that a configuration names, and check their columns before any work starts.

    Args:
        config: `source` chooses the reader; `path` is a file, folder, zip or URI, null means `<root>/raw/<name>`.
        storage: the root.

    Raises:
        InputError: with one fault per file or column that is missing, and per damaged file unless `on_bad_file` is
            quarantine (such a file is then told by whoever reads its piece).
        StorageError: a place cannot be reached.
    """
    return SOURCES[config.source](config, storage)
