"""What goes wrong in a packing task ends the run with the fault itself, and leaves its trace with the run."""

from __future__ import annotations

from pathlib import Path

import pytest

from dti_ray.errors import StorageError
from dti_ray.telemetry import Line
from dti_ray.train.launch import check_launch, launch
from tests.builders import damage, make_config, write_dataset

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


def test_shard_damaged_while_training_is_named_and_the_trace_of_the_packing_task_is_kept(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path, [30, 12, 25, 40])
    config = make_config(
        f"storage.root={tmp_path}", "data.name=tiny", "train.engine=torch", "cluster.workers=1", "packing.k=4",
        "packing.n=3", "packing.streams=2", "optim.targets_per_step=16", "model.layers=1",
        "packing.mix_segments=1", "optim.epochs=500", "train.log_targets=16",
    )  # fmt: skip
    lines: list[Line] = []

    def damage_at_the_first_line(_kind: str, line: Line) -> None:
        if not lines:
            damage(dataset)
        lines.append(line)

    with pytest.raises(StorageError, match=r"part-00000\.parquet"):
        launch(check_launch(config), damage_at_the_first_line)
    assert lines
    trace = dataset.storage.read("runs/run/failure.txt").decode()
    assert "in pack_block" in trace
    assert "in read_segment" in trace
    assert "part-00000.parquet" in trace
