from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from dti_ray.data.sources.get import fetch
from dti_ray.errors import InputError
from dti_ray.storage import Storage


def silent(done: int, total: int | None) -> None:
    """Report progress to nobody."""


def test_unknown_name_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data\.name: got 'ml-1b'; expected one of ml-100k"):
        fetch(Storage(str(tmp_path)), "ml-1b", silent)


@pytest.fixture
def local_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Point pip at an empty folder instead of the package index, and the cache at another one."""
    index = tmp_path / "index"
    index.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return index


def test_failing_pip_is_reported_with_its_last_lines(tmp_path: Path, local_index: Path) -> None:
    with pytest.raises(InputError, match=r"recbole==1\.2\.1: pip could not download it .*No matching distribution"):
        fetch(Storage(str(tmp_path / "root")), "ml-100k", silent)
    assert not (tmp_path / "root").exists()


def test_wheel_with_another_hash_is_refused(tmp_path: Path, local_index: Path) -> None:
    info = "recbole-1.2.1.dist-info"
    with zipfile.ZipFile(local_index / "recbole-1.2.1-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: recbole\nVersion: 1.2.1\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    with pytest.raises(InputError, match=r"recbole==1\.2\.1: came with SHA-256 .*; expected 9c994820"):
        fetch(Storage(str(tmp_path / "root")), "ml-100k", silent)
    assert not list((tmp_path / "cache" / "dti_ray").iterdir())
    assert not (tmp_path / "root").exists()
