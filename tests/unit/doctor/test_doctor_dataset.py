"""A data set is skipped while it is not prepared, and fails once it is damaged."""

from __future__ import annotations

from pathlib import Path

from dti_ray.config import RunConfig
from dti_ray.doctor.check import Look, Status, answer
from dti_ray.doctor.dataset import look_at_dataset
from dti_ray.storage import Storage
from tests.builders import damage, make_config, write_dataset


def of(root: Path) -> RunConfig:
    return make_config(f"storage.root={root}", "data.name=tiny")


def test_prepared_data_set_is_verified(tmp_path: Path) -> None:
    write_dataset(tmp_path, [30, 25])
    check, dataset = look_at_dataset(of(tmp_path))
    assert check.status is Status.PASS
    assert check.found.startswith(f"{tmp_path}/datasets/tiny: 2 users, 55 interactions, ")
    assert check.found.endswith("; 2 of 2 files verified")
    assert dataset is not None


def test_data_set_that_is_not_prepared_is_skipped(tmp_path: Path) -> None:
    check, dataset = look_at_dataset(of(tmp_path))
    assert (check.status, dataset) == (Status.SKIP, None)
    assert "dti-ray prepare" in check.found


def test_damaged_file_fails(tmp_path: Path) -> None:
    damage(write_dataset(tmp_path, [30, 25]))
    check, dataset = answer("data set", Look(lambda: look_at_dataset(of(tmp_path))), 10)
    assert (check.status, dataset) == (Status.FAIL, None)
    assert "part-00000.parquet: has hash" in check.found


def test_damaged_manifest_fails(tmp_path: Path) -> None:
    write_dataset(tmp_path, [30])
    Storage(str(tmp_path)).write("datasets/tiny/manifest.json", b"{")
    check, _ = answer("data set", Look(lambda: look_at_dataset(of(tmp_path))), 10)
    assert check.status is Status.FAIL
    assert "is damaged" in check.found
