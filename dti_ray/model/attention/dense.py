"""The reference: every score of the T x T matrix, in fp32. Short, slow and easy to read.

Stage: attention. In: one layer's queries, keys and values. Out: what each token reads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import dropout as drop
from torch.nn.functional import pad

from dti_ray.model.attention.plan import AttentionPlan, Copy, for_all_heads
from dti_ray.model.attention.rotary import unrotate
from dti_ray.model.masks import dense_distance, dense_mask


class Dense:
    """Scores once per copy, one softmax over the copies."""

    def __init__(self, plan: AttentionPlan) -> None:
        self.plan = plan
        self.mask, self.distance = dense_mask(plan.batch, plan.rules), dense_distance(plan.batch)

    def __call__(
        self, query: Tensor, copies: Sequence[Copy], scaling: float, dropout: float
    ) -> Float[Tensor, "B H T D"]:
        """See `Attend`."""
        plan, asked = self.plan, query.shape[2]
        prefix, sums = plan.sizes[0], sum(plan.sizes[:2])
        query = pad(query, (0, 0, sum(plan.sizes) - asked, 0))  # the last layer asks for [SUM]s alone
        copies = for_all_heads(copies, query.shape[1])
        masks = plan.copy_masks(self.mask, self.distance, len(copies))
        scores = []
        for (key, _), mask in zip(copies, masks, strict=True):
            score = query.float() @ key.float().mT
            if (prefix and plan.is_pinned) or plan.debias.rotary == "drop":
                flat = unrotate(query, plan.rotary).float() @ unrotate(key, plan.rotary).float().mT
                if plan.is_pinned:
                    score[:, :, prefix:, :prefix] = flat[:, :, prefix:, :prefix]
                if plan.debias.rotary == "drop":
                    score[:, :, sums:] = flat[:, :, sums:]
            score = score * scaling
            if plan.debias.strength > 0:
                score[:, :, sums:] += plan.position_bias(self.distance, query.shape[1])[:, :, sums:]
            scores.append(score + mask)
        weights = drop(torch.cat(scores, dim=-1).softmax(-1), dropout)
        values = torch.cat([value for _, value in copies], dim=2)
        return (weights @ values.float()).to(query.dtype)[:, :, -asked:]
