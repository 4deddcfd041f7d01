"""`prepare` on object storage that goes away in mid-run: waited for, or told, and the next run goes on."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import pytest
from pyarrow import fs

from dti_ray import storage as storage_module
from dti_ray.cli import main
from dti_ray.config import RunConfig, load_config
from dti_ray.data import ray_jobs
from dti_ray.data.interactions import open_dataset
from dti_ray.data.prepare import prepare
from dti_ray.data.ray_jobs import Watch
from dti_ray.errors import EXIT_BAD_INPUT, InputError, StorageError
from dti_ray.storage import Storage
from tests.logs import contents, cut, learnt, make_log, tabular, write_log
from tests.seaweed import Seaweed

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("ray_cluster")]

PIECES = 24
SHARDS = ["data.shard_interactions=100"]
IMPATIENT_S = 0.15

Step = tuple[str, int, int]


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    for number, part in enumerate(cut(make_log(800), PIECES)):
        write_log(tmp_path / "raw" / f"{number:02d}.csv", part)
    return tmp_path / "raw"


def copy_to(storage: Storage, folder: Path) -> None:
    for path in folder.iterdir():
        storage.write(f"log/{path.name}", path.read_bytes())


class Killing(Watch):
    """Kills the server at some steps, and starts it again after a while if it is told so."""

    def __init__(self, server: Seaweed, *steps: tuple[str, int], back_after_s: float | None = None) -> None:
        super().__init__(self.step)
        self.server, self.steps, self.back_after_s = server, steps, back_after_s
        self.seen: list[Step] = []

    def step(self, stage: str, done: int, total: int) -> None:
        self.seen.append((stage, done, total))
        if (stage, done) in self.steps:
            self.server.kill()
            if self.back_after_s is not None:
                threading.Timer(self.back_after_s, self.server.start).start()


def test_prepare_waits_for_a_bucket_that_comes_back(tmp_path: Path, raw: Path, seaweed: Seaweed) -> None:
    storage = Storage(seaweed.root("waits"))
    watch = Killing(seaweed, ("rows", 5), ("shard", 3), back_after_s=1)
    dataset = prepare(tabular(raw, *SHARDS), storage, watch)
    assert set(watch.steps) <= {step[:2] for step in watch.seen}
    assert contents(dataset) == contents(prepare(tabular(raw, *SHARDS), Storage(str(tmp_path / "local"))))
    assert not any("/scratch" in path for path in storage.list(dataset.folder, recursive=True))


def test_log_in_a_bucket_that_comes_back_is_read_to_its_end(tmp_path: Path, raw: Path, seaweed: Seaweed) -> None:
    copy_to(Storage(seaweed.root("logs")), raw)
    config = tabular(seaweed.root("logs/log"), *SHARDS)
    watch = Killing(seaweed, ("items", 2), ("rows", 2), back_after_s=1)
    dataset = prepare(config, Storage(str(tmp_path / "root")), watch)
    assert learnt(dataset) == learnt(prepare(tabular(raw, *SHARDS), Storage(str(tmp_path / "local"))))


@pytest.mark.parametrize("place", ["root", "log"])
def test_bucket_that_stays_away_ends_the_command_in_words_and_the_same_command_goes_on(
    tmp_path: Path,
    raw: Path,
    seaweed: Seaweed,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    place: str,
) -> None:
    monkeypatch.setattr(storage_module, "PATIENCE_S", IMPATIENT_S)
    root = seaweed.root("stays-away") if place == "root" else str(tmp_path / "root")
    path = str(raw) if place == "root" else seaweed.root("away/log")
    if place == "log":
        copy_to(Storage(seaweed.root("away")), raw)
    command = ["prepare", "data.name=tiny", "data.source=tabular", f"data.path={path}", *SHARDS, "--root", root]
    watches: list[Killing] = []

    def watch(_show: object) -> Watch:
        watches.append(Killing(seaweed, *([] if watches else [("rows", 7)])))
        return watches[-1]

    monkeypatch.setattr(ray_jobs, "Watch", watch)
    with pytest.raises(SystemExit) as ended:
        main(command)
    said = capsys.readouterr().err
    assert ended.value.code == EXIT_BAD_INPUT
    assert "Traceback" not in said
    (fault,) = [line for line in said.splitlines() if line.startswith("error ")]
    assert "cannot be " in fault
    assert "run the same command: it goes on from here" in fault

    seaweed.start()
    seaweed.wait()
    storage = Storage(root)
    with pytest.raises(InputError, match="is no complete data set"):
        open_dataset(storage, "tiny")
    with pytest.raises(SystemExit, match="0"):
        main(command)
    first, second = (next(step for step in watch.seen if step[0] == "rows") for watch in watches)
    assert first == ("rows", 0, PIECES)
    assert second[2] <= PIECES - 7, "what was finished is not read again"
    config = load_config([], command[1:-2])
    dataset = open_dataset(storage, "tiny")
    assert learnt(dataset) == learnt(prepare(tabular(raw, *SHARDS), Storage(str(tmp_path / "local"))))
    assert prepare(config, storage) == dataset


def test_wrong_key_is_told_at_once_and_not_waited_for(
    tmp_path: Path, raw: Path, seaweed: Seaweed, caplog: pytest.LogCaptureFixture
) -> None:
    storage = Storage(seaweed.root("keys"))
    assert isinstance(storage.filesystem, fs.S3FileSystem)
    storage.filesystem = fs.S3FileSystem(
        access_key="test", secret_key="wrong", endpoint_override=f"127.0.0.1:{seaweed.port}", scheme="http"
    )
    with caplog.at_level(logging.WARNING), pytest.raises(StorageError, match="cannot be "):
        prepare(RunConfig.model_validate(tabular(raw).model_dump()), storage)
    assert caplog.messages == []
