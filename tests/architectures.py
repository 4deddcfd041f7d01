"""Tiny random models of the architectures that we promise, written as users have them: a folder."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
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

from dti_ray.config import RunConfig
from dti_ray.data.prompts import TokenTable, catalogue_tokenizer, token_table
from dti_ray.model.backbone import ClickModel, build_model
from dti_ray.model.decoder import load_tokenizer
from tests.builders import ITEMS, LARGE_STD, make_config

SHAPE = {
    "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "initializer_range": LARGE_STD,
}  # fmt: skip
GEMMA_LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]  # two kinds of rotation
ARCHITECTURES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM),
}
LORA = ["lora.rank=4", "lora.alpha=4"]


def save_architecture(folder: Path, name: str, layers: int = 3, **changes: object) -> TokenTable:
    """Write a model and its tokenizer; return the catalogue's tokens."""
    config = make_config().prompt
    texts = [f"word{i} word{i % 7} of the catalogue" for i in range(ITEMS)]
    tokenizer = catalogue_tokenizer(texts, config)
    tokenizer.eos_token = "the"
    torch.manual_seed(0)
    kind, model = ARCHITECTURES[name]
    if name == "gemma3":
        changes = {"layer_types": GEMMA_LAYERS[:layers], **changes}
    built: PretrainedConfig = kind(vocab_size=len(tokenizer), num_hidden_layers=layers, **SHAPE, **changes)
    model(built).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return token_table(texts, load_tokenizer(str(folder)), config)


def load_architecture(config: RunConfig, table: TokenTable) -> ClickModel:
    """Build the model that a folder holds; adapters, if there are any, have an effect."""
    model = build_model(config, table).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=LARGE_STD, generator=generator)
    return model
