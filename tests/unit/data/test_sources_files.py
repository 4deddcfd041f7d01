from __future__ import annotations

import gzip
import io
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest

from dti_ray.data.sources import files, lines, parquet
from dti_ray.data.sources.files import place, random_access, raw_place, visible_files, with_members
from dti_ray.errors import InputError, StorageError
from dti_ray.storage import Storage


def read(storage: Storage, file: str) -> bytes:
    return b"".join(lines.blocks(storage, file))


def make_zip(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def test_a_folder_is_searched_to_its_bottom_without_hidden_files(tmp_path: Path) -> None:
    for name in ("b.csv", "date=2024-01-01/a.csv", "_SUCCESS", ".b.csv.crc", "_temporary/0/c.csv", ".x/d.csv"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    assert place(str(tmp_path), "data.path").files == ("b.csv", "date=2024-01-01/a.csv")
    assert place(f"file://{tmp_path}", "data.path").files == ("b.csv", "date=2024-01-01/a.csv")


def test_a_single_file_is_found_in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.csv").write_text("x")
    (tmp_path / "b.csv").write_text("y")
    monkeypatch.chdir(tmp_path)
    for path in (f"{tmp_path}/a.csv", "a.csv", f"file://{tmp_path}/a.csv"):
        found = place(path, "data.path")
        assert found.files == ("a.csv",)
        assert read(found.storage, "a.csv") == b"x"


def test_options_of_an_address_stay_with_the_folder() -> None:
    address = "s3://bucket/logs/a.csv?endpoint_override=http://localhost:1"
    assert files._parent(address) == ("s3://bucket/logs?endpoint_override=http://localhost:1", "a.csv")


def test_a_place_that_is_not_there_is_named_with_its_key(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere: is missing; expected a file or a folder; set data\.catalogue"):
        place(str(tmp_path / "nowhere"), "data.catalogue")


def test_members_of_a_zip_are_read_without_unpacking(tmp_path: Path) -> None:
    packed = gzip.compress(b"packed twice\n")
    path = make_zip(
        tmp_path / "a.zip",
        {"sub/": b"", "sub/a": b"first\n", "b": b"second", "sub/c": packed, "__MACOSX/x": b"", "sub/d": b""},
    )
    found = place(str(path), "data.path")
    assert found.files == ("a.zip!b", "a.zip!sub/a", "a.zip!sub/c", "a.zip!sub/d")
    assert [read(found.storage, file) for file in found.files[:3]] == [b"second", b"first\n", packed]
    make_zip(tmp_path / "b.zip", {"c.gz": packed})
    assert read(found.storage, "b.zip!c.gz") == b"packed twice\n"
    assert with_members(place(str(tmp_path), "data.path")).files[-1] == "b.zip!c.gz"


def test_without_a_path_raw_files_lie_below_the_root(tmp_path: Path) -> None:
    (tmp_path / "raw" / "tiny").mkdir(parents=True)
    (tmp_path / "raw" / "tiny" / "a.csv").write_text("x")
    found = raw_place(None, "tiny", Storage(str(tmp_path)))
    assert found.files == ("raw/tiny/a.csv",)
    assert visible_files(Storage(str(tmp_path)), "raw/nowhere") == ()


def damaged_gzip(path: Path) -> str:
    (path / "a.gz").write_bytes(gzip.compress(b"some text\n" * 1000)[:-9])
    return "a.gz"


def no_gzip(path: Path) -> str:
    (path / "a.gz").write_bytes(b"plain text\n" * 10)
    return "a.gz"


def flipped_gzip(path: Path) -> str:
    content = bytearray(gzip.compress(bytes(range(256)) * 100))
    content[60] ^= 255
    (path / "a.gz").write_bytes(content)
    return "a.gz"


def flipped_zip(path: Path) -> str:
    make_zip(path / "a.zip", {"member": b"some text\n" * 1000})
    content = bytearray((path / "a.zip").read_bytes())
    content[50] ^= 255
    (path / "a.zip").write_bytes(content)
    return "a.zip!member"


@pytest.mark.parametrize("damage", [damaged_gzip, no_gzip, flipped_gzip, flipped_zip])
def test_a_damaged_file_is_named_as_such(tmp_path: Path, damage: Callable[[Path], str]) -> None:
    file = damage(tmp_path)
    with pytest.raises(InputError, match=rf"{file}: is damaged: .*data\.on_bad_file=quarantine"):
        read(Storage(str(tmp_path)), file)


def test_a_damaged_zip_is_named_when_it_is_listed(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"no zip")
    with pytest.raises(InputError, match=r"a\.zip: is damaged"):
        place(str(tmp_path / "a.zip"), "data.path")


def test_a_file_that_vanished_is_missing_and_storage_that_vanished_is_unreachable(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    storage = Storage(str(tmp_path / "logs"))
    for open_file in (read, lambda storage, file: random_access(storage, file).__enter__()):
        with pytest.raises(InputError, match=r"logs/a\.csv: is missing"):
            open_file(storage, "a.csv")
    (tmp_path / "logs").rmdir()
    with pytest.raises(StorageError, match=r"logs/a\.csv: cannot be read"):
        read(storage, "a.csv")


class Lost(io.RawIOBase):
    """A file that opens well and fails behind its first bytes, as a lost connection does."""

    def __init__(self, content: bytes) -> None:
        self.content = io.BytesIO(content)

    def read(self, size: int = -1) -> bytes:
        if self.content.tell() >= 100:
            raise OSError("connection reset")
        return self.content.read(min(size, 100))

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self.content.seek(offset, whence)

    def tell(self) -> int:
        return self.content.tell()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


@pytest.mark.parametrize("file", ["a.csv", "a.csv.gz", "a.parquet"])
def test_a_connection_that_is_lost_midway_is_storage_trouble(tmp_path: Path, file: str) -> None:
    text = b"u,t\n" + os.urandom(100_000).hex().encode()
    storage = Storage(str(tmp_path))
    content = gzip.compress(text) if file.endswith(".gz") else text
    lost = pa.PythonFile(Lost(content), mode="r")
    storage.filesystem = SimpleNamespace(open_input_file=lambda _: lost)  # type: ignore[assignment]
    open_file = parquet.row_group_rows if file.endswith(".parquet") else read
    with pytest.raises(StorageError, match=rf"{file}: cannot be read: connection reset"):
        open_file(storage, file)
