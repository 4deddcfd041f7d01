"""The `data` section that is asked for, held against the one that a stored data set was prepared with.

Stage: interactions; free of Ray. In: a `DataConfig` and a `Dataset`. Out: nothing, or every key that differs.
Invariant: nobody trains on a log that was labelled or split another way than the configuration says.
"""

from __future__ import annotations

from dti_ray.config.data import DataConfig
from dti_ray.data.interactions import Dataset, open_dataset
from dti_ray.errors import Fault, InputError
from dti_ray.storage import Storage

NOT_IN_CONTENT = ("max_bad_fraction",)  # what may change without changing a byte of the data set


def content_of(data: DataConfig) -> dict[str, object]:
    """Return what of the section decides a data set's bytes, as a manifest keeps it."""
    return data.model_dump(mode="json", exclude=set(NOT_IN_CONTENT))


def check_same(data: DataConfig, dataset: Dataset) -> None:
    """Refuse to take a stored data set for one that would be prepared another way.

    Raises:
        InputError: with every key that differs.
    """
    asked = content_of(data)
    _refuse(asked, dataset, asked.keys() | dataset.data_config.keys(), "choose another data.name")


def open_asked(data: DataConfig, storage: Storage) -> Dataset:
    """Open the data set that a configuration names, unless it was prepared another way than the configuration says.

    `data.name` alone says nothing of the rest: a key at its default counts as not said.

    Raises:
        InputError: there is no such data set, another version wrote it, or with every key that differs.
        StorageError: a file of it is missing or has another size.
    """
    dataset = open_dataset(storage, data.name)
    silent, asked = content_of(DataConfig(name=data.name)), content_of(data)
    said = {key for key in asked.keys() & dataset.data_config.keys() if asked[key] != silent[key]}
    _refuse(asked, dataset, said, "leave it out, or prepare it under another data.name")
    return dataset


def _refuse(asked: dict[str, object], dataset: Dataset, keys: set[str], hint: str) -> None:
    stored, where = dataset.data_config, dataset.storage.display(dataset.folder)
    faults = [
        Fault(f"data.{key}", f"got {asked.get(key)!r}", f"{stored.get(key)!r} as in {where}", hint)
        for key in sorted(keys)
        if asked.get(key) != stored.get(key)
    ]
    if faults:
        raise InputError(*faults)
