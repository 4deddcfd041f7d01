"""One data set in the making: its tasks, and what each of them leaves behind when it has finished.

Stage: below prepare. In: a located log, the root. Out: `Attempt.run`, which runs the tasks that no earlier attempt has
finished.
Invariant: a task writes its state file as its last act, so whatever has one is finished; states count only as long as
the log, the catalogue and the `data` section are what they were.

    scratch/inputs.json       files with sizes and times of change, pieces, the `data` section
    scratch/rows-00003.json   piece 3 is checked, its rows lie in scratch/rows-00003-*.arrow
    scratch/shard-00000.json  partition 0 is written
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

import pyarrow as pa
from pyarrow import ipc

from dti_ray.config.data import DataConfig
from dti_ray.data.asked import content_of
from dti_ray.data.interactions import SCHEMA_VERSION, dataset_folder
from dti_ray.data.ray_jobs import Actors, Tree, Watch, run
from dti_ray.data.sources.files import MEMBER, ZIP
from dti_ray.data.sources.raw import Piece, RawLog
from dti_ray.storage import Storage

logger = logging.getLogger(__name__)

SCRATCH = "scratch"
STATES_AT_ONCE = 8  # read, and held against what they tell of


@dataclass(frozen=True)
class Attempt:
    """One data set in the making: what its tasks share, and the states that they leave behind.

    Attributes:
        data: the `data` section.
        storage: the root.
        raw: the log.
        pieces: what the scattering tasks read.
        watch: who follows.
    """

    data: DataConfig
    storage: Storage
    raw: RawLog
    pieces: Sequence[Piece]
    watch: Watch

    @property
    def folder(self) -> str:
        """The data set's folder."""
        return dataset_folder(self.data.name)

    @property
    def scratch(self) -> str:
        """Where rows and states lie until the manifest is written."""
        return f"{self.folder}/{SCRATCH}"

    def run(self, task: Callable[[int], Tree], count: int, stage: str) -> list[Tree]:
        """Run tasks 0 to count - 1, but for those that an earlier attempt has finished; return all results."""
        return run_missing(task, count, stage, self.scratch, self.storage, self.watch)


def run_missing(
    task: Callable[[int], Tree],
    count: int,
    stage: str,
    scratch: str,
    storage: Storage,
    watch: Watch,
    is_there: Callable[[Tree], bool] = lambda _state: True,
    actors: Actors | None = None,
) -> list[Tree]:
    """Run tasks 0 to count - 1, but for those that an earlier attempt has finished; return all results.

    A task's result is written to scratch, as its last act: whatever has one is finished.

    Args:
        task: given its number.
        count: of tasks.
        stage: what they do; part of the names of their states.
        scratch: folder of the states.
        storage: the root.
        watch: who follows.
        is_there: says of a state whether what it tells of is still there; otherwise its task runs again.
        actors: run the tasks in actors, which keep what a task holds; None: each in any process.
    """
    names = [f"{scratch}/{stage}-{number:05d}.json" for number in range(count)]
    listed = set(storage.list(scratch))
    with ThreadPoolExecutor(STATES_AT_ONCE) as pool:
        found = pool.map(lambda name: json.loads(storage.read(name)) if name in listed else None, names)
        states = {number: state for number, state in enumerate(found) if state is not None}
        good = list(pool.map(is_there, states.values()))
    done = {number: state for (number, state), is_good in zip(states.items(), good, strict=True) if is_good}
    if done:
        logger.info("%s: %d of %d are there already", stage, len(done), count)
    fresh = run(
        _LeavingState(task, names, storage), [n for n in range(count) if n not in done], watch, stage, actors
    )  # fmt: skip
    return [fresh[number] if number in fresh else done[number] for number in range(count)]


@dataclass(frozen=True)
class _LeavingState:
    task: Callable[[int], Tree]
    names: Sequence[str]
    storage: Storage

    def __call__(self, number: int) -> Tree:
        result = self.task(number)
        self.storage.write(self.names[number], json.dumps(result).encode())
        return result


def begin(attempt: Attempt, catalogue: pa.Table | None) -> None:
    """Keep what a broken attempt finished if it read the same log in the same way; delete it otherwise."""
    path, storage, raw = f"{attempt.scratch}/inputs.json", attempt.storage, attempt.raw
    inputs = {
        "schema_version": SCHEMA_VERSION,
        "data": content_of(attempt.data),
        "files": raw.files,
        "seen": [[info.size, str(info.mtime)] for info in raw.storage.infos([_on_disk(file) for file in raw.files])],
        "pieces": [asdict(piece) for piece in attempt.pieces],
        "catalogue": None if catalogue is None else _hash(catalogue),
    }
    text = json.dumps(inputs).encode()
    if storage.exists(path) and storage.read(path) == text:
        return
    storage.delete(path)  # first: what a broken deletion leaves belongs to no log
    storage.delete(attempt.folder)
    storage.write(path, text)


def _on_disk(file: str) -> str:
    """Return the file that storage knows: of a zip's member, the zip."""
    archive, _, member = file.partition(f"{ZIP}{MEMBER}")
    return archive + ZIP if member else file


def _hash(table: pa.Table) -> str:
    sink = pa.BufferOutputStream()
    with ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    return hashlib.sha256(sink.getvalue()).hexdigest()
