"""Who may see whom: the rules, each once.

Stage: masks. In: coordinates of query and key tokens, as packing wrote them. Out: yes or no, and how far.
Invariant: every rule is a pure elementwise function of two `Coordinates` whose tensors broadcast, so the
dense matrix, the bands and (on CUDA) the blocks are the same rules at other places.

The prefix is seen by everyone, and a [SUM] sees itself; these two need no coordinates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dti_ray.config import PackingConfig, Window
from dti_ray.model.batch import PackedBatch


@dataclass(frozen=True)
class Coordinates:
    """Where tokens stand; all tensors have one shape, or shapes that broadcast.

    Attributes:
        prompt: number of the prompt in its row, from 1; 0 is padding.
        interaction: number of the interaction in its user's history.
        cut: first interaction that the token may not see, its own apart.
        position: rotary position.
        order: index in the row's content; a [SUM] has its last text token's.
    """

    prompt: Int[Tensor, ...]
    interaction: Int[Tensor, ...]
    cut: Int[Tensor, ...]
    position: Int[Tensor, ...]
    order: Int[Tensor, ...]

    def map(self, change: Callable[[Tensor], Tensor]) -> Coordinates:
        """Apply one change of shape to every tensor."""
        return Coordinates(*(change(getattr(self, field.name)) for field in fields(self)))


@dataclass(frozen=True)
class Rules:
    """The window that the rules refer to.

    Attributes:
        window: the rule that bounds what a token sees.
        n: interactions that a token sees back, for `interactions`.
        window_tokens: positions that a token sees back, itself included, for `tokens`.
    """

    window: Window
    n: int
    window_tokens: int

    @classmethod
    def of(cls, packing: PackingConfig) -> Rules:
        """Take the rules from the configuration."""
        return cls(packing.window, packing.n, packing.window_tokens)


def content_coordinates(batch: PackedBatch) -> Coordinates:
    """Return the coordinates of the content tokens, [B, C]."""
    size = batch.prompt.shape[1]
    position = batch.positions[:, batch.prefix_size : batch.prefix_size + size]
    order = torch.arange(size, device=batch.prompt.device).expand_as(batch.prompt)
    return Coordinates(batch.prompt, batch.interaction, batch.cut, position, order)


def sum_coordinates(batch: PackedBatch) -> Coordinates:
    """Return the coordinates of the [SUM] tokens, [B, S]: those of their text, one position further."""
    text = content_coordinates(batch).map(lambda values: values.gather(1, batch.after))
    return Coordinates(text.prompt * batch.is_target, text.interaction, text.cut, text.position + 1, text.order)


def visible(query: Coordinates, key: Coordinates, rules: Rules) -> Bool[Tensor, ...]:
    """Say which content keys a content or [SUM] query sees."""
    own = same_interaction(query, key)
    return same_prompt(query, key) & not_after(query, key) & in_window(query, key, rules, own)


def same_prompt(query: Coordinates, key: Coordinates) -> Bool[Tensor, ...]:
    """Prompts of a row never see each other."""
    return query.prompt == key.prompt


def not_after(query: Coordinates, key: Coordinates) -> Bool[Tensor, ...]:
    """Nothing sees what stands behind it; so no [SUM] sees its own feedback."""
    return key.order <= query.order


def same_interaction(query: Coordinates, key: Coordinates) -> Bool[Tensor, ...]:
    """The target's own tokens are seen whatever the window."""
    return key.interaction == query.interaction


def in_window(query: Coordinates, key: Coordinates, rules: Rules, own: Bool[Tensor, ...]) -> Bool[Tensor, ...]:
    """Interactions before the cut are seen as far back as the window reaches."""
    earlier = key.interaction < query.cut
    if rules.window is Window.INTERACTIONS:
        earlier = earlier & (key.interaction >= query.cut - rules.n)
    if rules.window is Window.TOKENS:
        near = query.position - key.position < rules.window_tokens
        return (own | earlier) & near
    return own | earlier


def distance(query: Coordinates, key: Coordinates) -> Int[Tensor, ...]:
    """Return d in interactions: 0 for the own interaction, 1 for the newest one that may be seen."""
    return torch.where(same_interaction(query, key), 0, query.cut - key.interaction)


def dense_mask(batch: PackedBatch, rules: Rules) -> Bool[Tensor, "B T T"]:
    """Return the whole matrix, rows ask and columns answer: the readable reference of every other form."""
    prefix, content = batch.prefix_size, batch.prompt.shape[1]
    size = batch.tokens.shape[1]
    mask = torch.zeros(len(batch.tokens), size, size, dtype=torch.bool, device=batch.tokens.device)
    keys = content_coordinates(batch).map(lambda values: values[:, None, :])
    for begin, queries in ((prefix, content_coordinates(batch)), (prefix + content, sum_coordinates(batch))):
        rows = queries.map(lambda values: values[:, :, None])
        end = begin + queries.order.shape[1]
        mask[:, begin:end, prefix : prefix + content] = visible(rows, keys, rules)
    mask[:, :, :prefix] = True
    mask[:, :prefix, :prefix] = torch.ones(prefix, prefix, dtype=torch.bool).tril()
    sums = torch.arange(prefix + content, size)
    mask[:, sums, sums] = True
    return mask


def dense_distance(batch: PackedBatch) -> Int[Tensor, "B T T"]:
    """Return d of every pair of the whole matrix, 0 where the key is the prefix or the query itself."""
    prefix, content = batch.prefix_size, batch.prompt.shape[1]
    keys, sums = content_coordinates(batch), sum_coordinates(batch)
    size = batch.tokens.shape[1]
    out = torch.zeros(len(batch.tokens), size, size, dtype=torch.long, device=batch.tokens.device)
    for begin, queries in ((prefix, keys), (prefix + content, sums)):
        rows, columns = queries.map(lambda x: x[:, :, None]), keys.map(lambda x: x[:, None, :])
        out[:, begin : begin + queries.order.shape[1], prefix : prefix + content] = distance(rows, columns)
    return out


def bias_slopes(heads: int, device: torch.device) -> Float[Tensor, " H"]:
    """Return 2^(-8 (h + 1) / H), the slopes of ALiBi (Press et al. 2022), in fp32."""
    return 2.0 ** (-8.0 * torch.arange(1, heads + 1, device=device, dtype=torch.float32) / heads)
