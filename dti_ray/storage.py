"""All object storage in one place: folders, file://, s3:// and gs:// behind one small class.

Stage: below the data path. In: a root URI. Out: bytes, files and manifests under relative paths.
Invariant: whatever has several files is complete if and only if its `manifest.json` exists, because
that is written last; it carries names, sizes and SHA-256 hashes, and `verify` holds them against
what lies there.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qs, urlsplit

from pyarrow import fs

from dti_ray.errors import DamagedError, Fault, StorageError

MANIFEST = "manifest.json"
S3_CONNECT_TIMEOUT_S = 10
S3_REQUEST_TIMEOUT_S = 60
S3_MAX_ATTEMPTS = 3
PATIENCE_S = 31.0  # an object store that is away for half a minute is waited for
PROBE_PATIENCE_S = 3.0  # a root that is wrong is told soon, one failed request is not yet a wrong root
LONGEST_PAUSE_S = 16.0
HOPELESS = ("ACCESS_DENIED", "INVALID_ACCESS_KEY", "SIGNATURE_DOES_NOT_MATCH", "InvalidAccessKey", "Forbidden")
VERIFYING_THREADS = 8
READ_BYTES = 8 << 20

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class FileEntry:
    """One file of a manifest: path relative to the manifest's folder, size, hash."""

    path: str
    size_bytes: int
    sha256: str


class Storage:
    """A root below which everything of this package lies.

    What fails on an object store is tried again after 1, 2, 4, 8 and 16 seconds, unless keys or rights are wrong;
    `patient` gives a place that is tried for longer.

    Args:
        root: local folder, or `file://`, `s3://bucket/prefix`, `gs://bucket/prefix`. An S3 endpoint comes
            from `AWS_ENDPOINT_URL` or from `?endpoint_override=http://host:port` on the root.

    Raises:
        StorageError: the scheme is unknown.
    """

    def __init__(self, root: str) -> None:
        self.root = root
        self.filesystem, self.base = _open(root)
        self.retry_after_s = () if isinstance(self.filesystem, fs.LocalFileSystem) else _pauses(PATIENCE_S)

    def patient(self, seconds: float) -> Storage:
        """Return the same place, where whatever fails is tried again for so many seconds; 0: never.

        A local folder's too: a full disk may have room again.
        """
        place = copy.copy(self)
        place.retry_after_s = _pauses(seconds)
        return place

    def attempt(self, verb: str, path: str, operation: Callable[[], T]) -> T:
        """Run an operation on a path; on an object store, again after a while if it fails.

        Args:
            verb: what is done, as in "cannot be <verb>".
            path: relative to the root.
            operation: it must have the same effect when it runs twice.

        Raises:
            StorageError: it failed every time.
        """
        waited_s = 0.0
        try:
            with _faults(verb, self.display(path)):
                for delay_s in self.retry_after_s:
                    try:
                        return operation()
                    except (OSError, StorageError) as error:
                        if not _is_transient(error):
                            raise
                        log.warning("%s cannot be %s, again in %g s: %s", self.display(path), verb, delay_s, error)
                    time.sleep(delay_s)
                    waited_s += delay_s
                return operation()
        except StorageError as error:
            told = error
            if waited_s and _is_transient(error):
                waited = f"it was tried for {waited_s:g} s"
                hint = f"{waited}; check that the storage answers, then run the same command: it goes on from here"
                told = StorageError(*(replace(fault, hint=hint) for fault in error.faults))
            told.is_final = True
            raise told from error.__cause__

    def path(self, *parts: str) -> str:
        """Return the path that `self.filesystem` understands."""
        return "/".join([self.base.rstrip("/"), *(part.strip("/") for part in parts if part)])

    def display(self, *parts: str) -> str:
        """Return the path as a user would type it."""
        return "/".join([self.root.partition("?")[0].rstrip("/"), *parts])

    def exists(self, path: str) -> bool:
        """Say whether a file or folder lies at the relative path."""
        return self.infos([path])[0].type != fs.FileType.NotFound

    def infos(self, paths: Sequence[str]) -> list[fs.FileInfo]:
        """Return what the file system knows of some relative paths: type, size, time of the last change."""
        where = paths[0] if paths else ""
        full = [self.path(path) for path in paths]
        return self.attempt("looked up", where, lambda: self.filesystem.get_file_info(full))

    def read(self, path: str) -> bytes:
        """Return a file's content, by one request: of a file that is written anew meanwhile, never two halves.

        Raises:
            StorageError: the file is missing or cannot be read.
        """

        def read() -> bytes:
            with self.filesystem.open_input_file(self.path(path)) as file:
                return file.read()

        return self.attempt("read", path, read)

    def write(self, path: str, content: bytes) -> FileEntry:
        """Write a file so that readers see the old content or the new one, never a part."""
        target = self.path(path)

        def write() -> None:
            if isinstance(self.filesystem, fs.LocalFileSystem):
                _write_local(Path(target), content)
            else:
                with self.filesystem.open_output_stream(target) as stream:
                    stream.write(content)

        self.attempt("written", path, write)
        return FileEntry(path, len(content), hashlib.sha256(content).hexdigest())

    def list(self, path: str, recursive: bool = False) -> list[str]:
        """Return the relative paths of what lies in a folder, sorted; empty if there is none."""
        selector = fs.FileSelector(self.path(path), allow_not_found=True, recursive=recursive)
        infos = self.attempt("listed", path, lambda: self.filesystem.get_file_info(selector))
        start = len(self.base.rstrip("/")) + 1
        return sorted(info.path[start:] for info in infos if not (recursive and not info.is_file))

    def delete(self, path: str) -> None:
        """Delete a folder or file; nothing happens if there is none."""
        target = self.path(path)

        def delete() -> None:
            kind = self.filesystem.get_file_info(target).type
            with suppress(FileNotFoundError):  # an empty folder of an object store, or somebody else was faster
                if kind == fs.FileType.Directory:
                    self.filesystem.delete_dir(target)
                elif kind == fs.FileType.File:
                    self.filesystem.delete_file(target)

        self.attempt("deleted", path, delete)

    def upload(self, folder: Path, to: str) -> list[FileEntry]:
        """Copy all files below a local folder; return their entries, relative to `to`."""
        entries = []
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            relative = file.relative_to(folder).as_posix()
            written = self.write(f"{to}/{relative}", file.read_bytes())
            entries.append(FileEntry(relative, written.size_bytes, written.sha256))
        return entries

    def download(self, path: str, entries: Iterable[FileEntry], to: Path) -> None:
        """Copy the files of a manifest to a local folder and check their hashes.

        Raises:
            StorageError: a file is missing or its hash differs.
        """
        for entry in entries:
            content = self.read(f"{path}/{entry.path}")
            _check_hash(self.display(path, entry.path), entry, len(content), hashlib.sha256(content).hexdigest())
            _write_local(to / entry.path, content)

    def write_manifest(self, path: str, files: Sequence[FileEntry], body: dict[str, object]) -> None:
        """Make a folder complete: write its manifest, last."""
        tree = {**body, "files": [vars(entry) for entry in files]}
        self.write(f"{path}/{MANIFEST}", json.dumps(tree, indent=1).encode())

    def read_manifest(self, path: str) -> tuple[list[FileEntry], dict[str, Any]] | None:
        """Return (files, body) of a complete folder, or None where there is no manifest.

        Raises:
            StorageError: the manifest is damaged.
        """
        if not self.exists(f"{path}/{MANIFEST}"):
            return None
        try:
            body = json.loads(self.read(f"{path}/{MANIFEST}"))
            return [FileEntry(**entry) for entry in body.pop("files")], body
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedError(
                Fault(self.display(path, MANIFEST), f"is damaged: {error}", hint="delete the folder and make it again")
            ) from error

    def verify(self, path: str, files: Iterable[FileEntry]) -> None:
        """Hold every file against its size and hash, several at once, in bounded memory.

        Raises:
            StorageError: a file is missing or differs.
        """
        entries = list(files)
        with ThreadPoolExecutor(VERIFYING_THREADS) as pool:
            found = pool.map(lambda entry: self._hash(f"{path}/{entry.path}"), entries)
            for entry, (size_bytes, sha256) in zip(entries, found, strict=True):
                _check_hash(self.display(path, entry.path), entry, size_bytes, sha256)

    def _hash(self, path: str) -> tuple[int, str]:
        def read() -> tuple[int, str]:
            digest, size_bytes = hashlib.sha256(), 0
            with self.filesystem.open_input_stream(self.path(path)) as stream:
                while chunk := stream.read(READ_BYTES):
                    digest.update(chunk)
                    size_bytes += len(chunk)
            return size_bytes, digest.hexdigest()

        return self.attempt("read", path, read)

    def check_writable(self) -> None:
        """Write, read and delete a probe, so that a bad root fails before anything starts.

        Raises:
            StorageError: the root cannot be reached or written.
        """
        probe, place = f".probe-{uuid.uuid4().hex}", self.patient(min(PROBE_PATIENCE_S, sum(self.retry_after_s)))
        place.write(probe, b"probe")
        if place.read(probe) != b"probe":
            raise StorageError(Fault(self.root, "returned other bytes than were written"))
        place.delete(probe)


def fingerprint(files: Iterable[FileEntry]) -> str:
    """Return 16 hex digits that name the content of some files."""
    return hashlib.sha256(repr([(file.path, file.sha256) for file in files]).encode()).hexdigest()[:16]


def absolute(root: str) -> str:
    """Return a root that means the same in a process with another working directory."""
    return root if urlsplit(root).scheme else str(Path(root).expanduser().resolve())


def _pauses(seconds: float) -> tuple[float, ...]:
    """Return pauses that double and sum to a number of seconds."""
    pauses: list[float] = []
    while (left := seconds - sum(pauses)) > 0:
        pauses.append(min(left, 2.0 ** len(pauses), LONGEST_PAUSE_S))
    return tuple(pauses)


def _open(root: str) -> tuple[fs.FileSystem, str]:
    parts = urlsplit(root)
    if parts.scheme in ("s3", "gs") and not parts.netloc:
        raise StorageError(Fault(repr(root), "names no bucket", f"{parts.scheme}://bucket/prefix"))
    if parts.scheme == "file" and parts.netloc not in ("", "localhost"):
        raise StorageError(Fault(repr(root), "names a host", "file:///absolute/path, or a path alone"))
    if parts.scheme == "s3":
        override = parse_qs(parts.query).get("endpoint_override", [os.environ.get("AWS_ENDPOINT_URL", "")])[0]
        endpoint = urlsplit(override)
        filesystem = fs.S3FileSystem(
            endpoint_override=endpoint.netloc or override or None,
            scheme=endpoint.scheme or "https",
            connect_timeout=S3_CONNECT_TIMEOUT_S,
            request_timeout=S3_REQUEST_TIMEOUT_S,
            retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=S3_MAX_ATTEMPTS),
            allow_delayed_open=True,  # a small file is one request: it is there whole or not at all
        )
        return filesystem, parts.netloc + parts.path
    if parts.scheme == "gs":
        return fs.GcsFileSystem(), parts.netloc + parts.path
    if parts.scheme in ("", "file"):
        return fs.LocalFileSystem(), str(Path(parts.path if parts.scheme else root).expanduser().resolve())
    raise StorageError(
        Fault(repr(root), "is no place that can be opened", "a folder, or a file://, s3:// or gs:// URI")
    )


def _write_local(target: Path, content: bytes) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    temporary.write_bytes(content)
    temporary.replace(target)


def _check_hash(name: str, entry: FileEntry, size_bytes: int, sha256: str) -> None:
    if sha256 != entry.sha256:
        raise DamagedError(
            Fault(
                name,
                f"has hash {sha256[:12]}… and {size_bytes} bytes",
                f"{entry.sha256[:12]}… and {entry.size_bytes} bytes as in its manifest",
                "the file was changed after it was written; make it again",
            )
        )


def _is_transient(error: Exception) -> bool:
    """Say whether waiting may help: what is missing, or forbidden, stays so."""
    if isinstance(error, StorageError) and error.is_final:
        return False
    cause = error.__cause__ if isinstance(error, StorageError) else error
    is_hopeless = isinstance(error, FileNotFoundError) or isinstance(cause, PermissionError)
    return isinstance(cause, OSError) and not is_hopeless and not any(word in str(cause) for word in HOPELESS)


class _faults:  # noqa: N801 - reads as a statement
    """Turn what a file system raises into a StorageError that names the path."""

    def __init__(self, verb: str, where: str) -> None:
        self.verb, self.where = verb, where

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            reason, hint = " ".join(str(error).split())[:300], "check the root, its keys and its rights"
            kind_of = DamagedError if isinstance(error, FileNotFoundError) else StorageError
            raise kind_of(Fault(self.where, f"cannot be {self.verb}: {reason}", hint=hint)) from error
