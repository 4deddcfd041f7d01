"""Low-rank adapters: a few trained matrices beside each frozen one.

Stage: adapters, after the decoder is loaded. In: a decoder and `LoraConfig`. Out: the same decoder, changed in
place: its own weights frozen, adapters trainable and starting at zero effect.
Invariant: modules keep their names and places, so attention finds `layers[i].self_attn.k_proj` as before, and
both copies of a key (contextual and h0's) pass through the adapters.

Source: Hu et al. 2022, W x + (alpha / rank) B A x, by peft.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from dti_ray.config import LoraConfig
from dti_ray.errors import ConfigError, Fault


def add_adapters(decoder: PreTrainedModel, config: LoraConfig, seed: int) -> None:
    """Freeze a decoder and put adapters beside its linear layers, the same for the same seed.

    Args:
        decoder: with its final weights.
        config: `rank` is set.
        seed: draws A; B is zero, so the decoder's answers do not change. Sets torch's random state.

    Raises:
        ConfigError: `lora.targets` names a module that the decoder does not have.
    """
    import peft

    assert config.rank is not None
    _check_targets(decoder, config)
    torch.manual_seed(seed)
    wanted = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=config.targets if isinstance(config.targets, str) else list(config.targets),
    )
    peft.inject_adapter_in_model(wanted, decoder)


def _check_targets(decoder: PreTrainedModel, config: LoraConfig) -> None:
    known = {name.rpartition(".")[2] for name, module in decoder.named_modules() if isinstance(module, nn.Linear)}
    if not isinstance(config.targets, str) and not known.issuperset(config.targets):
        unknown = [name for name in config.targets if name not in known]
        expected = f"all-linear, or some of {sorted(known)}"
        raise ConfigError(Fault("lora.targets", f"{type(decoder).__name__} has no linear layer {unknown}", expected))
