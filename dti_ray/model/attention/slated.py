"""Scoring: one context for all candidates of a row; cost T x context, linear in the number of candidates.

Stage: attention. In: one layer's queries, keys and values of the tokens that a `Visit` computes. Out: what each
token reads.
Invariant: whatever several may read lies among a row's first tokens: the prefix, and context, read in this pass or
known from a `Past`. So a query meets up to three parts of keys, joined to one softmax by their log-sum-exps:

    prefix          everyone, unrotated on both sides if it is pinned
    context         everyone, by the rules of masks.py: one product for all candidates
    its own text    a candidate's tokens, and each [SUM] itself; candidates lie side by side, padded to the longest

Scores are in fp32, like the reference's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from dti_ray.model.attention.banded import fused
from dti_ray.model.attention.past import part_of
from dti_ray.model.attention.plan import HIDDEN, AttentionPlan, Copy, for_all_heads
from dti_ray.model.attention.rotary import Turn, rotate, turn_of, unrotate
from dti_ray.model.batch import PackedBatch
from dti_ray.model.masks import content_coordinates, distance, sum_coordinates, visible

Part = tuple[Float[Tensor, "*N Q D"], Float[Tensor, "*N Q"]]  # what some of the keys answer, and log-sum-exp


@dataclass(frozen=True)
class Texts:
    """The candidates' texts side by side, each at the end of its L places; one group for each [SUM].

    Attributes:
        tokens: [B, S, L], the content token at each place, counted from the first that the pass computes.
        mask: [B x S, 1, L, L], causal, added to scores; its last row, a text's last token, sees all that a [SUM] does.
        home: [B, N], the place of each content token that the pass computes.
        is_home: [B, N], which of these tokens have one: those of candidates.
    """

    tokens: Int[Tensor, "B S L"]
    mask: Float[Tensor, "BS 1 L L"]
    home: Int[Tensor, "B N"]
    is_home: Bool[Tensor, "B N"]

    def lay(self, x: Float[Tensor, "B H N D"]) -> Float[Tensor, "BS H L D"]:
        """Lay the tokens of texts side by side."""
        return _pick(x, self.tokens.flatten(1)).unflatten(2, self.tokens.shape[1:]).transpose(1, 2).flatten(0, 1)

    def bring_back(self, x: Float[Tensor, "BS H L D"], nothing: float = 0.0) -> Float[Tensor, "B H N D"]:
        """Bring what `lay` laid out to its tokens again; the others get a number."""
        picked = _pick(_together(x, len(self.home)), self.home)
        return picked.where(self.is_home[:, None, :, None], nothing)


class Slated:
    """Masks of one visit; they are made once and serve all layers."""

    def __init__(self, plan: AttentionPlan) -> None:
        assert plan.visit is not None
        self.plan, self.past, self.batch = plan, plan.visit.past, plan.batch
        assert self.past.prefix_size == plan.sizes[0], "the prefix is read once per model"
        self.shared, self.known = max(plan.visit.shared), self.past.content_size
        self.context_sizes = torch.tensor(plan.visit.shared, device=plan.batch.prompt.device)
        self.is_asked = bool(plan.batch.is_target.any())
        self.texts = lay_texts(plan.batch, self.context_sizes, self.known) if self.is_asked else None
        self.masks: dict[tuple[str, int], Tensor] = {}
        self.found: dict[int, tuple[Turn, ...]] = {}

    def __call__(
        self, query: Tensor, copies: Sequence[Copy], scaling: float, dropout: float
    ) -> Float[Tensor, "B H T D"]:
        """See `Attend`; queries are of the tokens that the pass computes, keys of all behind the prefix."""
        assert dropout == 0.0, "attention dropout is refused when the model is built"
        with torch.autocast(query.device.type, enabled=False):  # it would take scores to bf16
            copies = [(key.float(), value.float()) for key, value in copies]
            layer = Layer(self, for_all_heads(copies, query.shape[1]), scaling)
            content, sums = query.float().split([query.shape[2] - self.plan.sizes[2], self.plan.sizes[2]], dim=2)
            out = layer.answer_sums(sums) if self.is_asked else torch.zeros_like(sums)
            if content.shape[2]:  # the last layer asks for [SUM]s alone
                out = torch.cat([layer.answer_content(content), out], dim=2)
            return out.to(query.dtype)

    def mask(self, kind: str, copies: int, heads: int) -> Float[Tensor, "B _ Q K"]:
        """Return what is added to the scores of `content` or `sum` queries against context."""
        if (kind, copies) not in self.masks:
            content, rules = content_coordinates(self.batch), self.plan.rules
            queries = sum_coordinates(self.batch) if kind == "sum" else content.map(lambda x: x[:, self.known :])
            queries, keys = queries.map(lambda x: x[:, :, None]), content.map(lambda x: x[:, None, : self.shared])
            seen = visible(queries, keys, rules) & (keys.order < self.context_sizes[:, None, None])
            is_biased = kind == "sum" and self.plan.debias.strength > 0
            d = distance(queries, keys) if is_biased or copies > 1 else None
            masks = self.plan.copy_masks(seen, d, copies)
            if is_biased and d is not None:
                masks = [mask + self.plan.position_bias(d, heads) for mask in masks]
            self.masks[kind, copies] = torch.cat(masks, dim=-1)
        return self.masks[kind, copies]

    def turns(self) -> tuple[Turn, ...]:
        """Return the angles of prefix, content and [SUM] tokens in the layer at hand; most layers share theirs."""
        rotary = self.plan.rotary
        place = rotary[0].data_ptr()
        if place not in self.found:
            parts = (part.float().split(self.plan.sizes, dim=1) for part in rotary)
            self.found[place] = tuple(zip(*parts, strict=True))
        return self.found[place]


class Layer:
    """The keys and values of one layer, as both kinds of queries need them."""

    def __init__(self, slated: Slated, copies: Sequence[Copy], scaling: float) -> None:
        self.slated, self.scaling = slated, scaling
        self.prefix_turn, self.turn, self.sum_turn = slated.turns()
        _, content, sums = slated.plan.sizes
        split = [tuple(zip(*(x.split([content, sums], dim=2) for x in copy), strict=True)) for copy in copies]
        self.content: list[Copy] = [part[0] for part in split]
        self.own: Copy = split[0][1]

    def answer_content(self, query: Float[Tensor, "B H N D"]) -> Float[Tensor, "B H N D"]:
        """Answer the content tokens that the pass computes."""
        texts = self.slated.texts
        parts = self._shared("content", query, turn_of(slice(self.slated.known, None), self.turn), is_flat=False)
        if texts is not None:
            out, lse = self._meet(texts.lay(query), *self._texts(texts, is_flat=False), texts.mask)
            parts.append((texts.bring_back(out), texts.bring_back(lse.unsqueeze(-1), HIDDEN).squeeze(-1)))
        return reduce(_join, parts)[0]

    def answer_sums(self, query: Float[Tensor, "B H S D"]) -> Float[Tensor, "B H S D"]:
        """Answer the [SUM]s: from what is shared, from their own text, and each from itself."""
        texts, (key, value) = self.slated.texts, self.own
        is_flat = self.slated.plan.debias.rotary == "drop"
        itself = value, (query * key).sum(-1) * self.scaling  # rotating both alike changes nothing
        parts = [itself, *self._shared("sum", query, self.sum_turn, is_flat)]
        if texts is not None:
            asking = unrotate(query, self.sum_turn) if is_flat else query
            out, lse = self._meet(_apart(asking), *self._texts(texts, is_flat), texts.mask[:, :, -1:])
            parts.append((_together(out, len(query)), _together(lse.unsqueeze(-1), len(query)).squeeze(-1)))
        return reduce(_join, parts)[0]

    def _shared(self, kind: str, query: Tensor, turn: Turn, is_flat: bool) -> list[Part]:
        """Meet the prefix and context."""
        parts: list[Part] = []
        prefix, shared, is_pinned = self.slated.past.prefix, self.slated.shared, self.slated.plan.is_pinned
        flat = unrotate(query, turn) if (prefix and is_pinned) or is_flat else query
        if prefix:
            key, value = (x.float() for x in prefix[self.slated.plan.layer])
            if not (is_pinned or is_flat):
                key = rotate(key, self.prefix_turn)
            ((key, value),) = for_all_heads([(key, value)], query.shape[1])
            parts.append(self._meet(flat, key.expand(len(query), -1, -1, -1), value.expand(len(query), -1, -1, -1)))
        if shared:
            masks = self.slated.mask(kind, len(self.content), query.shape[1]).split(shared, dim=-1)
            for mask, copy in zip(masks, self.content, strict=True):
                key, value = self._part(copy, slice(shared), is_flat)
                parts.append(self._meet(flat if is_flat else query, key, value, mask))
        return parts

    def _texts(self, texts: Texts, is_flat: bool) -> Copy:
        """Return the candidates' own keys and values, group by group."""
        key, value = self._part(self.content[0], slice(self.slated.known, None), is_flat)
        return texts.lay(key), texts.lay(value)

    def _part(self, copy: Copy, tokens: slice, is_flat: bool) -> Copy:
        """Return keys and values of some content tokens."""
        key, value = part_of(tokens, copy)
        return unrotate(key, turn_of(tokens, self.turn)) if is_flat else key, value

    def _meet(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Part:
        if query.device.type == "cpu":
            return fused(query, key, value, 0.0, False, attn_mask=mask, scale=self.scaling)
        return by_products(query, key, value, mask, self.scaling)


def by_products(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Part:
    """Answer queries as the kernel for CPUs does, on any device."""
    scores = query @ key.mT * scaling
    scores = scores if mask is None else scores + mask
    lse = scores.logsumexp(-1)
    return (scores - lse.unsqueeze(-1)).exp() @ value, lse


def lay_texts(batch: PackedBatch, shared: Int[Tensor, " B"], known: int) -> Texts | None:
    """Find the candidates' texts: they follow the context, each with its [SUM]; None where there is none."""
    after, size = batch.after, batch.prompt.shape[1]
    before = torch.cat([shared[:, None] - 1, after[:, :-1]], dim=1).clamp(min=shared[:, None] - 1)
    length = ((after - before) * batch.is_target).clamp(min=0)
    places = int(length.max())
    if not places:
        return None
    ahead = torch.arange(places - 1, -1, -1, device=after.device)  # tokens of the text behind each place
    index = torch.arange(known, size, device=after.device).expand(len(after), -1).contiguous()
    group = torch.searchsorted(torch.where(batch.is_target, after, size), index).clamp(max=after.shape[1] - 1)
    home = group * places + places - 1 - (after.gather(1, group) - index)
    seen = (ahead < length[:, :, None])[:, :, None] & (ahead >= ahead[:, None])
    return Texts(
        tokens=(after[:, :, None] - ahead - known).clamp(min=0),
        mask=torch.zeros(seen.shape, device=seen.device).masked_fill(~seen, HIDDEN).flatten(0, 1).unsqueeze(1),
        home=home.clamp(min=0, max=after.shape[1] * places - 1),
        is_home=(index >= shared[:, None]) & (batch.prompt[:, known:] > 0),
    )


def _join(one: Part, other: Part) -> Part:
    """Join two answers to one softmax."""
    share = (one[1] - other[1]).sigmoid().unsqueeze(-1)
    return torch.lerp(other[0], one[0], share), torch.logaddexp(one[1], other[1])


def _apart(x: Float[Tensor, "B H S D"]) -> Float[Tensor, "BS H 1 D"]:
    return x.transpose(1, 2).flatten(0, 1).unsqueeze(2)


def _together(x: Float[Tensor, "BS H L D"], rows: int) -> Float[Tensor, "B H SL D"]:
    return x.unflatten(0, (rows, -1)).transpose(1, 2).flatten(2, 3)


def _pick(x: Shaped[Tensor, "B H I D"], index: Int[Tensor, "B J"]) -> Shaped[Tensor, "B H J D"]:
    return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
