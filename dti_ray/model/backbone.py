"""From packed rows to one log-odds per target: any Hugging Face decoder, read out at [SUM].

Stage: backbone. In: a `PackedBatch`. Out: log-odds of a click, [B, S].
Invariant: the decoder is unmodified. What we add stands beside it: three learnt marker embeddings ([SUM],
<no>, <yes>) and two label rows, started from the decoder's own, so that the vocabulary never grows, only two
rows of the LM head are computed for a click, and both are trained whatever else is frozen.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, overload

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from dti_ray.config import RunConfig
from dti_ray.data.plan import derive_seed
from dti_ray.data.prompts import TokenTable
from dti_ray.errors import ConfigError, Fault, InputError
from dti_ray.model.attention import AttentionPlan, Backend, Past, Read, Visit, choose_backend, keep_last, make_plan
from dti_ray.model.batch import PackedBatch
from dti_ray.model.decoder import INITIAL_STD, MARKERS, check_architecture, make_decoder
from dti_ray.model.lora import add_adapters
from dti_ray.model.loss import text_loss_sum
from dti_ray.model.masks import Rules


class ClickModel(nn.Module):
    """A decoder with markers, a label head and our attention.

    Args:
        decoder: a Hugging Face decoder without LM head, built with `attn_implementation="dti"`.
        label_rows: [2, width], the LM head's rows of <no> and <yes>.
        markers: [3, width], what [SUM], <no> and <yes> start from.
        vocabulary: ids from here on are markers.
        config: rules, debias, reset, head, dropout and the weight of texts.
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
        check_architecture(decoder)
        self.decoder = decoder
        self.markers = nn.Embedding(MARKERS, markers.shape[1], _weight=markers.clone())
        self.head = LabelHead(label_rows, config.model.head)
        self.vocabulary = vocabulary
        self.rules = Rules.of(config.packing)
        self.debias, self.reset = config.debias, config.reset
        self.is_pinned = config.prompt.prefix_position == "pinned"
        self.dropout = nn.Dropout(config.model.dropout)
        self.attention, self.text_weight = config.model.attention, config.optim.text_weight
        layers = _layers(decoder)
        for layer in layers:
            layer.register_forward_pre_hook(_hand_on_angles, with_kwargs=True)
            layer.get_submodule("self_attn").register_forward_pre_hook(_tell_plan, with_kwargs=True)
        layers[-1].register_forward_pre_hook(_keep_sums_only, with_kwargs=True)
        if config.reset.mode == "uniform":
            for layer in layers[:-1]:
                layer.register_forward_hook(_reset_uniformly, with_kwargs=True)

    @property
    def words(self) -> Float[Tensor, "V W"]:
        """The embedding of the vocabulary, which is the LM head of texts too."""
        weight = self.decoder.get_input_embeddings().weight
        assert isinstance(weight, Tensor)
        return weight

    def trained(self) -> dict[str, nn.Parameter]:
        """Return what training changes, by name: all weights, or under LoRA adapters, markers and head."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def load_trained(self, weights: Mapping[str, Tensor]) -> None:
        """Set everything that training changes.

        Raises:
            InputError: a weight is missing, superfluous, empty or of another shape.
        """
        wanted = {name: tuple(parameter.shape) for name, parameter in self.trained().items()}
        found = {name: tuple(weight.shape) for name, weight in weights.items()}
        odd = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        if odd:
            problem = f"{len(odd)} weights do not fit the model, {odd[0]} first: shape {found.get(odd[0])}"
            raise InputError(Fault("checkpoint", problem, f"{wanted.get(odd[0])}", "was it written by this run?"))
        self.load_state_dict(weights, strict=False)

    @overload
    def forward(self, batch: PackedBatch, is_text_asked: Literal[False] = False) -> Tensor: ...

    @overload
    def forward(self, batch: PackedBatch, is_text_asked: Literal[True]) -> tuple[Tensor, Tensor]: ...

    def forward(
        self, batch: PackedBatch, is_text_asked: bool = False
    ) -> Float[Tensor, "B S"] | tuple[Float[Tensor, "B S"], Float[Tensor, ""]]:
        """Return the log-odds of a click at every [SUM], padding included.

        Args:
            batch: whole rows.
            is_text_asked: also return the loss of the targets' texts, summed, times `optim.text_weight`; for training.
        """
        states, plan = self._run(batch, choose_backend(self.attention, batch.tokens.device.type))
        return (self.head(states), self._text_loss(plan)) if is_text_asked else self.head(states)

    def visit(self, batch: PackedBatch, visit: Visit) -> tuple[Float[Tensor, "B S"], Read]:
        """Score rows of which the first tokens were read before.

        Args:
            batch: whole rows.
            visit: what was read before, and which texts are candidates.

        Returns:
            (the log-odds at every [SUM], padding included; what the row leaves for later visits, if that is kept).
        """
        states, plan = self._run(batch, "slated", visit)
        return self.head(states), plan.read

    def read_prefix(self, batch: PackedBatch) -> Past:
        """Return what is left by the shared prefix, once for the visits of all rows.

        Args:
            batch: one row with the prefix, whatever follows it.
        """
        _, plan = self._run(batch, "dense", Visit(Past(), (0,), is_kept=True))
        return Past.of_prefix(plan.read, batch.prefix_size)

    def embed(self, tokens: Tensor) -> Float[Tensor, "B T W"]:
        """Look tokens up: ids behind the vocabulary are markers."""
        is_marker = tokens >= self.vocabulary
        words = self.decoder.get_input_embeddings()(torch.where(is_marker, 0, tokens))
        markers = self.markers(torch.where(is_marker, tokens - self.vocabulary, 0))
        return torch.where(is_marker.unsqueeze(-1), markers.to(words.dtype), words)

    def _text_loss(self, plan: AttentionPlan) -> Float[Tensor, ""]:
        """Predict texts from the states in front of the last layer, which itself answers [SUM] alone."""
        if not self.text_weight:
            return plan.embeddings.new_zeros(())
        assert plan.last_states is not None, "the last layer was run"
        states = self.decoder.get_submodule("norm")(plan.last_states.split(plan.sizes, dim=1)[1])
        return self.text_weight * text_loss_sum(states, self.words, plan.batch)

    def _run(
        self, batch: PackedBatch, backend: Backend, visit: Visit | None = None
    ) -> tuple[Float[Tensor, "B S W"], AttentionPlan]:
        """Run the decoder; return the states at every [SUM] and what its layers shared."""
        known = 0 if visit is None else visit.past.size
        embeddings = self.dropout(self.embed(batch.tokens[:, known:]))
        layers = _layers(self.decoder)
        method = self.rules, self.debias, self.reset
        plan = make_plan(batch, *method, backend, layers, embeddings, visit, self.is_pinned)
        positions = batch.positions if visit is None else batch.positions + visit.past.offset
        try:
            states = self.decoder(inputs_embeds=embeddings, position_ids=positions, use_cache=False, dti=plan)
        except _AllRead:
            return torch.zeros_like(embeddings[:, -batch.after.shape[1] :]), plan
        return states.last_hidden_state, plan


class _AllRead(Exception):  # noqa: N818 - no error
    """Leaves the decoder in front of its last layer: nothing is asked, and its keys and values are kept."""


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
        ConfigError: the name cannot be loaded, or the architecture lacks what attention, adapters or texts need.
    """
    seed = config.train.seed
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "weights"))
        parts = make_decoder(config.model, table)
        check_text(config, parts.decoder)
        model = ClickModel(parts.decoder, parts.label_rows, parts.markers, table.vocabulary, config)
        if config.lora.rank is not None:
            add_adapters(parts.decoder, config.lora, derive_seed(seed, "adapters"))
    return model


def check_text(config: RunConfig, decoder: PreTrainedModel) -> None:
    """Refuse to predict texts by embeddings that are not the LM head's rows.

    Raises:
        ConfigError: `optim.text_weight` is set and the decoder has an LM head of its own.
    """
    if config.optim.text_weight and config.model.name_or_path is not None and not decoder.config.tie_word_embeddings:
        problem = f"got {config.optim.text_weight:g}, but {config.model.name_or_path} has an LM head of its own"
        hint = "set optim.text_weight=0, or take a decoder whose LM head is its embedding"
        raise ConfigError(Fault("optim.text_weight", problem, "tied embeddings", hint))


def _layers(decoder: PreTrainedModel) -> nn.ModuleList:
    layers = decoder.layers
    assert isinstance(layers, nn.ModuleList)
    return layers


def _hand_on_angles(
    _module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Give a layer's attention the angles of all tokens: Gemma has two kinds, the last layer is handed a part.

    The layer itself gets those of the tokens that it computes, which on a visit are not all.
    """
    plan = kwargs["dti"]
    rotary = tuple(part.expand(len(plan.batch.tokens), -1, -1) for part in kwargs["position_embeddings"])
    computed = tuple(part[:, plan.known :] for part in rotary)
    return args, {**kwargs, "position_embeddings": computed, "dti_rotary": rotary}


def _keep_sums_only(
    _module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Hand the last layer [SUM] states alone: from the other tokens it needs keys and values, nothing else."""
    plan = kwargs["dti"]
    assert isinstance(plan, AttentionPlan)
    states, *rest = args
    if not plan.is_asked:
        plan.rotary = kwargs["dti_rotary"]
        keep_last(plan, states)
        raise _AllRead
    sums = plan.batch.after.shape[1]
    changed = {
        **kwargs,
        "position_embeddings": tuple(part[:, -sums:] for part in kwargs["dti_rotary"]),
        "position_ids": plan.batch.positions[:, -sums:],
        "dti_last_states": states,
    }
    return (states[:, -sums:], *rest), changed


def _tell_plan(_module: nn.Module, _args: tuple[object, ...], kwargs: dict[str, Any]) -> None:
    """Set what the plan holds of the layer at hand, immediately before it attends.

    The values travel with the layer's call, and this hook sits inside the layer: whoever runs a layer again, as
    gradient checkpointing does in the backward pass and in reverse order, sets them again.
    """
    plan = kwargs["dti"]
    assert isinstance(plan, AttentionPlan)
    plan.rotary = kwargs["dti_rotary"]
    plan.last_states = kwargs.get("dti_last_states")


def _reset_uniformly(
    _module: nn.Module, _args: tuple[object, ...], kwargs: dict[str, object], states: Tensor
) -> Tensor:
    """Move content states towards their embeddings: h <- (1 - alpha) h + alpha h0."""
    plan = kwargs["dti"]
    assert isinstance(plan, AttentionPlan)
    assert plan.embeddings is not None
    prefix, content, _ = plan.sizes
    share = torch.zeros(1, sum(plan.sizes), 1, dtype=states.dtype, device=states.device)
    share[:, prefix : prefix + content] = plan.reset.alpha
    return torch.lerp(states, plan.embeddings, share[:, plan.known :])
