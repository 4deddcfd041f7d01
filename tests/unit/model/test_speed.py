"""The switches that save time or memory change no result."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest
import torch

from dti_ray.data.packing import pack
from dti_ray.data.prompts import TokenTable
from dti_ray.errors import ConfigError
from dti_ray.model.backbone import ClickModel
from dti_ray.model.batch import collate
from dti_ray.model.loss import loss_sum
from dti_ray.model.speed import speed_up
from tests.architectures import LORA, load_architecture, save_architecture
from tests.builders import make_config, make_model, make_sequences, make_table, train_spec

CPU = torch.device("cpu")


def _loss_and_gradients(model: ClickModel, table: TokenTable) -> tuple[float, dict[str, torch.Tensor]]:
    """Train one pass with dropout; the seed makes two calls draw the same."""
    batch = collate(list(pack(make_sequences([14, 9]), table, train_spec(make_config(), k=5, n=4))), table)
    model.train().zero_grad()
    torch.manual_seed(0)
    loss = loss_sum(model(batch), batch.labels, batch.is_target)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.trained().items() if p.grad is not None}
    return float(loss.detach()), gradients


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize(
    "method",
    [
        ["reset.mode=distance", "reset.alpha=0.7", "debias.strength=0.3", "debias.rotary=drop", *LORA],
        ["reset.mode=uniform", "model.dropout=0.2"],
    ],
    ids=["two copies, lora", "uniform"],
)
def test_gradient_checkpointing_gives_the_same_loss_and_gradients(tmp_path: Path, name: str, method: list[str]) -> None:
    table = save_architecture(tmp_path, name)
    config = make_config(f"model.name_or_path={tmp_path}", "packing.window=interactions", *method)
    model = load_architecture(config, table)
    runs: list[str] = []
    for i, layer in enumerate(model.decoder.layers):
        layer.mlp.register_forward_pre_hook(lambda *_, i=i: runs.append(str(i)))
    loss, gradients = _loss_and_gradients(model, table)
    assert "".join(runs) == "012"
    speed_up(model.decoder, make_config("model.gradient_checkpointing=true").model, CPU)
    runs.clear()
    again, recomputed = _loss_and_gradients(model, table)
    assert sorted(runs) == sorted("012012"), "each layer runs twice"
    assert again == loss
    assert gradients.keys() == recomputed.keys()
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())
    for key, gradient in gradients.items():
        torch.testing.assert_close(recomputed[key], gradient, atol=1e-6, rtol=1e-5)


@pytest.mark.slow
# 2026-11, torch 2.13: the compiler itself uses what torch deprecates, and looks at gradients of what is no leaf.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler")
def test_compiled_layers_give_the_same_loss_gradients_and_names() -> None:
    table = make_table()
    model = make_model(make_config("model.layers=2", *LORA), table)
    names = list(model.state_dict())
    loss, gradients = _loss_and_gradients(model, table)
    speed_up(model.decoder, make_config("model.compile=true").model, CPU)
    again, compiled = _loss_and_gradients(model, table)
    assert list(model.state_dict()) == names
    assert again == pytest.approx(loss, rel=1e-5)
    for key, gradient in gradients.items():
        torch.testing.assert_close(compiled[key], gradient, atol=1e-4, rtol=1e-4)


def test_liger_is_refused_where_it_cannot_run() -> None:
    decoder = make_model(make_config("model.layers=1"), make_table()).decoder
    wanted = make_config("model.liger=true").model
    with pytest.raises(ConfigError, match=r"model.liger: its kernels run on CUDA, not on cpu; expected false"):
        speed_up(decoder, wanted, CPU)
    if importlib.util.find_spec("liger_kernel") is None:
        with pytest.raises(ConfigError, match=r"needs the package liger-kernel; pip install 'dti-ray\[liger\]'"):
            speed_up(decoder, wanted, torch.device("cuda"))
