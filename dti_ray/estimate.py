"""What a run will cost, before anything is asked for: tokens, FLOPs, GPU-hours, memory of one GPU by part.

Stage: beside launch. In: a configuration and a prepared data set; no GPU. Out: `Cost`, of the sliding window and
of the configuration's k.
Invariant: nothing is guessed that can be counted or measured here. Tokens and FLOPs are counted on a sample of
the very rows that training would pack. Activations are measured: two shallow copies of the decoder run one row
on the CPU (banded attention) while autograd's saved tensors are added up, and depth is linear. What is assumed is
said: the MFU, and the bytes per parameter of mixed-precision AdamW under ZeRO (Rajbhandari et al. 2020, section 3).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from dti_ray.config import PackingConfig, RunConfig
from dti_ray.data.interactions import TRAIN, Dataset, read_segment
from dti_ray.data.packing import PackedRow, check_capacity, pack, pack_spec
from dti_ray.data.pipeline import TrainingRows, concatenate
from dti_ray.data.plan import derive_seed
from dti_ray.data.prompts import TokenTable
from dti_ray.errors import Fault, InputError
from dti_ray.model.backbone import ClickModel
from dti_ray.model.batch import collate
from dti_ray.model.flops import Work, count_flops, count_work
from dti_ray.model.loss import TOKENS_AT_ONCE, loss_sum
from dti_ray.model.shape import build_shallow, build_shape
from dti_ray.model.speed import speed_up

SAMPLE_TARGETS = 20_000
PROBE_TOKENS = 1024
LOGIT_BYTES = 4
TEXT_LOGITS = 3  # of each word for each predicted token: its logit, the softmax's, and one in the weights' type
SHALLOW = (2, 3)  # layers of the measured copies: their difference is one layer


@dataclass(frozen=True)
class Memory:
    """Peak memory of one rank in bytes."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """All parts."""
        return sum(vars(self).values())


@dataclass(frozen=True)
class Cost:
    """A whole run under one paradigm.

    Attributes:
        k: targets of a prompt, or "all"; 1 is the sliding window.
        tokens: of all epochs, padding left out.
        flops: forward and backward.
        device_hours: on devices of the given peak at the given MFU.
        memory: of one rank.
        pass_tokens: tokens of one forward pass of one rank.
        k_min: fewest targets of a prompt, where they are a mixture.
    """

    k: int | str
    tokens: int
    flops: int
    device_hours: float
    memory: Memory
    pass_tokens: int
    k_min: int | None = None


def estimate(config: RunConfig, dataset: Dataset, table: TokenTable, peak_flops: float, mfu: float) -> list[Cost]:
    """Return the cost of the sliding window and of the configuration's k.

    Args:
        config: of the run; `cluster.workers` ranks share what ZeRO divides.
        dataset: prepared.
        table: its item texts as tokens.
        peak_flops: of one device, FLOP/s.
        mfu: share of it that training reaches.

    Raises:
        ConfigError: the decoder cannot be loaded, or a row cannot hold a prompt.
        InputError: the data set has no training targets.
    """
    shape = build_shape(config, table)
    targets = TrainingRows(dataset, table, config, through_ray=False).total_targets
    state = _state_bytes(shape, config)
    costs: list[Cost] = []
    for k in dict.fromkeys((1, config.packing.k)):
        changed = config.model_copy(update={"packing": _with_k(config.packing, k)})
        rows, work = _sample(changed, dataset, table, shape)
        scale = targets / work.sums
        flops = round(count_flops(shape, work).train * scale)
        pass_tokens = _pass_tokens(changed, work)
        per_token = _activation_bytes(changed, table, rows, shape.decoder.config.num_hidden_layers)
        memory = replace(
            state,
            activations=round(per_token * pass_tokens),
            logits=_logit_bytes(shape, work, pass_tokens / work.tokens),
        )
        hours = flops / (peak_flops * mfu) / 3600
        tokens = round(work.tokens * scale)
        costs.append(Cost(k, tokens, flops, hours, memory, pass_tokens, changed.packing.k_min))
    return [costs[0], *(_with_tail(cost, costs[0], config.optim.sliding_tail) for cost in costs[1:])]


def flops_per_target(config: RunConfig, dataset: Dataset, table: TokenTable) -> float:
    """Return the FLOPs of training one target, forward and backward.

    Raises:
        ConfigError: the decoder cannot be loaded, or a row cannot hold a prompt.
        InputError: the data set has no training targets.
    """
    shape, tail = build_shape(config, table), config.optim.sliding_tail
    flops = 0.0
    for k, share in ((config.packing.k, 1 - tail), (1, tail)):
        if share:
            changed = config.model_copy(update={"packing": _with_k(config.packing, k)})
            work = _sample(changed, dataset, table, shape)[1]
            flops += share * count_flops(shape, work).train / work.sums
    return flops


def _logit_bytes(shape: ClickModel, work: Work, share: float) -> int:
    """Return the bytes of a pass's logits: two of each click, and those of the vocabulary for the text tokens held.

    Texts are predicted some at a time; the gradient of their words is added up in fp32.
    """
    texts = 0
    if shape.text_weight:
        vocabulary, width = shape.words.shape
        held = min(TOKENS_AT_ONCE, work.text_tokens * share)
        texts = vocabulary * (TEXT_LOGITS * held + (width if shape.words.requires_grad else 0))
    return round(LOGIT_BYTES * (2 * work.sums * share + texts))


def _with_tail(cost: Cost, sliding: Cost, tail: float) -> Cost:
    """Mix in the last share of the targets, trained as stand-alone prompts."""
    if not tail:
        return cost
    names = ("tokens", "flops", "device_hours")
    mixed = {name: (1 - tail) * getattr(cost, name) + tail * getattr(sliding, name) for name in names}
    worst = max((cost, sliding), key=lambda one: one.memory.total)
    return replace(
        cost, tokens=round(mixed["tokens"]), flops=round(mixed["flops"]), device_hours=mixed["device_hours"],
        memory=worst.memory, pass_tokens=worst.pass_tokens,
    )  # fmt: skip


def _with_k(packing: PackingConfig, k: int | str) -> PackingConfig:
    """Return the same with another k for every prompt, or as it is."""
    return packing if k == packing.k else packing.model_copy(update={"k": k, "k_min": None})


def _sample(config: RunConfig, dataset: Dataset, table: TokenTable, shape: ClickModel) -> tuple[list[PackedRow], Work]:
    """Pack some segments, drawn at random, as training would."""
    spec = pack_spec(config.packing, config.prompt.context, TRAIN, k_min=config.packing.k_min)
    check_capacity(spec, table)
    rng = np.random.default_rng(derive_seed(config.train.seed, "estimate"))
    order = rng.permutation(len(dataset.segments))
    drawn = np.cumsum([dataset.segments[i].targets[TRAIN] for i in order])
    chosen = order[: int(np.searchsorted(drawn, SAMPLE_TARGETS)) + 1]
    users = concatenate([read_segment(dataset, dataset.segments[i]) for i in chosen])
    rows = list(pack(users, table, spec, rng=None if spec.k_min is None else rng))
    if not rows:
        hint = "check data.split and packing.min_context"
        raise InputError(Fault(f"data set {dataset.name}", "has no train targets", hint=hint))
    return rows, sum((count_work(collate([row], table), shape.rules) for row in rows), Work())


def _pass_tokens(config: RunConfig, work: Work) -> int:
    """Return the tokens of one forward pass: what a rank has of a step, or what `rows_per_pass` allows."""
    step = config.optim.targets_per_step * work.tokens / work.sums / config.cluster.workers
    return round(min(step, config.train.rows_per_pass * config.packing.row_tokens))


def _state_bytes(shape: ClickModel, config: RunConfig) -> Memory:
    """Return the bytes of weights, gradients and optimizer per rank, as ZeRO divides them."""
    everything = sum(p.numel() for p in shape.parameters())
    trained = sum(p.numel() for p in shape.parameters() if p.requires_grad)
    ranks, stage = config.cluster.workers, config.train.zero_stage
    is_bf16 = config.train.precision == "bf16"
    is_sharded = config.train.engine == "deepspeed"
    compute = 2 if is_bf16 and is_sharded else 4
    # Two moments in fp32; DeepSpeed also keeps an fp32 copy of the weights.
    optimizer = 12 if is_sharded and (is_bf16 or stage) else 8
    return Memory(
        weights=compute * everything // (ranks if stage == 3 else 1),
        gradients=compute * trained // (ranks if stage >= 2 else 1),
        optimizer=optimizer * trained // (ranks if stage >= 1 else 1),
        activations=0,
        logits=0,
    )


def _activation_bytes(config: RunConfig, table: TokenTable, rows: list[PackedRow], layers: int) -> float:
    """Return what one token keeps for the backward pass, from two shallow copies; depth is linear.

    With gradient checkpointing one layer at a time is computed again, so one whole layer is added.
    """
    row = max((row for row in rows if row.size_tokens <= PROBE_TOKENS), key=lambda row: row.size_tokens, default=None)
    row = row or min(rows, key=lambda row: row.size_tokens)
    shallow, deeper = (_saved_bytes(build_shallow(config, table, depth), row, table, config) for depth in SHALLOW)
    kept = shallow + (layers - SHALLOW[0]) * (deeper - shallow)
    if config.model.gradient_checkpointing:
        whole = config.model_copy(update={"model": config.model.model_copy(update={"gradient_checkpointing": False})})
        less, more = (_saved_bytes(build_shallow(whole, table, depth), row, table, whole) for depth in SHALLOW)
        kept += more - less
    return kept / row.size_tokens


def _saved_bytes(model: ClickModel, row: PackedRow, table: TokenTable, config: RunConfig) -> int:
    """Add up the storages that autograd keeps of one forward pass, weights left out."""
    speed_up(model.decoder, config.model.model_copy(update={"compile": False, "liger": False}), torch.device("cpu"))
    model.attention = "auto"  # of a CPU, whatever the run will use
    if config.train.precision == "bf16":
        model = model.bfloat16()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    batch = collate([row], table)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = loss_sum(model.train()(batch), batch.labels, batch.is_target)
    del loss
    return sum(kept.values())
