"""Transformers' entry into our attention, and the one place that chooses the backend.

Stage: attention. In: queries, keys and values of one layer, as Transformers hands them over. Out: what each
token reads.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache
from typing import Literal, Protocol, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from dti_ray.config import DebiasConfig, ResetConfig
from dti_ray.errors import ConfigError, Fault
from dti_ray.model.attention.banded import Banded
from dti_ray.model.attention.dense import Dense
from dti_ray.model.attention.flex import Flex
from dti_ray.model.attention.past import Copy
from dti_ray.model.attention.plan import Attend, AttentionPlan, Visit
from dti_ray.model.attention.rotary import rotate
from dti_ray.model.attention.slated import Slated
from dti_ray.model.batch import PackedBatch
from dti_ray.model.masks import Rules

NAME = "dti"
Backend = Literal["dense", "banded", "flex", "slated"]
BACKENDS: dict[Backend, Callable[[AttentionPlan], Attend]] = {
    "dense": Dense, "banded": Banded, "flex": Flex, "slated": Slated,
}  # fmt: skip

log = logging.getLogger(__name__)


class SelfAttention(Protocol):
    """What we use of a decoder layer's attention module."""

    layer_idx: int
    head_dim: int
    k_proj: nn.Module
    v_proj: nn.Module


def register() -> None:
    """Make Transformers call this module; decoders are built with `attn_implementation=NAME`."""
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, lambda *_args, **_kwargs: None)


@cache  # so that each choice is logged once
def choose_backend(wanted: str, device: str) -> Backend:
    """Say which backend computes, in one place.

    Args:
        wanted: `model.attention`: auto, dense, banded or flex.
        device: type of the device that the batch lies on; a model is built on the CPU and moved later.

    Raises:
        ConfigError: the backend that is wanted has no kernels there.
    """
    chosen: Backend = "flex" if device == "cuda" else "banded"
    reason = f"the one that is linear in the row's length on {device}"
    if wanted in BACKENDS:
        chosen, reason = cast("Backend", wanted), "as configured"
    if chosen == "banded" and device != "cpu":
        problem = f"got banded, whose kernels are for CPUs, on {device}"
        raise ConfigError(Fault("model.attention", problem, "auto, flex or dense"))
    log.info("attention: %s (%s)", chosen, reason)
    if chosen == "flex" and device == "cpu":
        log.warning("attention: flex on a CPU only scores, and makes T x T scores; auto would take banded")
    return chosen


def make_plan(
    batch: PackedBatch,
    rules: Rules,
    debias: DebiasConfig,
    reset: ResetConfig,
    backend: Backend,
    layers: nn.ModuleList,
    embeddings: Tensor,
    visit: Visit | None = None,
    is_pinned: bool = True,
) -> AttentionPlan:
    """Return the plan of one forward pass; see `AttentionPlan` for the arguments."""
    plan = AttentionPlan(batch, rules, debias, reset, layers, embeddings, visit, is_pinned)
    plan.attend = BACKENDS[backend](plan)
    return plan


def _attention(
    module: SelfAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _mask: Tensor | None,  # always None: our rules are in the plan
    *,
    dti: AttentionPlan,
    scaling: float,
    dropout: float = 0.0,
    **_: object,
) -> tuple[Float[Tensor, "B T H D"], None]:
    """Answer one layer's queries; the signature is Transformers' attention interface.

    The last layer is handed [SUM] states alone, since nothing else is read from it; the keys of all other
    tokens are then made here.
    """
    last_states = dti.last_states if module.layer_idx == len(dti.layers) - 1 else None
    if last_states is not None:
        others = _project(module, dti, last_states[:, : -query.shape[2]])
        key, value = (torch.cat([ahead, own], dim=2) for ahead, own in zip(others, (key, value), strict=True))
    return dti.attend(query, _copies(module, dti, (key, value)), scaling, dropout).transpose(1, 2), None


def keep_last(plan: AttentionPlan, states: Float[Tensor, "B T W"]) -> None:
    """Keep what the last layer leaves for later visits where nothing is asked of it."""
    module = cast("SelfAttention", plan.layers[-1].get_submodule("self_attn"))
    _copies(module, plan, _project(module, plan, states))


def _copies(module: SelfAttention, plan: AttentionPlan, contextual: Copy) -> Sequence[Copy]:
    """Return all that queries of a layer meet, and keep it if a later visit wants it."""
    copies: Sequence[Copy] = [contextual]
    if plan.is_dual and module.layer_idx > 0:  # in layer 0 both copies coincide
        copies = [contextual, _project(module, plan, plan.embeddings)]
    if plan.visit is not None:
        plan.layer = module.layer_idx
        copies = plan.visit.past.ahead_of(copies, plan.layer)
        if plan.visit.is_kept:
            plan.read.append((copies, plan.rotary))
    return copies


def _project(module: SelfAttention, plan: AttentionPlan, states: Float[Tensor, "B I W"]) -> tuple[Tensor, Tensor]:
    """Return keys and values of the first I tokens, by the layer's own norm and projections."""
    norm = plan.layers[module.layer_idx].input_layernorm
    assert isinstance(norm, nn.Module)
    normed = norm(states)
    shape = (*normed.shape[:-1], -1, module.head_dim)
    key, value = module.k_proj(normed).view(shape), module.v_proj(normed).view(shape)
    if (k_norm := getattr(module, "k_norm", None)) is not None:
        key = k_norm(key)
    cos, sin = (part[:, plan.known : plan.known + states.shape[1]] for part in plan.rotary)
    return rotate(key.transpose(1, 2), (cos, sin)), value.transpose(1, 2)
