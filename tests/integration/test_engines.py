"""Both engines minimise the same number: DeepSpeed under every ZeRO stage, on one worker or two."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load as load_weights
from safetensors.torch import save as save_weights

from dti_ray.config import RunConfig
from dti_ray.data.packing import PackedRow, pack
from dti_ray.model.backbone import build_model
from dti_ray.model.batch import collate
from dti_ray.model.loss import loss_sum
from dti_ray.train import engine as engine_module
from dti_ray.train.engine import Engine, TorchEngine, build_engine, deepspeed_config
from dti_ray.train.state import StateFiles
from tests.builders import make_config, make_sequences, make_table, train_spec

STEPS = 4
LR = 3e-3
ADAPTER_LR = 3e-4  # the frozen base is random
TOLERANCE = 2e-5  # relative, after STEPS updates in fp32: sums are added in another order

pytestmark = [pytest.mark.integration, pytest.mark.slow]


def _rows() -> list[PackedRow]:
    rows = list(pack(make_sequences([30, 30, 30, 30]), make_table(), train_spec(make_config("packing.k=5")), rows=8))
    assert len(rows) == 8
    return rows


def _config(stage: int, precision: str = "fp32") -> RunConfig:
    engine = [f"train.zero_stage={stage}", f"train.precision={precision}"]
    return make_config("model.layers=2", "optim.text_weight=0.1", *engine)


def _adapter_config(*overrides: str) -> RunConfig:
    wide = ["model.hidden_size=128", "model.intermediate_size=512", "model.layers=2", "optim.text_weight=0.1"]
    return make_config(*wide, "lora.rank=8", "train.zero_stage=3", *overrides)


def train_some(engine: Engine, rank: int, world: int, passes: int, lr: float = LR) -> list[float]:
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
            log_odds, text_loss = engine.forward_training(batch)
            loss = loss_sum(log_odds, batch.labels, batch.is_target) + text_loss
            engine.backward(loss / targets)
            total += float(loss.detach())
        engine.step(lr)
        losses.append(total)
    return losses


def save_share(engine: Engine, folder: Path, rank: int) -> Path:
    """Write this rank's share of the state; return the folder once all ranks have."""
    folder.mkdir(exist_ok=True)
    state = engine.state()
    if state.pieces:
        (folder / f"weights-{rank}").write_bytes(state.weights())
        (folder / f"moments-{rank}").write_bytes(state.moments())
    torch.distributed.barrier()
    return folder


def _begin(rank: int, world: int, folder: str) -> None:
    """Join the others; ZeRO 3 shall spread the small weights of tests too, as it does those of a real model."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world, init_method=f"file://{folder}/rendezvous")

    def spreading(config: RunConfig, passes: int) -> dict[str, object]:
        zero = {"stage": config.train.zero_stage, "stage3_param_persistence_threshold": 0}
        return {**deepspeed_config(config, passes), "zero_optimization": zero}

    engine_module.deepspeed_config = spreading


def deepspeed_worker(rank: int, world: int, folder: str) -> None:
    """One rank: all stages one after the other, then a save and a load into a fresh engine."""
    _begin(rank, world, folder)
    device, results = torch.device("cpu"), {}
    for stage in (0, 1, 2, 3):
        for passes in (1, 4, 2):
            config = _config(stage)
            engine = build_engine(build_model(config, make_table()), config, passes, device)
            results[f"{stage} {passes}"] = train_some(engine, rank, world, passes)
        saved = save_share(engine, Path(folder) / f"state-{stage}", rank)
        fresh = build_engine(build_model(config, make_table()), config, 2, device)
        with StateFiles(saved.iterdir()) as files:
            fresh.load_state(files)
        results[f"{stage} goes on"] = train_some(engine, rank, world, 2)
        results[f"{stage} resumed"] = train_some(fresh, rank, world, 2)
    config = _config(1, "bf16")
    engine = build_engine(build_model(config, make_table()), config, 1, device)
    results["bf16"] = train_some(engine, rank, world, 1)
    Path(folder, f"rank-{rank}.json").write_text(json.dumps(results))


def adapter_worker(rank: int, world: int, folder: str) -> None:
    """One rank: adapters under ZeRO 3 with layers computed again, under 1 and 2, then saved and loaded under 3."""
    _begin(rank, world, folder)
    device, results = torch.device("cpu"), {}
    config = _adapter_config("model.gradient_checkpointing=true")
    engine = build_engine(build_model(config, make_table()), config, 1, device)
    results["computed again"] = train_some(engine, rank, world, 1, ADAPTER_LR)
    for stage in (1, 2):
        config = _adapter_config(f"train.zero_stage={stage}")
        engine = build_engine(build_model(config, make_table()), config, 2, device)
        results[f"stage {stage}"] = train_some(engine, rank, world, 2, ADAPTER_LR)
    config = _adapter_config()
    engine = build_engine(build_model(config, make_table()), config, 4, device)
    results["4 passes"] = train_some(engine, rank, world, 4, ADAPTER_LR)
    saved = save_share(engine, Path(folder) / "state", rank)
    results["bytes"] = [float(sum(path.stat().st_size for path in saved.iterdir()) / world)]
    fresh = build_engine(build_model(config, make_table()), config, 4, device)
    with StateFiles(saved.iterdir()) as files:
        fresh.load_state(files)
        weights = dict(files.weights())
    assert weights.keys() == build_model(config, make_table()).trained().keys()
    again = save_share(fresh, Path(folder) / "again", rank)
    with StateFiles(again.iterdir()) as files:
        for name, weight in files.weights():
            assert weight.numel() > 0, name
            assert weight.abs().max() > 0, name
            assert torch.equal(weight, weights[name]), name
    results["goes on"] = train_some(engine, rank, world, 4, ADAPTER_LR)
    results["resumed"] = train_some(fresh, rank, world, 4, ADAPTER_LR)
    if rank == 0:
        Path(folder, "weights.safetensors").write_bytes(save_weights(weights))
    Path(folder, f"rank-{rank}.json").write_text(json.dumps(results))


def changing_worker(rank: int, world: int, folder: str) -> None:
    """One rank of one phase: go on from the other phase's files, train, write files; every stage, full and adapters."""
    _begin(rank, world, folder)
    device, results = torch.device("cpu"), {}
    here = Path(folder)
    for name, config in changing_configs().items():
        engine = build_engine(build_model(config, make_table()), config, 2, device)
        if (here / "from" / name).exists():
            with StateFiles((here / "from" / name).iterdir()) as files:
                engine.load_state(files)
        results[name] = train_some(engine, rank, world, 2)
        save_share(engine, here / name, rank)
        if not (here / "from").exists():
            results[f"{name} whole"] = train_some(engine, rank, world, 2) + train_some(engine, rank, world, 2)
    (here / f"rank-{rank}.json").write_text(json.dumps(results))


def changing_configs() -> dict[str, RunConfig]:
    stages = {f"full {stage}": _config(stage) for stage in (0, 1, 2, 3)}
    adapters = {f"adapters {stage}": _adapter_config(f"train.zero_stage={stage}") for stage in (2, 3)}
    return {
        **stages,
        **adapters,
        "bf16 0": _config(0, "bf16"),
        "bf16 1": _config(1, "bf16"),
        "bf16 3": _config(3, "bf16"),
    }


def _run_workers(world: int, folder: Path, worker: str = "deepspeed_worker") -> dict[str, list[float]]:
    """Run the ranks as processes of their own; return losses summed over ranks."""
    code = f"import sys; from tests.integration.test_engines import {worker} as w; "
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
            for passes in (1, 2, 4):
                assert found[f"{stage} {passes}"] == pytest.approx(expected, rel=TOLERANCE)
            assert found[f"{stage} resumed"] == pytest.approx(found[f"{stage} goes on"], rel=TOLERANCE)
        assert found["bf16"] == pytest.approx(expected, rel=0.02)


def test_law_8_adapters_under_zero_give_equal_losses_and_a_checkpoint_of_themselves_alone(tmp_path: Path) -> None:
    config = _adapter_config()
    model = build_model(config, make_table())
    engine = TorchEngine(model, config, torch.device("cpu"))
    expected = train_some(engine, 0, 1, 1, ADAPTER_LR)
    assert expected[-1] < 0.999 * expected[0], "something was learnt"
    found = _run_workers(2, tmp_path, "adapter_worker")
    for key in ("stage 1", "stage 2", "4 passes", "computed again"):
        assert found[key] == pytest.approx(expected, rel=TOLERANCE)
    assert found["resumed"] == pytest.approx(found["goes on"], rel=TOLERANCE)
    trained_bytes = 4 * sum(p.numel() for p in model.trained().values())
    assert found["bytes"][0] < 1.2 * 3 * trained_bytes, "adapters and two moments, without the frozen base"

    reader = build_model(config, make_table())
    reader.load_trained(load_weights((tmp_path / "weights.safetensors").read_bytes()))
    again = TorchEngine(reader, config, torch.device("cpu"))
    assert train_some(again, 0, 1, 1, ADAPTER_LR)[0] == pytest.approx(
        train_some(engine, 0, 1, 1, ADAPTER_LR)[0], rel=TOLERANCE
    )


def test_losses_are_equal_after_two_workers_became_one_and_two_again(tmp_path: Path) -> None:
    found, before = [], None
    for phase, world in enumerate((2, 1, 2)):
        folder = tmp_path / str(phase)
        folder.mkdir()
        if before is not None:
            (folder / "from").symlink_to(before)
        found.append(_run_workers(world, folder, "changing_worker"))
        before = folder
    for name in changing_configs():
        whole = found[0][f"{name} whole"]
        assert found[1][name] + found[2][name] == pytest.approx(whole, rel=0.01 if "bf16" in name else 1e-5), name
