"""A run at MLflow and at Weights & Biases, by their own packages: a database file, and a folder for later."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from dti_ray.config import RunConfig
from dti_ray.config.telemetry import TelemetryConfig
from dti_ray.errors import ConfigError
from dti_ray.telemetry import Line
from dti_ray.telemetry.trackers import check_trackers, open_trackers
from tests.builders import make_config

needs_mlflow = pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="needs extra mlflow")
needs_wandb = pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="needs extra wandb")
# 2026-11, mlflow 3.17: it uses a loader strategy that SQLAlchemy 2.1 deprecates.
sqlalchemy_deprecates = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")
TOTAL_TARGETS = 40


def lines(*targets: int, name: str = "loss") -> list[Line]:
    return [{"step": count / 10, "targets": count, name: 1 / count} for count in targets]


def tell(
    config: RunConfig, train: Sequence[Line], valid: Sequence[Line] = (), earlier: Sequence[Line] = (), of: bytes = b"1"
) -> None:
    """Do what one command does: tell what there is, in the order of steps, and end."""
    (courier,) = open_trackers(config, of, TOTAL_TARGETS, {"train": earlier})
    for kind, line in sorted(
        [("train", line) for line in train] + [("valid", line) for line in valid], key=lambda one: one[1]["step"]
    ):
        courier.add(kind, line)
    courier.close()


@pytest.fixture
def at_mlflow(tmp_path: Path) -> RunConfig:
    return make_config(f"telemetry.mlflow=sqlite:///{tmp_path}/mlflow.db", "telemetry.group=night", "train.run=tiny")


@pytest.fixture
def at_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    return make_config("telemetry.wandb=clicks", "telemetry.group=night", "train.run=tiny")


def mlflow_runs(config: RunConfig) -> tuple[Any, list[Any]]:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=str(config.telemetry.mlflow))
    experiment = client.get_experiment_by_name("dti_ray")
    assert experiment is not None
    return client, list(client.search_runs([experiment.experiment_id]))


@needs_mlflow
@sqlalchemy_deprecates
@pytest.mark.slow
def test_mlflow_has_one_run_over_two_commands_and_every_step_once(at_mlflow: RunConfig) -> None:
    tell(at_mlflow, lines(10, 20), lines(20, name="auc"))
    client, (run,) = mlflow_runs(at_mlflow)
    assert run.info.status == "KILLED", "it has not seen all its targets"
    assert run.info.run_name == "tiny"
    assert run.data.tags["dti_ray.group"] == "night"
    assert run.data.params["optim.targets_per_step"] == "256"
    changed = at_mlflow.model_copy(update={"cluster": at_mlflow.cluster.model_copy(update={"workers": 1})})
    tell(changed, lines(20, 30, 40), lines(40, name="auc"), earlier=lines(10, 20))
    client, (run,) = mlflow_runs(at_mlflow)
    assert run.info.status == "FINISHED"
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(one.step, one.value) for one in history] == [(count, 1 / count) for count in (10, 20, 30, 40)]
    assert [one.step for one in client.get_metric_history(run.info.run_id, "valid/auc")] == [20, 40]


@needs_mlflow
@sqlalchemy_deprecates
@pytest.mark.slow
def test_mlflow_run_of_a_deleted_folder_is_another_one(at_mlflow: RunConfig) -> None:
    tell(at_mlflow, lines(10), of=b"1")
    tell(at_mlflow, lines(10), of=b"2")
    assert len(mlflow_runs(at_mlflow)[1]) == 2


@needs_mlflow
@pytest.mark.slow
def test_mlflow_server_that_is_down_costs_one_warning_and_no_time(caplog: pytest.LogCaptureFixture) -> None:
    (courier,) = open_trackers(make_config("telemetry.mlflow=http://127.0.0.1:9"), b"1", TOTAL_TARGETS, {})
    began = time.monotonic()
    for line in lines(*range(1, 40)):
        courier.add("train", line)
    assert time.monotonic() - began < 0.1
    courier.close()
    assert time.monotonic() - began < 14, "it does not wait for as long as it may"
    found = [one for one in caplog.records if one.levelno >= logging.WARNING and one.name.startswith("dti_ray")]
    assert [one.getMessage().partition(":")[0] for one in found] == ["MLflow is tried again in the background"]


def wandb_history(folder: Path) -> list[tuple[str, list[dict[str, Any]]]]:
    """Return (run id, rows of its history) of each command, once W&B's process has written them."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = []
    for file in folder.glob("wandb/offline-run-*/*.wandb"):
        records: list[Any] = []
        end = time.monotonic() + 20
        while not any(record.HasField("exit") for record in records) and time.monotonic() < end:
            time.sleep(0.1)
            records = [Record.FromString(data) for data in log_records(file.read_bytes())]
        ids = [record.run.run_id for record in records if record.HasField("run")]
        rows = [record.history.item for record in records if record.HasField("history")]
        values = [{item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in row} for row in rows]
        found.append((ids[0], values))
    return sorted(found, key=lambda one: len(one[1]))


def log_records(data: bytes) -> Iterator[bytes]:
    """Yield the records of a log in LevelDB's format: blocks of 32 KiB, each piece with hash, length and kind."""
    at, record = 7, b""  # W&B's own header lies in the first block
    while at + 7 <= len(data):
        left = 2**15 - at % 2**15
        size, kind = struct.unpack_from("<HB", data, at + 4)
        if left < 7 or kind == 0:
            at += left
            continue
        record += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last piece
            yield record
            record = b""


@needs_wandb
@pytest.mark.slow
def test_wandb_has_one_id_over_two_commands_and_every_folder_the_whole_history(
    at_wandb: RunConfig, tmp_path: Path
) -> None:
    tell(at_wandb, lines(10, 20))
    tell(at_wandb, lines(20, 30, 40), lines(40, name="auc"), earlier=lines(10, 20))
    (first, before), (second, rows) = wandb_history(tmp_path)
    assert first == second
    assert first.startswith("tiny-")
    assert [row["train/targets"] for row in before] == [10, 20]
    assert [row["train/targets"] for row in rows if "train/targets" in row] == [10, 20, 30, 40]
    assert [(row["valid/targets"], row["valid/auc"]) for row in rows if "valid/auc" in row] == [(40, 1 / 40)]


@needs_wandb
@pytest.mark.parametrize(
    ("environment", "answer"),
    [
        ({"WANDB_MODE": "offline"}, "good"),
        ({"WANDB_API_KEY": 40 * "0"}, "good"),
        ({}, "telemetry.wandb: no API key is set; set WANDB_API_KEY, or run `wandb login`, or set WANDB_MODE=offline"),
        ({"WANDB_API_KEY": "short"}, "telemetry.wandb: WANDB_API_KEY invalid"),
    ],
    ids=["offline", "key", "no key", "wrong key"],
)
def test_wandb_key_is_looked_for_before_anything_starts(
    environment: dict[str, str], answer: str, tmp_path: Path
) -> None:
    code = """
from dti_ray.config.telemetry import TelemetryConfig
from dti_ray.errors import ConfigError
from dti_ray.telemetry.trackers import check_trackers
try:
    check_trackers(TelemetryConfig(wandb="clicks"))
    print("good")
except ConfigError as error:
    print(error)
"""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, stdin=subprocess.DEVNULL,
        env={**kept, "HOME": str(tmp_path), "NETRC": str(tmp_path / "none"), **environment},
    )  # fmt: skip
    assert done.stdout.startswith(answer), done.stderr


def test_tracker_whose_package_is_missing_is_refused_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(ConfigError) as caught:
        check_trackers(TelemetryConfig(mlflow="http://mlflow:5000", wandb="clicks"))
    assert [str(fault) for fault in caught.value.faults] == [
        f"telemetry.{name}: got {value!r}, and the package {name} is not installed; pip install 'dti-ray[{name}]'"
        for name, value in (("mlflow", "http://mlflow:5000"), ("wandb", "clicks"))
    ]


def test_run_without_trackers_has_none() -> None:
    check_trackers(TelemetryConfig())
    assert list(open_trackers(make_config(), b"1", TOTAL_TARGETS, {})) == []
