"""Both engines minimise the same number: DeepSpeed under every ZeRO stage, on one worker or two."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dti_ray.config import RunConfig
from dti_ray.data.packing import PackedRow, pack
from dti_ray.model.backbone import build_model
from dti_ray.model.batch import collate
from dti_ray.model.loss import loss_sum
from dti_ray.train.engine import Engine, TorchEngine, build_engine
from tests.builders import make_config, make_sequences, make_table, train_spec

STEPS = 4
LR = 3e-3
TOLERANCE = 2e-5  # relative, after STEPS updates in fp32: sums are added in another order

pytestmark = [pytest.mark.integration, pytest.mark.slow]


def _rows() -> list[PackedRow]:
    rows = list(pack(make_sequences([30, 30, 30, 30]), make_table(), train_spec(make_config("packing.k=5")), rows=8))
    assert len(rows) == 8
    return rows


def _config(stage: int, precision: str = "fp32") -> RunConfig:
    return make_config("model.layers=2", f"train.zero_stage={stage}", f"train.precision={precision}")


def train_some(engine: Engine, rank: int, world: int, passes: int) -> list[float]:
    """Train the same rows STEPS times, dealt to ranks and passes; return this rank's summed losses."""
    rows, table = _rows(), make_table()
    mine = rows[rank * len(rows) // world : (rank + 1) * len(rows) // world]
    targets = sum(row.targets for row in rows)
    size = len(mine) // passes
    losses = []
    for _ in range(STEPS):
        total = 0.0
        for i in range(passes):
            batch = collate(mine[i * size : (i + 1) * size], table)
            loss = loss_sum(engine.forward(batch), batch.labels, batch.is_target)
            engine.backward(loss / targets)
            total += float(loss.detach())
        engine.step(LR)
        losses.append(total)
    return losses


def deepspeed_worker(rank: int, world: int, folder: str) -> None:
    """One rank: all stages one after the other, then a save and a load into a fresh engine."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world, init_method=f"file://{folder}/rendezvous")
    device, results = torch.device("cpu"), {}
    for stage in (0, 1, 2, 3):
        for passes in (1, 2):
            config = _config(stage)
            engine = build_engine(build_model(config, make_table()), config, passes, device)
            results[f"{stage} {passes}"] = train_some(engine, rank, world, passes)
        saved = Path(folder) / f"state-{stage}"
        engine.save(saved)
        torch.distributed.barrier()
        fresh = build_engine(build_model(config, make_table()), config, 2, device)
        fresh.load(saved)
        results[f"{stage} goes on"] = train_some(engine, rank, world, 2)
        results[f"{stage} resumed"] = train_some(fresh, rank, world, 2)
        weights = fresh.weights()
        assert all(weight.numel() > 0 for weight in weights.values())
    config = _config(1, "bf16")
    engine = build_engine(build_model(config, make_table()), config, 1, device)
    results["bf16"] = train_some(engine, rank, world, 1)
    Path(folder, f"rank-{rank}.json").write_text(json.dumps(results))


def _run_workers(world: int, folder: Path) -> dict[str, list[float]]:
    """Run the ranks as processes of their own; return losses summed over ranks."""
    code = "import sys; from tests.integration.test_engines import deepspeed_worker as w; "
    code += "w(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])"
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank), str(world), str(folder)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(world)
    ]  # fmt: skip
    outputs = [rank.communicate(timeout=500)[0] for rank in ranks]
    assert all(rank.returncode == 0 for rank in ranks), "\n".join(outputs)
    results = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(world)]
    return {key: [sum(parts) for parts in zip(*(r[key] for r in results), strict=True)] for key in results[0]}


def test_law_8_losses_are_equal_for_every_stage_worker_count_and_accumulation(tmp_path: Path) -> None:
    config = _config(0)
    engine = TorchEngine(build_model(config, make_table()), config, torch.device("cpu"))
    expected = train_some(engine, 0, 1, 1)
    assert expected[-1] < 0.999 * expected[0], "something was learnt"
    for world in (1, 2):
        folder = tmp_path / str(world)
        folder.mkdir()
        found = _run_workers(world, folder)
        for stage in (0, 1, 2, 3):
            for passes in (1, 2):
                assert found[f"{stage} {passes}"] == pytest.approx(expected, rel=TOLERANCE)
            assert found[f"{stage} resumed"] == pytest.approx(found[f"{stage} goes on"], rel=TOLERANCE)
        assert found["bf16"] == pytest.approx(expected, rel=0.02)
