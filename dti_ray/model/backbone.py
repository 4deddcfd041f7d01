"""From packed rows to one log-odds per target: any Hugging Face decoder, read out at [SUM].

Stage: backbone. In: a `PackedBatch`. Out: log-odds of a click, [B, S].
Invariant: the decoder is unmodified. What we add stands beside it: three learnt marker embeddings ([SUM],
<no>, <yes>) and two label rows, started from the decoder's own, so that the vocabulary never grows, only two
rows of the LM head are ever computed, and both are trained whatever else is frozen.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dti_ray.config import ModelConfig, RunConfig
from dti_ray.data.plan import derive_seed
from dti_ray.data.prompts import TokenTable
from dti_ray.errors import ConfigError, Fault
from dti_ray.model.attention import NAME, AttentionPlan, Backend, choose_backend, make_plan, register
from dti_ray.model.batch import PackedBatch
from dti_ray.model.masks import Rules

MARKERS = 3
INITIAL_STD = 0.02


class ClickModel(nn.Module):
    """A decoder with markers, a label head and our attention.

    Args:
        decoder: a Hugging Face decoder without LM head, built with `attn_implementation="dti"`.
        label_rows: [2, width], the LM head's rows of <no> and <yes>.
        markers: [3, width], what [SUM], <no> and <yes> start from.
        vocabulary: ids from here on are markers.
        config: rules, debias, reset, head and dropout.
    """

    def __init__(
        self,
        decoder: PreTrainedModel,
        label_rows: Tensor,
        markers: Tensor,
        vocabulary: int,
        config: RunConfig,
    ) -> None:
        super().__init__()
        _check_architecture(decoder)
        self.decoder = decoder
        self.markers = nn.Embedding(MARKERS, markers.shape[1], _weight=markers.clone())
        self.head = LabelHead(label_rows, config.model.head)
        self.vocabulary = vocabulary
        self.rules = Rules.of(config.packing)
        self.debias, self.reset = config.debias, config.reset
        self.dropout = nn.Dropout(config.model.dropout)
        self.backend: Backend = choose_backend(config.model.attention)
        layers = _layers(decoder)
        for layer in layers:
            layer.register_forward_pre_hook(_remember_rotary, with_kwargs=True)
        layers[-1].register_forward_pre_hook(_keep_sums_only, with_kwargs=True)
        if config.reset.mode == "uniform":
            for layer in layers[:-1]:
                layer.register_forward_hook(_reset_uniformly, with_kwargs=True)

    def forward(self, batch: PackedBatch) -> Float[Tensor, "B S"]:
        """Return the log-odds of a click at every [SUM], padding included."""
        return self.head(self.read(batch))

    def read(self, batch: PackedBatch) -> Float[Tensor, "B S W"]:
        """Return the states at every [SUM], after the decoder's last norm."""
        embeddings = self.dropout(self.embed(batch.tokens))
        layers = _layers(self.decoder)
        plan = make_plan(batch, self.rules, self.debias, self.reset, self.backend, layers, embeddings)
        states = self.decoder(inputs_embeds=embeddings, position_ids=batch.positions, use_cache=False, dti=plan)
        return states.last_hidden_state

    def embed(self, tokens: Tensor) -> Float[Tensor, "B T W"]:
        """Look tokens up: ids behind the vocabulary are markers."""
        is_marker = tokens >= self.vocabulary
        words = self.decoder.get_input_embeddings()(torch.where(is_marker, 0, tokens))
        markers = self.markers(torch.where(is_marker, tokens - self.vocabulary, 0))
        return torch.where(is_marker.unsqueeze(-1), markers.to(words.dtype), words)


class LabelHead(nn.Module):
    """Log-odds from a state: the difference of two label rows, or one linear unit.

    Source: softmax over two logits is the logistic function of their difference.
    """

    def __init__(self, label_rows: Tensor, kind: str) -> None:
        super().__init__()
        self.kind = kind
        if kind == "yes_no":
            self.rows = nn.Linear(label_rows.shape[1], 2, bias=False)
            with torch.no_grad():
                self.rows.weight.copy_(label_rows)
        else:
            self.rows = nn.Linear(label_rows.shape[1], 1)
            nn.init.zeros_(self.rows.bias)
            nn.init.normal_(self.rows.weight, std=INITIAL_STD)

    def forward(self, states: Float[Tensor, "B S W"]) -> Float[Tensor, "B S"]:
        """Return log-odds in fp32."""
        logits = self.rows(states).float()
        return logits[..., 1] - logits[..., 0] if self.kind == "yes_no" else logits[..., 0]


def build_model(config: RunConfig, table: TokenTable) -> ClickModel:
    """Build the model that a run trains, the same for the same seed.

    Raises:
        ConfigError: the name cannot be loaded, or the architecture lacks what our attention needs.
    """
    register()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(config.train.seed, "weights"))
        if config.model.name_or_path is not None:
            return _from_pretrained(config, table)
        decoder = LlamaModel._from_config(_tiny_llama(config.model, table), attn_implementation=NAME)
        label_rows, markers = (torch.randn(n, config.model.hidden_size) * INITIAL_STD for n in (2, MARKERS))
        return ClickModel(decoder, label_rows, markers, table.vocabulary, config)


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to a decoder.

    Raises:
        ConfigError: there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(name_or_path)
    except (OSError, ValueError) as error:
        raise _not_loadable(name_or_path, error) from None


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


def _from_pretrained(config: RunConfig, table: TokenTable) -> ClickModel:
    name = config.model.name_or_path
    assert name is not None
    try:
        whole = AutoModelForCausalLM.from_pretrained(name, attn_implementation=NAME, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise _not_loadable(name, error) from None
    summary, no, yes = table.marker_ids
    embed, output = whole.get_input_embeddings(), whole.get_output_embeddings()
    assert output is not None  # what is loaded has an LM head
    with torch.no_grad():
        labels = embed(torch.tensor([no, yes]))
        summaries = labels.mean(0, keepdim=True) if summary is None else embed(torch.tensor([summary]))
        label_rows = output.weight[[no, yes]].clone()
    return ClickModel(whole.get_decoder(), label_rows, torch.cat([summaries, labels]), table.vocabulary, config)


def _not_loadable(name: str, error: Exception) -> ConfigError:
    reason = str(error).strip().splitlines()[0]
    return ConfigError(
        Fault("model.name_or_path", f"got {name!r}: {reason}", "a folder or a name of a Hugging Face decoder")
    )


def _check_architecture(decoder: PreTrainedModel) -> None:
    layers = getattr(decoder, "layers", None)
    needed = ("k_proj", "v_proj", "head_dim", "layer_idx")
    fits = layers is not None and all(
        hasattr(layer, "input_layernorm") and all(hasattr(layer.self_attn, name) for name in needed) for layer in layers
    )
    if not fits or not hasattr(decoder, "rotary_emb"):
        raise ConfigError(
            Fault(
                "model.name_or_path",
                f"{type(decoder).__name__} has another inner structure",
                "a rotary decoder such as Llama, Qwen, Mistral or Gemma",
            )
        )


def _layers(decoder: PreTrainedModel) -> nn.ModuleList:
    layers = decoder.layers
    assert isinstance(layers, nn.ModuleList)
    return layers


def _remember_rotary(_module: nn.Module, _args: tuple[object, ...], kwargs: dict[str, Any]) -> None:
    """Tell the plan the angles of this very layer: Gemma has two kinds."""
    plan = kwargs["dti"]
    assert isinstance(plan, AttentionPlan)
    cos, sin = kwargs["position_embeddings"]
    rows = len(plan.batch.tokens)
    plan.rotary = (cos.expand(rows, -1, -1), sin.expand(rows, -1, -1))


def _keep_sums_only(
    _module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, object]
) -> tuple[tuple[Tensor, ...], dict[str, object]]:
    """Hand the last layer [SUM] states alone: from the other tokens it needs keys and values, nothing else."""
    plan = kwargs["dti"]
    assert isinstance(plan, AttentionPlan)
    states, *rest = args
    sums = plan.batch.after.shape[1]
    plan.last_states = states
    angles = tuple(part[:, -sums:] for part in plan.rotary)
    changed = {**kwargs, "position_embeddings": angles, "position_ids": plan.batch.positions[:, -sums:]}
    return (states[:, -sums:], *rest), changed


def _reset_uniformly(
    _module: nn.Module, _args: tuple[object, ...], kwargs: dict[str, object], states: Tensor
) -> Tensor:
    """Move content states towards their embeddings: h <- (1 - alpha) h + alpha h0."""
    plan = kwargs["dti"]
    assert isinstance(plan, AttentionPlan)
    assert plan.embeddings is not None
    prefix, content = plan.batch.prefix_size, plan.batch.prompt.shape[1]
    share = torch.zeros(1, states.shape[1], 1, dtype=states.dtype, device=states.device)
    share[:, prefix : prefix + content] = plan.reset.alpha
    return torch.lerp(states, plan.embeddings, share)
