"""Any rotary decoder of Hugging Face loads from a folder, unpatched, and starts as the model that it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PretrainedConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from dti_ray.data.packing import pack
from dti_ray.data.prompts import TokenTable, catalogue_tokenizer, token_table
from dti_ray.errors import ConfigError
from dti_ray.model.backbone import build_model, load_tokenizer
from dti_ray.model.batch import collate
from tests.builders import (
    ITEMS,
    largest_difference,
    make_config,
    make_sequences,
    score_packed,
    train_spec,
)

SHAPE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.15,
}  # fmt: skip
ARCHITECTURES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM),
}
LENGTHS = [9, 14]
TOLERANCE = 1e-4


def _save(folder: Path, name: str) -> TokenTable:
    """Write a tiny random model and its tokenizer as users have them; return the catalogue's tokens."""
    config = make_config().prompt
    texts = [f"word{i} word{i % 7} of the catalogue" for i in range(ITEMS)]
    tokenizer = catalogue_tokenizer(texts, config)
    tokenizer.eos_token = "the"
    torch.manual_seed(0)
    kind, model = ARCHITECTURES[name]
    built: PretrainedConfig = kind(vocab_size=len(tokenizer), **SHAPE)
    model(built).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return token_table(texts, load_tokenizer(str(folder)), config)


@torch.no_grad()
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_law_0_holds_for_every_architecture_loaded_from_a_folder(tmp_path: Path, name: str) -> None:
    table = _save(tmp_path, name)
    config = make_config(f"model.name_or_path={tmp_path}", "packing.k=1")
    ours = build_model(config, table).eval()
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa").eval()
    summary, no, yes = table.marker_ids
    real_ids = {table.vocabulary: summary, table.vocabulary + 1: no, table.vocabulary + 2: yes}
    rows = list(pack(make_sequences(LENGTHS), table, train_spec(config, n=5, row_tokens=200)))
    for row in rows:
        batch = collate([row], table)
        found = ours(batch)[0]
        for target, prompt in enumerate(row.prompt[row.after]):
            tokens = [*row.tokens[row.prompt == prompt].tolist(), table.vocabulary]
            logits = whole(torch.tensor([[real_ids.get(token, token) for token in tokens]])).logits[0, -1]
            assert abs(float(found[target] - (logits[yes] - logits[no]))) < TOLERANCE


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("backend", ["dense", "banded"])
def test_law_4_holds_for_every_architecture(tmp_path: Path, name: str, backend: str) -> None:
    table = _save(tmp_path, name)
    config = make_config(
        f"model.name_or_path={tmp_path}", "packing.window=interactions", "packing.n=4", "reset.mode=constant",
        "reset.alpha=1.0", f"model.attention={backend}",
    )  # fmt: skip
    model, sequences = build_model(config, table).eval(), make_sequences(LENGTHS)
    alone = score_packed(model, sequences, table, train_spec(config, k=1))
    packed = score_packed(model, sequences, table, train_spec(config, k=8))
    assert largest_difference(packed, alone) < TOLERANCE


def test_decoder_without_rotary_positions_is_refused_by_name(tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    table = TokenTable(*(torch.zeros(2, dtype=torch.int32).numpy() for _ in range(3)), 40, (None, 0, 1))
    with pytest.raises(ConfigError, match=r"GPT2Model.*expected a rotary decoder"):
        build_model(make_config(f"model.name_or_path={tmp_path}"), table)


def test_linear_head_reads_one_number_and_is_trained() -> None:
    table = TokenTable(*(torch.zeros(2, dtype=torch.int32).numpy() for _ in range(3)), 40, (None, 0, 1))
    model = build_model(make_config("model.head=linear"), table)
    assert model.head.rows.out_features == 1
    assert {"markers.weight", "head.rows.weight", "head.rows.bias"} <= {n for n, _ in model.named_parameters()}


def test_same_seed_builds_the_same_weights_whatever_the_global_state() -> None:
    table = TokenTable(*(torch.zeros(2, dtype=torch.int32).numpy() for _ in range(3)), 40, (None, 0, 1))
    torch.manual_seed(1)
    first = build_model(make_config(), table)
    torch.manual_seed(2)
    second = build_model(make_config(), table)
    other = build_model(make_config("train.seed=1"), table)
    for name, weight in first.named_parameters():
        assert torch.equal(weight, dict(second.named_parameters())[name])
    assert not torch.equal(first.markers.weight, other.markers.weight)
