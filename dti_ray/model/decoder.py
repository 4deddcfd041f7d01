"""From a name, or from nothing, to a Hugging Face decoder and the rows that our markers start from.

Stage: decoder. In: a `RunConfig` and the tokenised catalogue. Out: `Parts`.
Invariant: the decoder computes what its authors trained, with one exception: who sees whom. Our rules take
the place of a sliding window of the decoder's own (Mistral, Gemma 3's local layers), in every layer alike. So
a prompt longer than that window is read by more keys than in pretraining; a shorter one gives the unmodified
model's logits (law 0). What Gemma does to embeddings (x sqrt(width)) is part of its embedding module, which we
look words up with, and markers start from what it returns.
"""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaModel,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dti_ray.config import ModelConfig
from dti_ray.data.prompts import TokenTable
from dti_ray.errors import ConfigError, Fault
from dti_ray.model.attention import NAME, register

MARKERS = 3
INITIAL_STD = 0.02
TESTED = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Parts:
    """What a `ClickModel` is put together from.

    Attributes:
        decoder: without LM head, attending by our rules.
        label_rows: the LM head's rows of <no> and <yes>.
        markers: what the embeddings of [SUM], <no> and <yes> start from.
    """

    decoder: PreTrainedModel
    label_rows: Float[Tensor, "2 W"]
    markers: Float[Tensor, "3 W"]


def make_decoder(config: ModelConfig, table: TokenTable) -> Parts:
    """Load the decoder that is named, or draw the tiny Llama from torch's random state.

    Raises:
        ConfigError: the name cannot be loaded, or the architecture lacks what our attention needs.
    """
    register()
    if config.name_or_path is not None:
        return _from_pretrained(config.name_or_path, config.gguf_file, table)
    decoder = LlamaModel._from_config(_tiny_llama(config, table), attn_implementation=NAME)
    label_rows, markers = (torch.randn(n, config.hidden_size) * INITIAL_STD for n in (2, MARKERS))
    return Parts(decoder, label_rows, markers)


def load_decoder_config(config: ModelConfig, table: TokenTable) -> PretrainedConfig:
    """Return what describes the decoder's architecture, without its weights.

    Raises:
        ConfigError: the name has none.
    """
    if config.name_or_path is None:
        return _tiny_llama(config, table)
    try:
        whole = AutoConfig.from_pretrained(config.name_or_path, **_gguf(config.name_or_path, config.gguf_file))
        return whole.get_text_config()
    except (OSError, ValueError) as error:
        raise _not_loadable(config.name_or_path, error) from None


def load_tokenizer(name_or_path: str, gguf_file: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to a decoder.

    Args:
        name_or_path: as in `model.name_or_path`.
        gguf_file: as in `model.gguf_file`.

    Raises:
        ConfigError: there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(name_or_path, **_gguf(name_or_path, gguf_file))
    except (OSError, ValueError) as error:
        raise _not_loadable(name_or_path, error) from None


def absolute_name(name_or_path: str | None) -> str | None:
    """Return a folder so that it means the same in a process with another working directory, a name as it is."""
    folder = Path(name_or_path).expanduser() if name_or_path is not None else None
    return str(folder.resolve()) if folder is not None and folder.is_dir() else name_or_path


def decoder_name(model: ModelConfig) -> str:
    """Return what a reader elsewhere knows a decoder by: a folder's path is this machine's affair."""
    if model.gguf_file is not None:
        return model.gguf_file
    if model.name_or_path is None:
        return f"Llama from scratch, {model.layers} layers of {model.hidden_size}"
    return Path(model.name_or_path).name if Path(model.name_or_path).is_absolute() else model.name_or_path


def check_architecture(decoder: PreTrainedModel) -> None:
    """Refuse a decoder that our attention would read wrongly, and warn of one that no test has seen.

    Raises:
        ConfigError: an inner structure that is not Llama's, or capped attention scores.
    """
    layers = getattr(decoder, "layers", None)
    needed = ("k_proj", "v_proj", "head_dim", "layer_idx")
    fits = layers is not None and all(
        hasattr(layer, "input_layernorm") and all(hasattr(layer.self_attn, name) for name in needed) for layer in layers
    )
    name, expected = type(decoder).__name__, "a rotary decoder such as Llama, Qwen, Mistral or Gemma 3"
    if not fits or not hasattr(decoder, "rotary_emb"):
        raise ConfigError(Fault("model.name_or_path", f"{name} has another inner structure", expected))
    if getattr(decoder.config, "attn_logit_softcapping", None) is not None:
        raise ConfigError(Fault("model.name_or_path", f"{name} caps its attention scores, which we do not", expected))
    attentions = [layer.self_attn for layer in layers] if layers is not None else []
    if any(hasattr(one, "sinks") or not getattr(one, "use_rope", True) for one in attentions):
        raise ConfigError(
            Fault("model.name_or_path", f"{name} has attention sinks or layers without rotation", expected)
        )
    if getattr(decoder.config, "attention_dropout", 0.0):
        problem = f"attention_dropout is {decoder.config.attention_dropout} in its configuration"
        raise ConfigError(Fault("model.name_or_path", problem, "0: the fused kernels drop no attention weights"))
    if decoder.config.model_type not in TESTED:
        log.warning("model: laws 0 to 5 are tested for %s, not for %s", ", ".join(TESTED), decoder.config.model_type)


def _tiny_llama(config: ModelConfig, table: TokenTable) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=table.vocabulary,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        initializer_range=INITIAL_STD,
        pad_token_id=None,
        use_cache=False,
    )


def load_whole(name: str, gguf_file: str | None, attention: str) -> PreTrainedModel:
    """Load a decoder with its LM head, in fp32.

    Args:
        name: as in `model.name_or_path`.
        gguf_file: as in `model.gguf_file`.
        attention: name of an attention function that Transformers knows.

    Raises:
        ConfigError: the name cannot be loaded.
    """
    gguf = _gguf(name, gguf_file)
    try:
        return AutoModelForCausalLM.from_pretrained(name, attn_implementation=attention, dtype=torch.float32, **gguf)
    except (OSError, ValueError) as error:
        raise _not_loadable(name, error) from None


def _from_pretrained(name: str, gguf_file: str | None, table: TokenTable) -> Parts:
    whole = load_whole(name, gguf_file, NAME)
    summary, no, yes = table.marker_ids
    embed, output = whole.get_input_embeddings(), whole.get_output_embeddings()
    assert output is not None  # what is loaded has an LM head
    with torch.no_grad():
        labels = embed(torch.tensor([no, yes]))
        summaries = labels.mean(0, keepdim=True) if summary is None else embed(torch.tensor([summary]))
        label_rows = output.weight[[no, yes]].clone()
    return Parts(whole.get_decoder(), label_rows, torch.cat([summaries, labels]))


def _gguf(name: str, gguf_file: str | None) -> dict[str, str]:
    """Return the keyword that names a GGUF file, once all that reading it needs is there."""
    if gguf_file is None:
        return {}
    if importlib.util.find_spec("gguf") is None:
        missing = Fault("model.gguf_file", "needs the package gguf", hint="pip install 'dti-ray[gguf]'")
        raise ConfigError(missing)
    folder = Path(name)
    if folder.is_dir() and not (folder / gguf_file).is_file():
        found = sorted(path.name for path in folder.glob("*.gguf"))
        raise ConfigError(Fault("model.gguf_file", f"{gguf_file!r} is not in {name}", f"one of {found}"))
    return {"gguf_file": gguf_file}


def _not_loadable(name: str, error: Exception) -> ConfigError:
    reason = str(error).strip().splitlines()[0]
    return ConfigError(
        Fault("model.name_or_path", f"got {name!r}: {reason}", "a folder or a name of a Hugging Face decoder")
    )
