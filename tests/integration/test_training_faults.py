"""What goes wrong in a packing task ends the run with the fault itself, and leaves its trace with the run."""

from __future__ import annotations

from pathlib import Path

import pytest

from dti_ray.errors import StorageError
from dti_ray.train.launch import check_launch, launch
from tests.builders import damage, make_config, write_dataset

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


def test_shard_damaged_after_the_launch_is_named_and_the_trace_of_the_task_is_kept(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path, [30, 12, 25, 40])
    config = make_config(
        f"storage.root={tmp_path}", "data.name=tiny", "train.engine=torch", "cluster.workers=1", "packing.k=4",
        "packing.n=3", "packing.streams=2", "optim.targets_per_step=16", "model.layers=1",
    )  # fmt: skip
    job = check_launch(config)
    damage(dataset)
    with pytest.raises(StorageError, match=r"part-00000\.parquet"):
        launch(job, lambda _kind, _line: None)
    trace = dataset.storage.read("runs/run/failure.txt").decode()
    assert "in read_segment" in trace
    assert "part-00000.parquet" in trace
