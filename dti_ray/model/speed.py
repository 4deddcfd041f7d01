"""What makes training faster or smaller and changes no result.

Stage: between model and engine, on a known device. In: a decoder and `ModelConfig`. Out: the same decoder,
changed in place.
Invariant: names and values of weights stay as they are, so a checkpoint knows nothing of these switches, and
evaluation needs none of them.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator

import torch
from torch import nn
from transformers import PreTrainedModel

from dti_ray.config import ModelConfig
from dti_ray.errors import ConfigError, Fault


def speed_up(decoder: PreTrainedModel, config: ModelConfig, device: torch.device) -> None:
    """Apply the switches that are on.

    Raises:
        ConfigError: `model.liger` without CUDA, without its package, or for an architecture it does not know.
    """
    if config.liger:
        _use_liger(decoder, device)
    if config.compile:
        for module in _outside_attention(decoder):
            module.compile(dynamic=True)  # the token count changes from batch to batch
    if config.gradient_checkpointing:
        # Transformers 5.2x renames the method; both forms take the keywords of torch's `checkpoint`.
        enable = getattr(decoder, "activation_checkpointing_enable", None) or decoder.gradient_checkpointing_enable
        enable({"use_reentrant": False})


def _outside_attention(decoder: PreTrainedModel) -> Iterator[nn.Module]:
    """Yield norms and MLP of each layer: attention has kernels of its own and a plan that is no tensor."""
    layers = decoder.layers
    assert isinstance(layers, nn.ModuleList)
    for layer in layers:
        yield from (child for name, child in layer.named_children() if name != "self_attn")


def _use_liger(decoder: PreTrainedModel, device: torch.device) -> None:
    if device.type != "cuda":
        raise ConfigError(Fault("model.liger", f"its kernels run on CUDA, not on {device.type}", "false"))
    if importlib.util.find_spec("liger_kernel") is None:
        raise ConfigError(Fault("model.liger", "needs the package liger-kernel", hint="pip install 'dti-ray[liger]'"))
    liger = importlib.import_module("liger_kernel.transformers.monkey_patch")
    known = liger.MODEL_TYPE_TO_APPLY_LIGER_FN
    if decoder.config.model_type not in known:
        raise ConfigError(
            Fault("model.liger", f"knows no {decoder.config.model_type}", f"one of {sorted(known)}, or false")
        )
    # Norms and MLPs alone: attention undoes Transformers' own rotation, and the LM head is not ours.
    liger._apply_liger_kernel_to_instance(decoder, rope=False, cross_entropy=False, fused_linear_cross_entropy=False)
