"""Adapters: what they freeze, what they add, and that a checkpoint of them alone brings a model back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dti_ray.config import RunConfig
from dti_ray.data.packing import pack
from dti_ray.data.prompts import TokenTable
from dti_ray.errors import ConfigError
from dti_ray.model.backbone import ClickModel, build_model
from dti_ray.model.batch import PackedBatch, collate
from dti_ray.model.loss import loss_sum
from dti_ray.train.engine import TorchEngine, parameter_groups
from dti_ray.train.state import StateFiles
from tests.architectures import LORA, save_architecture
from tests.builders import make_config, make_sequences, train_spec

CPU = torch.device("cpu")


@pytest.fixture
def table(tmp_path: Path) -> TokenTable:
    return save_architecture(tmp_path, "llama", layers=2)


def _config(folder: Path, *overrides: str) -> RunConfig:
    return make_config(f"model.name_or_path={folder}", *LORA, *overrides)


def _batch(table: TokenTable) -> PackedBatch:
    return collate(list(pack(make_sequences([14, 9]), table, train_spec(make_config(), k=5, n=4))), table)


def _train(engine: TorchEngine, table: TokenTable, steps: int) -> list[float]:
    batch, losses = _batch(table), []
    engine.set_training(True)
    for _ in range(steps):
        loss = loss_sum(engine.forward(batch), batch.labels, batch.is_target) / batch.is_target.sum()
        engine.backward(loss)
        engine.step(3e-3)
        losses.append(float(loss.detach()))
    engine.set_training(False)
    return losses


def test_only_adapters_markers_and_head_are_trained(tmp_path: Path, table: TokenTable) -> None:
    model = build_model(_config(tmp_path), table)
    own = {name for name in model.trained() if "lora_" not in name}
    assert own == {"markers.weight", "head.rows.weight"}
    assert len(model.trained()) - len(own) == 2 * 2 * 7, "A and B of seven linear layers in each of two layers"
    assert len(parameter_groups(model, _config(tmp_path).optim)) == 1, "no group without parameters"


def test_training_moves_adapters_and_leaves_the_base_as_it_was(tmp_path: Path, table: TokenTable) -> None:
    model = build_model(_config(tmp_path), table)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    losses = _train(TorchEngine(model, _config(tmp_path), CPU), table, 6)
    assert losses[-1] < losses[0]
    trained = model.trained()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name]) == (name not in trained), name


def test_fresh_adapters_change_no_logit(tmp_path: Path, table: TokenTable) -> None:
    plain = build_model(make_config(f"model.name_or_path={tmp_path}"), table).eval()
    adapted = build_model(_config(tmp_path), table).eval()
    with torch.no_grad():
        assert torch.equal(plain(_batch(table)), adapted(_batch(table)))


def test_same_seed_draws_the_same_adapters_whatever_the_global_state(tmp_path: Path, table: TokenTable) -> None:
    def adapters(state: int, *overrides: str) -> dict[str, torch.Tensor]:
        torch.manual_seed(state)
        trained = build_model(_config(tmp_path, *overrides), table).trained()
        assert torch.initial_seed() == state, "the caller's random state is left alone"
        return {name: weight for name, weight in trained.items() if "lora_A" in name}

    first, second, other = adapters(1), adapters(2), adapters(1, "train.seed=1")
    assert all(torch.equal(weight, second[name]) for name, weight in first.items())
    assert not any(torch.equal(weight, other[name]) for name, weight in first.items())


def test_targets_are_named_and_an_unknown_one_is_refused(tmp_path: Path, table: TokenTable) -> None:
    model = build_model(_config(tmp_path, "lora.targets=q_proj, v_proj"), table)
    layers = {name.split(".")[-4] for name in model.trained() if "lora_" in name}
    assert layers == {"q_proj", "v_proj"}
    with pytest.raises(ConfigError, match=r"lora.targets: LlamaModel has no linear layer \['c_attn'\]; .*'down_proj'"):
        build_model(_config(tmp_path, "lora.targets=q_proj,c_attn"), table)


@torch.no_grad()
def _logits(model: ClickModel, table: TokenTable) -> torch.Tensor:
    return model.eval()(_batch(table))


def test_checkpoint_holds_what_was_trained_and_brings_back_model_and_optimizer(
    tmp_path: Path, table: TokenTable
) -> None:
    config = _config(tmp_path)
    engine = TorchEngine(build_model(config, table), config, CPU)
    _train(engine, table, 3)
    state = engine.state()
    blob = state.weights()
    paths = [tmp_path / "weights.safetensors", tmp_path / "moments.safetensors"]
    for path, content in zip(paths, (blob, state.moments()), strict=True):
        path.write_bytes(content)
    frozen = sum(p.numel() for p in engine.model.parameters() if not p.requires_grad)
    assert len(blob) < 4 * frozen, "the base is not in it"

    reader = build_model(config, table)
    with StateFiles(paths) as files:
        reader.load_trained(dict(files.weights()))
    assert torch.equal(_logits(reader, table), _logits(engine.model, table))

    resumed = TorchEngine(build_model(config, table), config, CPU)
    with StateFiles(paths) as files:
        resumed.load_state(files)
    assert _train(resumed, table, 2) == _train(engine, table, 2)
