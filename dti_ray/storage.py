"""All object storage in one place: folders, file://, s3:// and gs:// behind one small class.

Stage: below the data path. In: a root URI. Out: bytes, files and manifests under relative paths.
Invariant: whatever has several files is complete if and only if its `manifest.json` exists, because
that is written last; it carries names, sizes and SHA-256 hashes, and `verify` holds them against
what lies there.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from pyarrow import fs

from dti_ray.errors import DamagedError, Fault, StorageError

MANIFEST = "manifest.json"
S3_CONNECT_TIMEOUT_S = 10
S3_REQUEST_TIMEOUT_S = 60
S3_MAX_ATTEMPTS = 4


@dataclass(frozen=True)
class FileEntry:
    """One file of a manifest: path relative to the manifest's folder, size, hash."""

    path: str
    size_bytes: int
    sha256: str


class Storage:
    """A root below which everything of this package lies.

    Args:
        root: local folder, or `file://`, `s3://bucket/prefix`, `gs://bucket/prefix`. An S3 endpoint comes
            from `AWS_ENDPOINT_URL` or from `?endpoint_override=http://host:port` on the root.

    Raises:
        StorageError: the scheme is unknown.
    """

    def __init__(self, root: str) -> None:
        self.root = root
        self.filesystem, self.base = _open(root)

    def path(self, *parts: str) -> str:
        """Return the path that `self.filesystem` understands."""
        return "/".join([self.base.rstrip("/"), *(part.strip("/") for part in parts if part)])

    def display(self, *parts: str) -> str:
        """Return the path as a user would type it."""
        return "/".join([self.root.partition("?")[0].rstrip("/"), *parts])

    def exists(self, path: str) -> bool:
        """Say whether a file or folder lies at the relative path."""
        with _faults("looked up", self.display(path)):
            return self.filesystem.get_file_info(self.path(path)).type != fs.FileType.NotFound

    def read(self, path: str) -> bytes:
        """Return a file's content.

        Raises:
            StorageError: the file is missing or cannot be read.
        """
        with (
            _faults("read", self.display(path)),
            self.filesystem.open_input_stream(self.path(path)) as stream,
        ):
            return stream.read()

    def write(self, path: str, content: bytes) -> FileEntry:
        """Write a file so that readers see the old content or the new one, never a part."""
        target = self.path(path)
        with _faults("written", self.display(path)):
            if isinstance(self.filesystem, fs.LocalFileSystem):
                _write_local(Path(target), content)
            else:
                with self.filesystem.open_output_stream(target) as stream:
                    stream.write(content)
        return FileEntry(path, len(content), hashlib.sha256(content).hexdigest())

    def list(self, path: str, recursive: bool = False) -> list[str]:
        """Return the relative paths of what lies in a folder, sorted; empty if there is none."""
        selector = fs.FileSelector(self.path(path), allow_not_found=True, recursive=recursive)
        with _faults("listed", self.display(path)):
            infos = self.filesystem.get_file_info(selector)
        start = len(self.base.rstrip("/")) + 1
        return sorted(info.path[start:] for info in infos if not (recursive and not info.is_file))

    def delete(self, path: str) -> None:
        """Delete a folder or file; nothing happens if there is none."""
        target = self.path(path)
        with _faults("deleted", self.display(path)):
            kind = self.filesystem.get_file_info(target).type
            if kind == fs.FileType.Directory:
                self.filesystem.delete_dir(target)
            elif kind == fs.FileType.File:
                self.filesystem.delete_file(target)

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
            _check_hash(self.display(path, entry.path), entry, content)
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
        """Hold every file against its size and hash.

        Raises:
            StorageError: a file is missing or differs.
        """
        for entry in files:
            _check_hash(self.display(path, entry.path), entry, self.read(f"{path}/{entry.path}"))

    def check_writable(self) -> None:
        """Write, read and delete a probe, so that a bad root fails before anything starts.

        Raises:
            StorageError: the root cannot be reached or written.
        """
        probe = f".probe-{uuid.uuid4().hex}"
        self.write(probe, b"probe")
        if self.read(probe) != b"probe":
            raise StorageError(Fault(self.root, "returned other bytes than were written"))
        self.delete(probe)


def absolute(root: str) -> str:
    """Return a root that means the same in a process with another working directory."""
    return root if urlsplit(root).scheme else str(Path(root).expanduser().resolve())


def _open(root: str) -> tuple[fs.FileSystem, str]:
    parts = urlsplit(root)
    if parts.scheme in ("s3", "gs") and not parts.netloc:
        raise StorageError(Fault("storage.root", f"got {root!r}", f"{parts.scheme}://bucket/prefix"))
    if parts.scheme == "file" and parts.netloc not in ("", "localhost"):
        raise StorageError(Fault("storage.root", f"got {root!r}", "file:///absolute/path, or a path alone"))
    if parts.scheme == "s3":
        override = parse_qs(parts.query).get("endpoint_override", [os.environ.get("AWS_ENDPOINT_URL", "")])[0]
        endpoint = urlsplit(override)
        filesystem = fs.S3FileSystem(
            endpoint_override=endpoint.netloc or override or None,
            scheme=endpoint.scheme or "https",
            connect_timeout=S3_CONNECT_TIMEOUT_S,
            request_timeout=S3_REQUEST_TIMEOUT_S,
            retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=S3_MAX_ATTEMPTS),
        )
        return filesystem, parts.netloc + parts.path
    if parts.scheme == "gs":
        return fs.GcsFileSystem(), parts.netloc + parts.path
    if parts.scheme in ("", "file"):
        return fs.LocalFileSystem(), str(Path(parts.path if parts.scheme else root).expanduser().resolve())
    raise StorageError(Fault("storage.root", f"got {root!r}", "a folder, or a file://, s3:// or gs:// URI"))


def _write_local(target: Path, content: bytes) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    temporary.write_bytes(content)
    temporary.replace(target)


def _check_hash(name: str, entry: FileEntry, content: bytes) -> None:
    found = hashlib.sha256(content).hexdigest()
    if found != entry.sha256:
        raise DamagedError(
            Fault(
                name,
                f"has hash {found[:12]}… and {len(content)} bytes",
                f"{entry.sha256[:12]}… and {entry.size_bytes} bytes as in its manifest",
                "the file was changed after it was written; make it again",
            )
        )


class _faults:  # noqa: N801 - reads as a statement
    """Turn what a file system raises into a StorageError that names the path."""

    def __init__(self, verb: str, where: str) -> None:
        self.verb, self.where = verb, where

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            reason = " ".join(str(error).split())[:300]
            kind_of = DamagedError if isinstance(error, FileNotFoundError) else StorageError
            raise kind_of(
                Fault(
                    self.where,
                    f"cannot be {self.verb}: {reason}",
                    hint="check the root, its keys and its rights",
                )
            ) from error
