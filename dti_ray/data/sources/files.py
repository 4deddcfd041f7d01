"""Raw files as streams: found by a path, opened through storage, zip and gzip, and blamed when they are damaged.

Stage: sources. In: `data.path` or `data.catalogue`. Out: a `Place` (storage and file names); streams of bytes.
Invariant: a file that is there but cannot be understood is an `InputError` that names it, storage that cannot be
reached is a `StorageError`: only the first may be left out by `data.on_bad_file`.

    data.path                      storage       files
    logs/part.csv                  logs          part.csv
    logs                           logs          a.csv, date=2024-01-01/b.csv.gz
    ml-1m.zip                      .             ml-1m.zip!ml-1m/ratings.dat, ml-1m.zip!ml-1m/movies.dat
"""

from __future__ import annotations

import gzip
import io
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import IO, Any, cast

import pyarrow as pa
from pyarrow import fs

from dti_ray.errors import Fault, InputError, StorageError
from dti_ray.storage import Storage

ZIP, MEMBER, GZIP = ".zip", "!", ".gz"
DAMAGE = (
    pa.ArrowException,
    OSError,
    EOFError,
    zlib.error,
    zipfile.BadZipFile,
    RuntimeError,
)  # the last: a zip's password
READ_BYTES = 1 << 20  # what gzip and zip are read by; Python's own choice is 8 KB


@dataclass(frozen=True)
class Place:
    """Where raw files lie.

    Attributes:
        storage: what the names are relative to.
        files: names of all files, sorted; a zip's members as `archive.zip!member`, hidden ones left out.
        name: the place as a user would type it.
    """

    storage: Storage
    files: tuple[str, ...]
    name: str


def place(path: str, key: str) -> Place:
    """List what lies at a path: the files of a folder and those below, a single file, or a zip's members.

    Args:
        path: file, folder or URI.
        key: the dotted configuration key that the path comes from, for the message.

    Raises:
        InputError: nothing is there, or a zip is damaged; StorageError: it cannot be reached.
    """
    storage = Storage(path)
    kind = _kind(storage)
    if kind == fs.FileType.NotFound:
        raise InputError(Fault(storage.display(), "is missing", "a file or a folder", f"set {key}"))
    if kind != fs.FileType.File:
        return Place(storage, visible_files(storage), storage.display())
    folder, name = _parent(path)
    storage = Storage(folder)
    files = members(storage, name) if name.lower().endswith(ZIP) else (name,)
    return Place(storage, files, storage.display(name))


def raw_place(path: str | None, name: str, storage: Storage) -> Place:
    """List what lies at `data.path`, or at `<root>/raw/<name>` where that is null; see `place`."""
    if path is not None:
        return place(path, "data.path")
    folder = f"raw/{name}"
    return Place(storage, visible_files(storage, folder), storage.display(folder))


def with_members(found: Place) -> Place:
    """Return a place with the members of its zips instead of the zips.

    Raises:
        InputError: an archive is damaged; StorageError: it cannot be reached.
    """
    files = [members(found.storage, file) if file.lower().endswith(ZIP) else (file,) for file in found.files]
    return Place(found.storage, tuple(chain.from_iterable(files)), found.name)


def base_name(file: str) -> str:
    """Return a file's name without the folders and the zip that it lies in."""
    return file.replace(MEMBER, "/").rpartition("/")[2]


def visible_files(storage: Storage, folder: str = "") -> tuple[str, ...]:
    """Return the files below a folder, sorted, but none that is hidden or lies in a hidden folder."""
    start = len(folder) + 1 if folder else 0
    return tuple(file for file in storage.list(folder, recursive=True) if _is_visible(file[start:]))


def members(storage: Storage, archive: str) -> tuple[str, ...]:
    """Return a zip's files as `archive.zip!member`, sorted.

    Raises:
        InputError: the archive is damaged.
    """
    with _watched(storage, archive) as raw, zipfile.ZipFile(cast("IO[bytes]", raw)) as opened:
        names = sorted(info.filename for info in opened.infolist() if not info.is_dir())
    return tuple(f"{archive}{MEMBER}{name}" for name in names if _is_visible(name))


@contextmanager
def random_access(storage: Storage, file: str) -> Iterator[pa.NativeFile]:
    """Open a file that is read here and there; see `stream` for the errors."""
    with _watched(storage, file) as raw:
        yield pa.PythonFile(raw, mode="r")


@contextmanager
def stream(storage: Storage, file: str) -> Iterator[tuple[IO[bytes], Progress]]:
    """Open a file's text from its beginning, unpacked; what goes wrong inside is raised as an error of ours.

    Yields:
        (the stream, how far it is read).

    Raises:
        InputError: the file is missing or damaged; StorageError: it cannot be reached.
    """
    archive, _, member = file.partition(f"{ZIP}{MEMBER}")
    with _watched(storage, archive + ZIP if member else file, shown=file) as raw, ExitStack() as stack:
        packed, size = cast("IO[bytes]", raw), raw.size
        if member:
            opened = stack.enter_context(zipfile.ZipFile(packed))
            size = opened.getinfo(member).file_size
            packed = stack.enter_context(opened.open(member))
        progress = Progress(packed, size)
        packed = io.BufferedReader(cast("io.RawIOBase", packed), READ_BYTES)
        if file.lower().endswith(GZIP):
            packed = cast("IO[bytes]", stack.enter_context(gzip.GzipFile(fileobj=packed)))
        yield packed, progress


@dataclass(frozen=True)
class Progress:
    """How much of a packed file was read."""

    packed: IO[bytes]
    size_bytes: int

    def share(self) -> float:
        """Return the share that was read, above 0 and up to 1."""
        return min(max(self.packed.tell(), 1) / max(self.size_bytes, 1), 1.0)


class _Watched(io.RawIOBase):
    """A file of some storage that remembers whether reading it failed: then the storage is at fault, not the file."""

    def __init__(self, raw: pa.NativeFile) -> None:
        self.raw = raw
        self.size = raw.size()
        self.failure: OSError | None = None

    def read(self, size: int = -1) -> Any:
        return self._watch(lambda: self.raw.read(None if size < 0 else size))

    def readinto(self, buffer: Any) -> int:
        content = self.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def read_buffer(self, size: int) -> pa.Buffer:
        """Read without a copy; Arrow asks for this one."""
        return self._watch(lambda: self.raw.read_buffer(size))

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self.raw.seek(offset, whence)

    def tell(self) -> int:
        return self.raw.tell()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        self.raw.close()
        super().close()

    def _watch(self, read: Any) -> Any:
        try:
            return read()
        except OSError as error:
            self.failure = error
            raise


@contextmanager
def _watched(storage: Storage, file: str, shown: str | None = None) -> Iterator[_Watched]:
    where = storage.display(shown or file)
    raw = _open(storage, file, where)
    try:
        with raw:
            yield raw
    except DAMAGE as error:
        if raw.failure is not None:
            raise _unreachable(where, raw.failure) from raw.failure  # which is what decides on another attempt
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        hint = "get the file again; data.on_bad_file=quarantine leaves damaged files of a log out"
        raise InputError(Fault(where, f"is damaged: {reason}", hint=hint)) from error


def _open(storage: Storage, file: str, where: str) -> _Watched:
    try:
        return _Watched(storage.filesystem.open_input_file(storage.path(file)))
    except FileNotFoundError as error:
        if _is_gone(storage):
            raise _unreachable(where, error) from error
        raise InputError(Fault(where, "is missing", "a file")) from None
    except OSError as error:
        raise _unreachable(where, error) from error


def _is_gone(storage: Storage) -> bool:
    """Say whether all of a storage is gone: a local folder, or a bucket (a prefix is but the files that have it)."""
    is_local = isinstance(storage.filesystem, fs.LocalFileSystem)
    root = storage.path() if is_local else storage.path().partition("/")[0]
    try:
        return storage.filesystem.get_file_info(root).type == fs.FileType.NotFound
    except OSError:
        return True


def _kind(storage: Storage) -> fs.FileType:
    try:
        return storage.filesystem.get_file_info(storage.path()).type
    except OSError as error:
        raise _unreachable(storage.display(), error) from error


def _unreachable(where: str, error: OSError) -> StorageError:
    reason = " ".join(str(error).split())[:300]
    return StorageError(Fault(where, f"cannot be read: {reason}", hint="check the path, its keys and its rights"))


def _parent(path: str) -> tuple[str, str]:
    """Return (folder, name) of a file; options behind a URI's question mark stay with the folder."""
    plain, mark, options = path.partition("?") if "://" in path else (path, "", "")
    folder, slash, name = plain.rpartition("/")
    return (folder or slash or ".") + mark + options, name


def _is_visible(file: str) -> bool:
    return not any(part.startswith((".", "_")) for part in file.split("/"))
