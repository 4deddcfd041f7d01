"""A real language model learns; runs where docs/models.md's recipe was followed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from dti_ray.config import load_config
from dti_ray.data.packing import pack
from dti_ray.data.prompts import token_table
from dti_ray.model.backbone import build_model
from dti_ray.model.batch import collate
from dti_ray.model.decoder import load_tokenizer
from dti_ray.model.loss import loss_sum
from dti_ray.train.engine import build_engine
from tests.builders import ITEMS, make_sequences, train_spec

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "outputs" / "models" / "smollm2"

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.skipif(not list(FOLDER.glob("*.gguf")), reason=f"no GGUF file in {FOLDER}"),
    pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="the extra `gguf` is not installed"),
]


@pytest.mark.parametrize("name", ["smollm2_lora", "smollm2_full"])
def test_smollm2_reads_its_labels_and_its_loss_falls(name: str) -> None:
    one_process = [f"model.name_or_path={FOLDER}", "train.engine=torch", "cluster.workers=1", "packing.k=5"]
    config = load_config([ROOT / "configs" / f"{name}.yaml"], one_process)
    texts = [f"\nFilm number {i}:" for i in range(ITEMS)]
    table = token_table(texts, load_tokenizer(str(FOLDER), config.model.gguf_file), config.prompt)
    rows = list(pack(make_sequences([12]), table, train_spec(config, n=5, row_tokens=256)))[:1]
    engine = build_engine(build_model(config, table), config, 1, torch.device("cpu"))
    batch, losses = collate(rows, table), []
    for _ in range(4):
        loss = loss_sum(engine.forward(batch), batch.labels, batch.is_target) / rows[0].targets
        engine.backward(loss)
        engine.step(config.optim.lr)
        losses.append(float(loss.detach()))
    assert losses[0] < 3.0, "untrained, it is no worse than a confident guess"
    assert losses[-1] < losses[0]
