"""MovieLens in RecBole's atomic files: get them, find them, name their columns.

Stage: sources. In: a folder with `*.inter` and `*.item` (tab separated, UTF-8, a heading `name:type`).
Out: a `RawLog` (which files to read, and how) and an ItemTable with the columns of `ITEMS`.
Invariant: every value stays the string that the file holds; only names change.

    user_id:token  item_id:token  rating:float  timestamp:float          user_id item_id label time
    196            242            3             881250949         →      "196"   "242"   "3"   "881250949"
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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from pyarrow import csv

from dti_ray.config.schema import DataConfig
from dti_ray.errors import Fault, InputError, StorageError
from dti_ray.storage import MANIFEST, FileEntry, Storage

RAW_INTERACTIONS = pa.schema([(name, pa.string()) for name in ("user_id", "item_id", "label", "time")])
ITEMS = pa.schema([(name, pa.string()) for name in ("item_id", "title", "year", "genres")])

ITEM_COLUMNS = {"item_id": "item_id", "movie_title": "title", "release_year": "year", "class": "genres"}
NOT_A_LABEL = ("user_id", "item_id", "timestamp")
DELIMITER = "\t"
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


@dataclass(frozen=True)
class RawLog:
    """The raw files of one data set and how an interaction is read from them.

    Attributes:
        storage: the root that the paths are relative to.
        logs: files of interactions, sorted; all have the same needed columns.
        catalogue: the file of items.
        columns: heading in the file → name in `RAW_INTERACTIONS`.
    """

    storage: Storage
    logs: tuple[str, ...]
    catalogue: str
    columns: Mapping[str, str]

    def batches(self, log: str) -> Iterator[pa.RecordBatch]:
        """Yield the rows of one of `logs`, with the columns of `RAW_INTERACTIONS`; the same batches every time.

        Every field is read as a string, whatever it holds, so that validation sees it.

        Raises:
            InputError: a line has more or fewer fields than the heading, or is not UTF-8.
            StorageError: the file cannot be read.
        """
        one_thread = csv.ReadOptions(use_threads=False)
        with _open(self.storage, log) as stream, _faults(self.storage.display(log)):
            for batch in csv.open_csv(stream, one_thread, _parse_options(), _convert_options(self.columns)):
                yield batch.rename_columns([self.columns[name] for name in batch.schema.names])


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


def locate(config: DataConfig, storage: Storage) -> RawLog:
    """Find the raw files that a configuration names and check their headings.

    Args:
        config: `path` is the folder, null means `<root>/raw/<name>`; `label_column` becomes `label`.
        storage: the root.

    Raises:
        InputError: the folder, a file or a column is missing, or there are several catalogues.
    """
    if config.label_column in NOT_A_LABEL:
        raise InputError(Fault("data.label_column", f"got {config.label_column!r}", "a column of feedback"))
    place = Storage(config.path) if config.path is not None else storage
    folder = "" if config.path is not None else f"raw/{config.name}"
    found = place.list(folder)
    logs = tuple(path for path in found if path.endswith(".inter"))
    catalogues = [path for path in found if path.endswith(".item")]
    if not logs or len(catalogues) != 1:
        raise InputError(
            Fault(
                place.display(*filter(None, [folder])),
                f"holds {len(logs)} *.inter and {len(catalogues)} *.item files",
                "at least one *.inter and exactly one *.item",
                "set data.path to the folder of the raw files"
                if config.path is not None or config.name not in KNOWN
                else f"get them with `dti-ray data get {config.name}`, or set data.path",
            )
        )
    wanted = {"user_id": "user_id", "item_id": "item_id", config.label_column: "label", "timestamp": "time"}
    columns = [_columns(place, log, wanted) for log in logs]
    for log, other in zip(logs, columns, strict=True):
        if other != columns[0]:
            problem, expected = f"has columns {', '.join(other)}", f"{', '.join(columns[0])} as in {logs[0]}"
            raise InputError(Fault(place.display(log), problem, expected))
    return RawLog(place, logs, catalogues[0], columns[0])


def read_items(storage: Storage, path: str) -> pa.Table:
    """Return the catalogue in a `*.item` file, in the file's order, with the columns of `ITEMS`.

    Raises:
        InputError: the file is missing or is no table, or a column is missing.
    """
    columns = _columns(storage, path, ITEM_COLUMNS)
    with _open(storage, path) as stream, _faults(storage.display(path)):
        table = csv.read_csv(stream, parse_options=_parse_options(), convert_options=_convert_options(columns))
    return table.rename_columns([columns[name] for name in table.column_names]).select(ITEMS.names)


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


def _columns(storage: Storage, path: str, wanted: Mapping[str, str]) -> dict[str, str]:
    """Return heading → canonical name for the wanted columns of a file."""
    with _open(storage, path) as stream, _faults(storage.display(path)):
        heading = csv.open_csv(stream, parse_options=_parse_options()).schema.names
    by_name = {name.partition(":")[0]: name for name in heading}
    missing = [name for name in wanted if name not in by_name]
    if missing:
        raise InputError(
            *(
                Fault(storage.display(path), f"has no column {name}", hint=f"found {', '.join(heading)}")
                for name in missing
            )
        )
    return {by_name[name]: canonical for name, canonical in wanted.items()}


def _open(storage: Storage, path: str) -> pa.NativeFile:
    try:
        return storage.filesystem.open_input_stream(storage.path(path))
    except FileNotFoundError:
        raise InputError(Fault(storage.display(path), "is missing", "a file")) from None
    except OSError as error:
        raise StorageError(Fault(storage.display(path), f"cannot be read: {error}")) from error


@contextmanager
def _faults(where: str) -> Iterator[None]:
    """Turn what the CSV reader raises into an error that names the file."""
    try:
        yield
    except pa.ArrowInvalid as error:
        problem = f"cannot be read as a table: {' '.join(str(error).split())}"
        raise InputError(Fault(where, problem, "tab-separated UTF-8 text with a heading")) from error
    except OSError as error:
        raise StorageError(Fault(where, f"cannot be read: {error}")) from error


def _parse_options() -> csv.ParseOptions:
    return csv.ParseOptions(delimiter=DELIMITER, quote_char=False)  # a quotation mark is a letter like any other


def _convert_options(columns: Mapping[str, str]) -> csv.ConvertOptions:
    return csv.ConvertOptions(
        include_columns=list(columns),
        column_types=dict.fromkeys(columns, pa.string()),
        strings_can_be_null=False,  # a film may be called "NA"
    )
