"""Public logs that can be fetched: a pinned package of the index ships them, pip brings it.

Stage: beside the readers. In: a name of `KNOWN`. Out: raw files below `<root>/raw/<name>`, with a manifest.
Invariant: a file is written only from a wheel with the pinned SHA-256; what lies there intact is not fetched again.

    fetch(storage, "ml-100k", progress)   →   raw/ml-100k/ml-100k.inter  ml-100k.item  manifest.json
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import subprocess
import sys
import tempfile
import zipfile
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dti_ray.errors import Fault, InputError, StorageError
from dti_ray.storage import MANIFEST, FileEntry, Storage

RAW_PROGRESS_SINCE_PIP = (24, 1)
LAST_LINES_OF_PIP = 4

Progress = Callable[[int, int | None], None]


@dataclass(frozen=True)
class Download:
    """Where a known data set comes from: a wheel of the package index that ships it."""

    requirement: str
    sha256: str
    folder: str
    files: tuple[str, ...]


KNOWN = {
    "ml-100k": Download(
        requirement="recbole==1.2.1",
        sha256="9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
        folder="recbole/dataset_example/ml-100k",
        files=("ml-100k.inter", "ml-100k.item"),
    )
}


def fetch(storage: Storage, name: str, on_progress: Progress) -> str:
    """Put a known data set's raw files below `<root>/raw/<name>`, unless they lie there intact.

    The wheel that ships them comes through pip, is held against its pinned SHA-256 and kept in the user's
    cache folder (`XDG_CACHE_HOME`, else `~/.cache`).

    Args:
        storage: the root.
        name: one of `KNOWN`.
        on_progress: called with (bytes done, bytes in all, or None while that is unknown).

    Returns:
        The folder as a user would type it.

    Raises:
        InputError: the name is unknown, pip failed, or the wheel is not the pinned one.
        StorageError: the root cannot be written.
    """
    if name not in KNOWN:
        raise InputError(Fault("data.name", f"got {name!r}", f"one of {', '.join(sorted(KNOWN))}"))
    source, folder = KNOWN[name], f"raw/{name}"
    if not _is_intact(storage, folder):
        wheel = _wheel(source, on_progress)
        storage.delete(f"{folder}/{MANIFEST}")  # it must not vouch for what changes now
        with zipfile.ZipFile(wheel) as archive:
            entries = [_extract(archive, source, file, storage, folder) for file in source.files]
        storage.write_manifest(folder, entries, {"source": source.requirement, "sha256": source.sha256})
    return storage.display(folder)


def _is_intact(storage: Storage, folder: str) -> bool:
    manifest = storage.read_manifest(folder)
    if manifest is None:
        return False
    try:
        storage.verify(folder, manifest[0])
    except StorageError:  # changed since; what was fetched can be fetched again
        return False
    return True


def _extract(archive: zipfile.ZipFile, source: Download, file: str, storage: Storage, folder: str) -> FileEntry:
    written = storage.write(f"{folder}/{file}", archive.read(f"{source.folder}/{file}"))
    return FileEntry(file, written.size_bytes, written.sha256)


def _wheel(source: Download, on_progress: Progress) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dti_ray"
    kept = cache / f"{source.requirement.replace('==', '-')}.whl"
    if not (kept.is_file() and _sha256(kept) == source.sha256):
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            _pip_download(source.requirement, Path(folder), on_progress)
            (wheel,) = Path(folder).glob("*.whl")
            if (found := _sha256(wheel)) != source.sha256:
                raise InputError(
                    Fault(source.requirement, f"came with SHA-256 {found}", source.sha256, "check the index")
                )
            wheel.replace(kept)
    size = kept.stat().st_size
    on_progress(size, size)
    return kept


def _pip_download(requirement: str, folder: Path, on_progress: Progress) -> None:
    """Run pip in a process of its own and read its progress; it has no public Python interface."""
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check"]
    options += ["--progress-bar", "raw" if _pip_version() >= RAW_PROGRESS_SINCE_PIP else "off"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), requirement]
    last: deque[str] = deque(maxlen=LAST_LINES_OF_PIP)
    on_progress(0, None)
    with subprocess.Popen(  # noqa: S603 - a fixed command of ours, without a shell
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            match line.split():
                case ["Progress", done, "of", total] if done.isdigit() and total.isdigit():
                    on_progress(int(done), int(total) or None)
                case [_, *_]:
                    last.append(line.strip())
    if process.returncode != 0:
        problem = f"pip could not download it (exit code {process.returncode}): {' | '.join(last)}"
        raise InputError(Fault(requirement, problem, hint="check the network and pip's configuration"))


def _pip_version() -> tuple[int, ...]:
    try:
        version = importlib.metadata.version("pip")
    except importlib.metadata.PackageNotFoundError:  # `python -m pip` will say so itself
        return ()
    return tuple(int(part) for part in version.split(".")[:2] if part.isdigit())


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
