"""The loss: a sum and a count, never a mean of means.

Stage: loss. In: log-odds and labels of one batch. Out: summed cross-entropy over its targets.
Invariant: whoever divides, divides by the number of targets of all ranks and all passes of the step, so the
gradient is that of the mean over the step's targets however they were dealt.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits


def loss_sum(
    log_odds: Float[Tensor, "B S"], labels: Float[Tensor, "B S"], is_target: Bool[Tensor, "B S"]
) -> Float[Tensor, ""]:
    """Return the cross-entropy in nats, summed over the targets, in fp32.

    With two label logits softmax cross-entropy equals the logistic loss of their difference. A batch
    without targets gives 0 with a gradient of 0, so that every rank can take part in the step.
    """
    each = binary_cross_entropy_with_logits(log_odds.float(), labels, reduction="none")
    return torch.where(is_target, each, 0.0).sum()
