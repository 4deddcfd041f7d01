"""The losses: sums and a count, never a mean of means.

Stage: loss. In: log-odds and labels of one batch; states, where texts are predicted too. Out: summed cross-entropy.
Invariant: whoever divides, divides by the number of targets of all ranks and all passes of the step, so the
gradient is that of the mean over the step's targets however they were dealt.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import binary_cross_entropy_with_logits

from dti_ray.model.batch import PackedBatch

TOKENS_AT_ONCE = 1024  # of texts, whose logits are held together


def loss_sum(
    log_odds: Float[Tensor, "B S"], labels: Float[Tensor, "B S"], is_target: Bool[Tensor, "B S"]
) -> Float[Tensor, ""]:
    """Return the cross-entropy in nats, summed over the targets, in fp32.

    With two label logits softmax cross-entropy equals the logistic loss of their difference. A batch
    without targets gives 0 with a gradient of 0, so that every rank can take part in the step.
    """
    each = binary_cross_entropy_with_logits(log_odds.float(), labels, reduction="none")
    return torch.where(is_target, each, 0.0).sum()


def text_loss_sum(states: Float[Tensor, "B C W"], words: Float[Tensor, "V W"], batch: PackedBatch) -> Float[Tensor, ""]:
    """Return the cross-entropy in nats of the targets' texts, summed over their tokens, in fp32.

    A token of x_t is predicted by the token before it, of its own text or of the interaction before; so each target
    counts once, in whatever prompt it stands, as in its click. The first text of a prompt has nothing before its first
    token, which counts nothing.

    Args:
        states: of content tokens, ready for an LM head.
        words: the LM head's rows, those of the embedding.
        batch: gives tokens and targets.
    """
    predicted, prefix = predicted_text(batch), batch.prefix_size
    tokens = batch.tokens[:, prefix : prefix + predicted.shape[1]]
    return word_loss_sum(states[:, :-1][predicted[:, 1:]], words, tokens[predicted])


def word_loss_sum(
    states: Float[Tensor, "N W"], words: Float[Tensor, "V W"], wanted: Int[Tensor, " N"]
) -> Float[Tensor, ""]:
    """Return the cross-entropy in nats of one word for each state, summed, in fp32."""
    return _WordLoss.apply(states, words, wanted)


class _WordLoss(torch.autograd.Function):
    """Cross-entropy of words, whose gradients are made on the way forward, `TOKENS_AT_ONCE` tokens at a time.

    Autograd would hold three copies of all logits until the way back. PyTorch's own `linear_cross_entropy` adds the
    loss up in the states' type, bf16 for one, and 2.12 has none yet: docs/benchmarks/text_loss_xeon-2core_202611.md.
    """

    @staticmethod
    def forward(
        ctx: Any, states: Float[Tensor, "N W"], words: Float[Tensor, "V W"], wanted: Int[Tensor, " N"]
    ) -> Tensor:
        is_trained = ctx.needs_input_grad[1]
        total = states.new_zeros((), dtype=torch.float32)
        to_states = torch.empty_like(states)
        to_words = torch.zeros_like(words, dtype=torch.float32) if is_trained else None
        parts = (tensor.split(TOKENS_AT_ONCE) for tensor in (states, wanted, to_states))
        for state, word, to_state in zip(*parts, strict=True):
            logs, place = (state @ words.T).float().log_softmax(1), word.unsqueeze(1)
            total -= logs.gather(1, place).sum()
            slope = logs.exp_().scatter_add_(1, place, logs.new_full(place.shape, -1.0)).to(words.dtype)
            torch.mm(slope, words, out=to_state)
            if to_words is not None:
                to_words += slope.T @ state
        ctx.save_for_backward(to_states, None if to_words is None else to_words.to(words.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - what the decorator is declared to return
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor, Tensor | None, None]:
        to_states, to_words = ctx.saved_tensors
        return gradients[0] * to_states, None if to_words is None else gradients[0] * to_words, None


def predicted_text(batch: PackedBatch) -> Bool[Tensor, "B C"]:
    """Return which content tokens are text of a target with a token of their prompt before them.

    [SUM]s lie in the order of their texts, and behind a text comes its feedback: so a token is one of x_t if the next
    text that a [SUM] stands behind is of the same interaction.
    """
    content = batch.prompt.shape[1]
    order = torch.arange(content, device=batch.after.device).expand_as(batch.prompt)
    ends = torch.where(batch.is_target, batch.after, content)
    nearest = torch.searchsorted(ends.contiguous(), order.contiguous()).clamp(max=ends.shape[1] - 1)
    end = ends.gather(1, nearest)
    place = end.clamp(max=content - 1)
    is_text = (end >= order) & (end < content)
    for numbers in (batch.prompt, batch.interaction):
        is_text &= numbers == numbers.gather(1, place)
    is_text[:, 1:] &= batch.prompt[:, 1:] == batch.prompt[:, :-1]
    is_text[:, :1] = False
    return is_text
