"""The losses: sums and a count, never a mean of means.

Stage: loss. In: log-odds and labels of one batch; states, where texts are predicted too. Out: summed cross-entropy.
Invariant: whoever divides, divides by the number of targets of all ranks and all passes of the step, so the
gradient is that of the mean over the step's targets however they were dealt.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from dti_ray.model.batch import PackedBatch


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
    logits = states[:, :-1][predicted[:, 1:]] @ words.T
    return cross_entropy(logits.float(), tokens[predicted], reduction="sum")


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
