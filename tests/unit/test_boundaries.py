"""What may import what, as a running process sees it; import-linter's contracts read the source only."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]["contracts"]
HEAVY = ("torch", "ray", "transformers", "deepspeed")


@pytest.mark.slow
def test_core_imports_where_ray_and_deepspeed_are_missing() -> None:
    free_of_ray = next(c["source_modules"] for c in CONTRACTS if c["name"] == "The core runs without Ray")
    # The pipeline speaks to Ray Data, but only once it is asked to: a notebook packs with a plain loop.
    names = [name for name in modules() if is_covered(name, [*free_of_ray, "dti_ray.data.pipeline"])]
    assert {"dti_ray.train.loop", "dti_ray.infer.evaluate", "dti_ray.model.backbone"} <= set(names)
    run(
        "import importlib, sys\n"
        "sys.modules['ray'] = sys.modules['deepspeed'] = None\n"
        f"for name in {names}: importlib.import_module(name)"
    )


ONE_STEP = """
import sys
sys.modules["ray"] = sys.modules["deepspeed"] = None
from tests.builders import make_config, make_sequences, make_table, train_spec
from dti_ray.data.packing import pack
from dti_ray.infer.evaluate import score_rows
from dti_ray.model.backbone import build_model
from dti_ray.model.batch import collate
from dti_ray.model.loss import loss_sum
from dti_ray.train.engine import build_engine
import torch
config, table = make_config("train.engine=torch", "cluster.workers=1", "model.layers=2"), make_table()
rows = list(pack(make_sequences([9, 7]), table, train_spec(config)))
engine = build_engine(build_model(config, table), config, 1, torch.device("cpu"))
losses = []
for _ in range(5):
    batch = collate(rows, table)
    loss = loss_sum(engine.forward(batch), batch.labels, batch.is_target)
    engine.backward(loss / 16)
    engine.step(1e-2)
    losses.append(float(loss.detach()))
scored = score_rows(engine.forward, rows, table, engine.device, 2)
print(losses[-1] < losses[0], len(scored.predictions.label))
"""


@pytest.mark.slow
def test_core_trains_and_scores_where_ray_and_deepspeed_are_missing() -> None:
    assert run(ONE_STEP) == "True 16"


def test_command_line_starts_without_heavy_packages() -> None:
    jobs = [f"jobs.{path.stem}" for path in sorted((ROOT / "jobs").glob("[a-z]*.py"))]
    found = run(f"import sys, dti_ray.cli, {', '.join(jobs)}; print([m for m in {HEAVY} if m in sys.modules])")
    assert found == "[]"


def test_every_module_stands_in_a_layer() -> None:
    layers = next(contract["layers"] for contract in CONTRACTS if contract["type"] == "layers")
    named = [name for layer in layers for name in layer.replace(":", "|").replace(" ", "").split("|")]
    assert [name for name in modules() if not is_covered(name, named)] == []


def modules() -> list[str]:
    """Return the dotted names of all modules; packages are named by what is in them."""
    paths = sorted(path.relative_to(ROOT) for path in (ROOT / "dti_ray").rglob("*.py"))
    return [".".join(path.with_suffix("").parts) for path in paths if path.name != "__init__.py"]


def is_covered(module: str, by: list[str]) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in by)


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
