"""What is exported is read by Transformers and peft alone, and answers as the run does."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from dti_ray import export
from dti_ray.config import RunConfig
from dti_ray.data.pipeline import TrainingRows
from dti_ray.errors import InputError, RunError
from dti_ray.export import TOKENS, export_run
from dti_ray.model.backbone import build_model
from dti_ray.storage import Storage
from dti_ray.train.engine import TorchEngine
from dti_ray.train.identity import write_identity
from dti_ray.train.launch import check_launch
from dti_ray.train.loop import Trainer
from dti_ray.train.world import World
from tests.architectures import save_architecture
from tests.builders import make_config, write_dataset

LENGTHS = [30, 12, 25, 40]
CPU = torch.device("cpu")

# 2026-11, peft 0.21 with Transformers 5.23: it asks for a name that was changed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


def trained(root: Path, *overrides: str) -> RunConfig:
    """Train a little in this process, so that every trained weight has moved."""
    write_dataset(root, LENGTHS)
    config = make_config(
        f"storage.root={root}", "data.name=tiny", "train.engine=torch", "cluster.workers=1", "packing.k=4",
        "packing.n=3", "packing.streams=2", "optim.targets_per_step=16", "optim.epochs=1", "optim.lr=0.01",
        "model.layers=2", "prompt.item_template=word3 of the catalogue", *overrides,
    )  # fmt: skip
    job = check_launch(config)
    write_identity(job.config, job.storage, job.tokenizer)
    rows = TrainingRows(job.dataset, job.table, job.config, through_ray=False)
    engine = TorchEngine(build_model(job.config, job.table), job.config, CPU)
    Trainer(job.config, job.storage, rows, engine, World(CPU), lambda *_: None).run()
    return job.config


@pytest.mark.parametrize("head", ["yes_no", "linear"])
def test_run_from_scratch_becomes_a_hugging_face_model(tmp_path: Path, head: str) -> None:
    config = trained(tmp_path, f"model.head={head}")
    done = export_run(config, Storage(str(tmp_path)), str(tmp_path / "out"))
    assert done.parts == ("merged",)
    assert done.largest_difference < 1e-4
    how = json.loads((tmp_path / "out/dti_ray.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out/merged")
    assert tokenizer.convert_tokens_to_ids(list(TOKENS)) == list(how["tokens"].values())
    assert (how["log_odds_bias"] != 0) == (head == "linear")
    assert (tmp_path / "out/manifest.json").exists()


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3"])
@pytest.mark.parametrize("is_tied", [True, False])
def test_adapters_become_a_peft_folder_and_a_merged_model(tmp_path: Path, name: str, is_tied: bool) -> None:
    table = save_architecture(tmp_path / "base", name, tie_word_embeddings=is_tied)
    config = trained(tmp_path, f"model.name_or_path={tmp_path / 'base'}", "lora.rank=4", "lora.alpha=8")
    done = export_run(config, Storage(str(tmp_path)), str(tmp_path / "out"))
    assert done.parts == ("merged", "adapter")
    assert done.largest_difference < 1e-4

    prompt = torch.tensor([[*table.tokens[:9].tolist(), table.vocabulary]])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out/merged").eval()
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    plain = base(prompt.clamp(max=table.vocabulary - 1)).logits
    base.resize_token_embeddings(table.vocabulary + len(TOKENS))
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "out/adapter").eval()
    with torch.no_grad():
        one, other = merged(prompt).logits, adapted(prompt).logits
    torch.testing.assert_close(one[..., -2:], other[..., -2:], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(one[0, -2, :9], plain[0, -2, :9], atol=1e-3), "the adapters do something"
    files = load_file(tmp_path / "out/adapter/adapter_model.safetensors")
    assert sum(weight.numel() for weight in files.values()) < 0.6 * sum(p.numel() for p in base.parameters())


def test_full_fine_tuning_becomes_a_merged_model_alone(tmp_path: Path) -> None:
    save_architecture(tmp_path / "base", "llama")
    config = trained(
        tmp_path, f"model.name_or_path={tmp_path / 'base'}", "debias.strength=0.5", "prompt.prefix=word1 word2"
    )
    done = export_run(config, Storage(str(tmp_path)), str(tmp_path / "out"))
    assert done.parts == ("merged",)


def test_empty_tensor_and_other_logits_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = trained(tmp_path)
    whole = export._write_models

    def spoiled(folder: Path, *rest: object) -> tuple[str, ...]:
        parts = whole(folder, *rest)
        path = folder / "merged/model.safetensors"
        weights = load_file(path)
        weights[spoil] = torch.zeros(0, 4) if is_empty else weights[spoil] + 1
        save_file(weights, path, metadata={"format": "pt"})
        return parts

    monkeypatch.setattr(export, "_write_models", spoiled)
    spoil, is_empty = "model.norm.weight", True
    with pytest.raises(RunError, match=r"1 tensors are empty, model\.norm\.weight first"):
        export_run(config, Storage(str(tmp_path)), str(tmp_path / "out"))
    spoil, is_empty = "model.layers.0.mlp.up_proj.weight", False
    with pytest.raises(RunError, match=r"export: merged: gives log-odds that differ"):
        export_run(config, Storage(str(tmp_path)), str(tmp_path / "out"))
    assert not (tmp_path / "out/merged").exists()


def test_run_without_a_state_says_so(tmp_path: Path) -> None:
    write_dataset(tmp_path, LENGTHS)
    config = make_config(f"storage.root={tmp_path}", "data.name=tiny")
    with pytest.raises(InputError, match="holds no usable state"):
        export_run(config, Storage(str(tmp_path)), str(tmp_path / "out"))
