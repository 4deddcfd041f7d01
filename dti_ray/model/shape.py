"""The shape of a model without its weights, and shallow copies of it: what an estimate needs.

Stage: beside the backbone. In: a `RunConfig` and the tokenised catalogue. Out: a `ClickModel` on PyTorch's meta
device, which has sizes and no storage; or one with few layers and random weights.
"""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from dti_ray.config import RunConfig
from dti_ray.data.prompts import TokenTable
from dti_ray.model.attention import NAME, register
from dti_ray.model.backbone import ClickModel, check_text
from dti_ray.model.decoder import MARKERS, load_decoder_config
from dti_ray.model.lora import add_adapters


def build_shape(config: RunConfig, table: TokenTable) -> ClickModel:
    """Return the run's model with all its layers and no storage.

    Raises:
        ConfigError: the decoder's configuration cannot be loaded, or its architecture does not fit the run.
    """
    with torch.device("meta"):
        return _build(config, table, load_decoder_config(config.model, table))


def build_shallow(config: RunConfig, table: TokenTable, layers: int) -> ClickModel:
    """Return a copy with fewer layers and random weights, on the CPU.

    Raises:
        ConfigError: as `build_shape`.
    """
    decoder = load_decoder_config(config.model, table)
    decoder.num_hidden_layers = layers
    if (kinds := getattr(decoder, "layer_types", None)) is not None:
        decoder.layer_types = kinds[:layers]
    with torch.random.fork_rng(devices=[]):
        return _build(config, table, decoder)


def _build(config: RunConfig, table: TokenTable, decoder_config: PretrainedConfig) -> ClickModel:
    register()
    whole = AutoModelForCausalLM.from_config(decoder_config, attn_implementation=NAME, dtype=torch.float32)
    check_text(config, whole.get_decoder())
    rows, markers = (torch.zeros(count, decoder_config.hidden_size) for count in (2, MARKERS))
    model = ClickModel(whole.get_decoder(), rows, markers, table.vocabulary, config)
    if config.lora.rank is not None:
        add_adapters(model.decoder, config.lora, seed=0)
    return model
