"""Attention: one reference that is easy to read, and the paths that are fast.

Stage: attention. In: rotated queries, keys and values of one layer, and an `AttentionPlan`. Out: what each
token reads. Registered with Transformers under `NAME`, so a decoder runs unpatched.
Invariant: all backends compute the same function.

    plan.py      what all layers of one forward pass share, and the weights that debias and reset put on scores
    dispatch.py  Transformers' entry, and the choice of the backend
    dense.py     the reference: T x T scores
    banded.py    CPU: T x W scores, W the longest look-back of the batch in blocks; bands.py is its geometry
    flex.py      CUDA: FlexAttention over the blocks that the rules leave
    slated.py    scoring: one context, read once or known from a Past (past.py), and candidates that share it
    rotary.py    rotation and its inverse

Three things differ from plain attention. The prefix is pinned, unless `prompt.prefix_position` says otherwise:
everyone behind it reads it unrotated, as if at distance 0. [SUM] queries may carry a distance bias and drop
rotation (debias). With a `distance` or `constant` reset a query meets two copies of every earlier interaction,
the contextual one and one computed from the embeddings, weighted (1 - alpha) : alpha inside one softmax.

Axes: B rows, H heads, T tokens, D head width, N blocks of all rows, Q queries and K keys of a block.
"""

from dti_ray.model.attention.dispatch import NAME, Backend, choose_backend, keep_last, make_plan, register
from dti_ray.model.attention.past import Past, Read
from dti_ray.model.attention.plan import AttentionPlan, Visit

__all__ = [
    "NAME",
    "AttentionPlan",
    "Backend",
    "Past",
    "Read",
    "Visit",
    "choose_backend",
    "keep_last",
    "make_plan",
    "register",
]
