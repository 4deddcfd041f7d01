"""While a run trains, its node's endpoint shows every series, and its workers' records say where they are from."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.samples import Sample

from dti_ray.errors import StoppedError
from dti_ray.telemetry import Line
from dti_ray.telemetry.series import SERIES
from dti_ray.train.launch import check_launch, launch
from tests.builders import make_config, write_dataset
from tests.ray_nodes import samples

pytestmark = [
    pytest.mark.cluster, pytest.mark.long, pytest.mark.integration, pytest.mark.slow,
    pytest.mark.usefixtures("ray_cluster"),
]  # fmt: skip

PATIENCE_S = 120  # Ray's processes report every 10 s


def test_scrape_during_a_run_shows_every_declared_series_with_its_tags(tmp_path: Path) -> None:
    write_dataset(tmp_path, [30, 12, 25, 40])
    config = make_config(
        f"storage.root={tmp_path}", "data.name=tiny", "train.run=scraped", "train.engine=torch", "cluster.workers=1",
        "packing.k=4", "packing.n=3", "packing.streams=2", "optim.targets_per_step=16", "optim.epochs=2000",
        "model.layers=1", "train.log_targets=64", "eval.every_targets=256", "checkpoint.every_steps=20",
        "train.peak_tflops=1", "telemetry.group=night", "telemetry.log_format=json",
    )  # fmt: skip
    job, found, is_seen = check_launch(config), dict[str, Sample](), threading.Event()
    expected = {series.exported for series in SERIES}

    def look() -> None:
        end = time.monotonic() + PATIENCE_S
        while expected - found.keys() and time.monotonic() < end:
            time.sleep(1)
            found.update({sample.name: sample for sample in samples() if sample.labels.get("run") == "scraped"})
        is_seen.set()

    looker = threading.Thread(target=look)

    def on_line(_kind: str, _line: Line) -> bool:
        if looker.ident is None:
            looker.start()
        return is_seen.is_set()

    with pytest.raises(StoppedError):
        launch(job, on_line)
    looker.join()
    assert expected - found.keys() == set()
    tags = {(sample.labels["dataset"], sample.labels["group"]) for sample in found.values()}
    assert tags == {("tiny", "night")}
    assert found["ray_dti_targets_planned"].value == job.total_targets
    assert 0 < found["ray_dti_steps"].value * 16 <= found["ray_dti_targets"].value * 2
    assert (found["ray_dti_restarts"].value, found["ray_dti_quarantined_rows"].value) == (0, 0)
    said = [record for record in records() if record.get("run") == "scraped"]
    assert {record["rank"] for record in said} == {0}
    steps = [record["step"] for record in said if "metrics" in record]
    assert steps == [record["metrics"]["step"] for record in said if "metrics" in record]
    assert steps == sorted(steps)


def records() -> Iterator[dict[str, object]]:
    """Yield the JSON records that Ray's processes have written to stderr."""
    import ray

    node = ray._private.worker._global_node
    assert node is not None
    for file in Path(node.get_logs_dir_path()).glob("worker-*.err"):
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("{"):
                yield json.loads(line)
