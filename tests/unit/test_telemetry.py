"""Lines of metrics reach every sink, each line once; records say where they are from."""

from __future__ import annotations

import io
import json
import logging
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from dti_ray.config import RunConfig
from dti_ray.data.interactions import open_dataset
from dti_ray.data.pipeline import TrainingRows
from dti_ray.model.backbone import build_model
from dti_ray.storage import Storage
from dti_ray.telemetry import Line, MetricSink, Sinks, read_lines
from dti_ray.telemetry.courier import Courier, Entry, TrackedRun
from dti_ray.telemetry.logs import in_worker, log_line, on_driver
from dti_ray.telemetry.series import RUN, SERIES
from dti_ray.telemetry.sinks import LINES, SeriesSink, series_tags
from dti_ray.train.engine import TorchEngine
from dti_ray.train.link import Link
from dti_ray.train.loop import Trainer
from dti_ray.train.world import World
from tests.builders import make_config, make_table, write_dataset

CPU = torch.device("cpu")
RUN_OF_40 = TrackedRun("tiny-12345678", "tiny", None, {}, 40)


@dataclass
class Shelf:
    """Stands for Ray's metrics: remembers the value of each series and its tags."""

    values: dict[str, float] = field(default_factory=dict)
    tags: list[dict[str, str]] = field(default_factory=list)

    def gauge(self, name: str, _description: str, keys: tuple[str, ...]) -> OnShelf:
        return OnShelf(self, name, keys)

    counter = gauge


@dataclass
class OnShelf:
    shelf: Shelf
    name: str
    keys: tuple[str, ...]

    def set(self, value: float, tags: dict[str, str]) -> None:
        assert tuple(tags) == self.keys
        self.shelf.values[self.name] = value
        self.shelf.tags.append(tags)

    def inc(self, value: float, tags: dict[str, str]) -> None:
        assert value > 0, "Ray refuses to add nothing"
        self.set(self.shelf.values.get(self.name, 0.0) + value, tags)


@dataclass
class Notebook:
    """A tracker that lives in this process, and may be away."""

    told: dict[str, float] = field(default_factory=dict)
    lines: list[tuple[str, float]] = field(default_factory=list)
    failures: int = 0
    ends: list[bool] = field(default_factory=list)

    def connect(self) -> Notebook:
        if self.failures:
            self.failures -= 1
            raise ConnectionError("nobody listens")
        return self

    def send(self, entries: Sequence[Entry]) -> None:
        self.connect()
        self.lines += [(entry.kind, entry.line["targets"]) for entry in entries]

    def close(self, is_finished: bool) -> None:
        self.ends.append(is_finished)


class Steps(Link):
    """Remembers the steps that were reached."""

    def __init__(self) -> None:
        self.reached: list[int] = []

    def reach(self, step: int) -> None:
        self.reached.append(step)


def line(targets: int) -> Line:
    return {"step": targets / 10, "targets": targets, "loss": 1 / targets}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Storage, Steps]:
    """A run of one rank in this process."""
    root = tmp_path_factory.mktemp("run")
    write_dataset(root, [30, 12, 25])
    config: RunConfig = make_config(
        f"storage.root={root}", "data.name=tiny", "train.engine=torch", "cluster.workers=1", "packing.k=4",
        "packing.n=3", "packing.streams=1", "optim.targets_per_step=16", "optim.epochs=1", "train.log_targets=16",
        "eval.every_targets=64", "model.layers=1", "train.peak_tflops=1",
    )  # fmt: skip
    storage, steps = Storage(config.storage.root), Steps()
    rows = TrainingRows(open_dataset(storage, config.data.name), make_table(), config, through_ray=False)
    engine = TorchEngine(build_model(config, make_table()), config, CPU)
    Trainer(config, storage, rows, engine, World(CPU), lambda *_: None, steps).run()
    return storage, steps


def test_lines_of_a_run_have_what_every_series_is_read_from(tiny: tuple[Storage, Steps]) -> None:
    for series in SERIES:
        if series.line != RUN:
            lines = read_lines(tiny[0], "runs/run", series.line)
            assert lines
            assert all(series.key in one for one in lines), series.name


def test_link_hears_of_every_step(tiny: tuple[Storage, Steps]) -> None:
    last = read_lines(tiny[0], "runs/run", "train")[-1]["step"]
    assert tiny[1].reached == list(range(int(last) + 1))


def test_gauges_take_the_newest_value_and_counters_the_sum() -> None:
    shelf = Shelf()
    sink = SeriesSink(shelf.gauge, shelf.counter, series_tags("tiny", None, "logs"))
    for blocked, loss in ((0.5, 0.7), (0.0, 0.6), (0.25, 0.65)):
        sink.add("train", {"step": 1, "targets": 10, "loss": loss, "checkpoint_s": blocked})
    sink.add("valid", {"step": 1, "targets": 10, "auc": 0.75, "log_loss": 0.5})
    sink.add(RUN, {"restarts": 2})
    sink.close()
    assert shelf.values == {
        "dti_checkpoint_blocked_seconds": 0.75, "dti_loss": 0.65, "dti_steps": 1, "dti_targets": 10,
        "dti_valid_auc": 0.75, "dti_valid_log_loss": 0.5, "dti_restarts": 2,
    }  # fmt: skip
    assert shelf.tags[0] == {"run": "tiny", "group": "", "dataset": "logs"}


def test_gauges_are_set_again_until_the_run_ends_because_ray_forgets_them() -> None:
    shelf = Shelf()
    sink = SeriesSink(shelf.gauge, shelf.counter, series_tags("tiny", None, "logs"), refresh_s=0.01)
    sink.add("train", {"loss": 0.5, "checkpoint_s": 2.0})
    shelf.values["dti_loss"] = math.nan
    wait_for(lambda: shelf.values["dti_loss"] == 0.5)
    sink.close()
    assert shelf.values == {"dti_loss": 0.5, "dti_checkpoint_blocked_seconds": 2.0}, "counters are not added to"
    shelf.values.clear()
    time.sleep(0.05)
    assert shelf.values == {}


def test_no_event_file_stays_here_however_a_run_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "local").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "local"))
    storage = Storage(str(tmp_path / "root"))
    with MetricSink(storage, "runs/well", 0) as sink:
        sink.add("train", {"step": 1, "targets": 10, "loss": 0.5})
    with suppress(ValueError), MetricSink(storage, "runs/badly", 0) as sink:
        sink.add("train", {"step": 1, "targets": 10, "loss": 0.5})
        sink.flush()
        raise ValueError
    assert list((tmp_path / "local").iterdir()) == []
    for run in ("runs/well", "runs/badly"):
        assert [line["loss"] for line in read_lines(storage, run, "train")] == [0.5]
        assert len(list((tmp_path / "root" / run / "tensorboard").iterdir())) == 1


def test_several_sinks_hear_the_same_lines() -> None:
    books = [Notebook(), Notebook()]
    sinks = Sinks(*(Courier("book", book.connect, RUN_OF_40, {}, pause_s=0.01) for book in books))
    sinks.add("train", line(10))
    sinks.add("valid", line(10))
    sinks.add(RUN, {"restarts": 1})
    sinks.close()
    assert [book.lines for book in books] == [[("train", 10), ("valid", 10)]] * 2


def test_line_that_a_restart_repeats_is_told_once() -> None:
    book = Notebook()
    courier = Courier("book", book.connect, RUN_OF_40, {}, pause_s=0.01)
    for targets in (10, 20, 30, 20, 30, 40):
        courier.add("train", line(targets))
    courier.close()
    assert book.lines == [("train", targets) for targets in (10, 20, 30, 40)]
    assert book.ends == [True]


def test_second_command_tells_what_the_first_one_could_not_and_nothing_twice() -> None:
    book = Notebook(told={"train": 10.0})
    earlier = {"train": [line(10), line(20)], "valid": [line(20)]}
    courier = Courier("book", book.connect, RUN_OF_40, earlier, pause_s=0.01)
    courier.add("train", line(20))
    courier.add("train", line(30))
    courier.close()
    assert book.lines == [("train", 20), ("valid", 20), ("train", 30)]
    assert book.ends == [False], "it has not seen all its targets"


def test_tracker_that_comes_back_gets_all_lines_in_order_after_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    book = Notebook(failures=3)
    courier = Courier("book", book.connect, RUN_OF_40, {}, pause_s=0.01)
    for targets in (10, 20, 30):
        courier.add("train", line(targets))
        time.sleep(0.02)
    wait_for(lambda: len(book.lines) == 3)
    courier.close()
    assert book.lines == [("train", 10), ("train", 20), ("train", 30)]
    (record,) = [one for one in caplog.records if one.levelno >= logging.WARNING]
    assert record.getMessage() == "book is tried again in the background: ConnectionError: nobody listens"


def test_tracker_that_stays_away_costs_neither_the_run_nor_time(caplog: pytest.LogCaptureFixture) -> None:
    book = Notebook(failures=10**9)
    courier = Courier("book", book.connect, RUN_OF_40, {}, pause_s=10)
    began = time.monotonic()
    for targets in range(10, 1000, 10):
        courier.add("train", line(targets))
    courier.close()
    assert time.monotonic() - began < 1
    assert [one.levelno for one in caplog.records].count(logging.WARNING) == 1


def test_json_record_says_run_rank_and_step(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = io.StringIO()
    monkeypatch.setattr("sys.stderr", stderr)
    log = logging.getLogger("dti_ray.train.launch")
    with on_driver("json", "tiny") as context:
        log.info("restored")
        context.step = 7
        log_line(log, "train", {"step": 7, "loss": 0.5})
        try:
            raise ValueError("no")
        except ValueError:
            log.exception("lost")
    log.warning("after it, nobody writes")
    first, second, third = (json.loads(text) for text in stderr.getvalue().splitlines())
    place = {"level": "INFO", "logger": "dti_ray.train.launch", "run": "tiny", "rank": None}
    assert first == {**place, "time": first["time"], "step": None, "message": "restored"}
    assert second == {
        **place, "time": second["time"], "step": 7, "message": "train: step 7, loss 0.5",
        "metrics": {"step": 7, "loss": 0.5},
    }  # fmt: skip
    assert "ValueError: no" in third["trace"]


def test_text_on_the_driver_is_warnings_only(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = io.StringIO()
    monkeypatch.setattr("sys.stderr", stderr)
    log = logging.getLogger("dti_ray.train.launch")
    with on_driver("text", "tiny") as context:
        context.step = 3
        log.info("restored")
        log.warning("damaged")
    assert stderr.getvalue().endswith("WARNING dti_ray.train.launch [run=tiny rank=None step=3] damaged\n")
    assert len(stderr.getvalue().splitlines()) == 1


def test_worker_writes_a_record_once_and_its_file_has_the_place(monkeypatch: pytest.MonkeyPatch) -> None:
    own, console, file, root = io.StringIO(), io.StringIO(), Kept(), logging.getLogger()
    monkeypatch.setattr("sys.stderr", own)
    monkeypatch.setattr(root, "handlers", [file, logging.StreamHandler(console)])
    package = logging.getLogger("dti_ray")
    monkeypatch.setattr(package, "handlers", [])
    monkeypatch.setattr(package, "level", package.level)
    in_worker("text", "tiny", 1).step = 5
    logging.getLogger("dti_ray.train.board").info("restored")
    logging.getLogger("else").warning("not ours")
    assert own.getvalue().endswith("[run=tiny rank=1 step=5] restored\n")
    assert console.getvalue() == "not ours\n"
    assert [(one.run, one.rank, one.step) for one in file.records if one.name == "dti_ray.train.board"] == [
        ("tiny", 1, 5)
    ]


class Kept(logging.Handler):
    """Stands for Ray Train's log file."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


def test_whoever_only_reads_lines_waits_neither_for_torch_nor_for_a_trackers_package() -> None:
    heavy = ("torch", "ray", "mlflow", "wandb")
    code = f"import sys, dti_ray.telemetry.trackers; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_lines_kept_in_files_are_those_that_trackers_are_told() -> None:
    assert set(LINES) == {series.line for series in SERIES} - {RUN}


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 5
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
