"""The whole line through every real part: get, prepare, train, evaluate, report; on a folder and on S3."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.seaweed import Seaweed

SMALL = [
    "model.layers=1", "model.hidden_size=32", "model.heads=2", "model.kv_heads=2", "model.intermediate_size=32",
    "optim.targets_per_step=1024", "optim.epochs=1", "eval.bootstrap=100", "eval.max_valid_targets=1000",
    "train.log_targets=20000",
]  # fmt: skip
LINE = {
    "run", "checkpoint", "report", "protocol", "auc", "auc_low", "auc_high", "log_loss", "f1", "gauc", "ne",
    "calibration", "targets", "tokens", "targets_per_s", "seconds",
}  # fmt: skip

pytestmark = [pytest.mark.integration, pytest.mark.slow]


def run_cli(*arguments: str, env: dict[str, str] | None = None, timeout_s: int = 500) -> dict[str, object]:
    """Run the command line in its own process, as a user does, and return its last line."""
    command = [sys.executable, "-m", "dti_ray.cli", *arguments, "--json"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=timeout_s, check=False, env={**os.environ, **(env or {})}
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_demo_runs_the_whole_line_below_one_folder_and_is_idempotent(tmp_path: Path) -> None:
    root = str(tmp_path)
    first = run_cli("demo", "--root", root, *SMALL)
    assert first.keys() >= LINE
    assert first["protocol"] == "sliding"
    assert first["targets"] == 79_619
    assert 0.6 < first["auc_low"] < first["auc"] < first["auc_high"] < 0.9
    run = tmp_path / "runs" / "demo"
    for name in ("config.yaml", "meta.json", "metrics/train.jsonl", "metrics/valid.jsonl", "report/index.html"):
        assert (run / name).stat().st_size > 0
    assert list((run / "tensorboard").iterdir())
    checkpoints = list((run / "checkpoints").iterdir())
    assert 1 <= len(checkpoints) <= 3, "the two newest and the best"
    again = run_cli("demo", "--root", root, *SMALL)
    assert {name: again[name] for name in LINE - {"seconds", "targets_per_s"}} == {
        name: first[name] for name in LINE - {"seconds", "targets_per_s"}
    }
    evaluated = run_cli("evaluate", "demo", "--split", "valid", "--root", root)
    assert evaluated["targets"] == 9_942
    exported = run_cli("export", "demo", "--to", f"{root}/out", "--root", root)
    assert exported["parts"] == ["merged"]
    assert (tmp_path / "out/merged/model.safetensors").stat().st_size > 0


def test_the_same_line_runs_on_a_real_s3_server(seaweed: Seaweed) -> None:
    result = run_cli("demo", "--root", "s3://dti/somewhere", *SMALL, env=seaweed.environment)
    assert result.keys() >= LINE
    assert str(result["report"]).startswith("s3://dti/somewhere/runs/demo/report/")
