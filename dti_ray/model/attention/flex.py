"""The fast path on CUDA: FlexAttention over the blocks that the rules leave; cost T x W, linear in a row's length.

Stage: attention. In: one layer's queries, keys and values. Out: what each token reads.
Invariant: the rules are masks.py's own at both sizes. Token by token FlexAttention calls `visible`; block by
block `visible` is asked with spans (least and greatest coordinate of a block) in place of numbers, and answers
"for all pairs" or "for some". So no T x T tensor is ever made, only (T / BLOCK)^2 verdicts, once per batch.

    content queries  read  content (1 or 2 copies, rotated)  and the prefix (unrotated, if it is pinned)
    [SUM] queries    read  the same, in fp32                 and each itself
    prefix queries   read  the prefix, causally

Parts that differ in rotation are calls of their own; their log-sum-exps join them to one softmax (the
arithmetic of ring attention; Liu et al. 2023, arXiv 2310.01889). On CPUs FlexAttention has no backward and
runs unfused: good for tests and for scoring a few rows, no more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import cast, no_type_check

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention
from torch.nn.functional import pad
from torch.nn.functional import scaled_dot_product_attention as sdpa

from dti_ray.errors import ConfigError, Fault
from dti_ray.model.attention.plan import (
    HIDDEN,
    AttentionPlan,
    Copy,
    bias_growth,
    for_all_heads,
    reset_weight,
)
from dti_ray.model.attention.rotary import unrotate
from dti_ray.model.masks import (
    Coordinates,
    Rules,
    bias_slopes,
    content_coordinates,
    distance,
    sum_coordinates,
    visible,
)

BLOCK = 128  # FlexAttention's own; its kernels tile it further
LEAST_WIDTH = 16  # of a head in a Triton kernel; narrower heads are padded with zeros
NOBODY = -1  # prompt of padding that asks; no key has it, so padding reads nothing
BEYOND = 2**29  # behind every coordinate; the difference of two such still fits in 32 bits
VARIANTS = 64  # kernels of one process: kinds of queries, precisions, shapes, with and without gradients

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
Part = tuple[Float[Tensor, "B H Q D"], Float[Tensor, "B H Q"]]  # what some of the keys answer, and log-sum-exp


@dataclass(frozen=True)
class Layout:
    """One kind of queries against 1 or 2 copies of content: where to compute, and what to add to scores."""

    blocks: BlockMask
    score_mod: ScoreMod | None


class Flex:
    """Layouts of one batch; they are made once and serve all layers."""

    def __init__(self, plan: AttentionPlan) -> None:
        self.plan = plan
        self.keys = content_coordinates(plan.batch).map(lambda values: values.int())
        sums = sum_coordinates(plan.batch).map(lambda values: values.int())
        self.queries = {"content": _asking(self.keys), "sum": _asking(sums)}
        self.layouts: dict[tuple[str, int], Layout] = {}

    def __call__(
        self, query: Tensor, copies: Sequence[Copy], scaling: float, dropout: float
    ) -> Float[Tensor, "B H T D"]:
        """See `Attend`.

        Raises:
            ConfigError: gradients are wanted on a CPU.
        """
        assert dropout == 0.0, "attention dropout is refused when the model is built"
        _refuse_gradients_on_cpu(query, copies)
        with torch.autocast(query.device.type, enabled=False):  # it would take [SUM] scores to bf16 again
            return self._answer(query, copies, scaling).to(query.dtype)

    def layout(self, kind: str, copies: int, heads: int) -> Layout:
        """Return the layout of `content` or `sum` queries, made at the first call."""
        if (kind, copies) not in self.layouts:
            queries = self.queries[kind]
            keys = _repeated(self.keys, copies)
            score_mod = make_score_mod(self.plan, queries, keys, copies, heads if kind == "sum" else None)
            blocks = make_block_mask(queries, self.keys, self.plan.rules, copies)
            self.layouts[kind, copies] = Layout(blocks, score_mod)
        return self.layouts[kind, copies]

    def _answer(self, query: Tensor, copies: Sequence[Copy], scaling: float) -> Tensor:
        keys = LayerKeys(copies, self.plan)
        sums = self.plan.sizes[2]
        sum_out = self._read_sums(query[:, :, -sums:], keys, scaling)
        if query.shape[2] == sums:  # the last layer asks for [SUM]s alone
            return sum_out
        prefix, content = query[:, :, :-sums].split(self.plan.sizes[:2], dim=2)
        layout = self.layout("content", len(copies), query.shape[1])
        parts = [_attend(content, *keys.content(is_flat=False), scaling, layout)]
        if not prefix.shape[2]:
            return torch.cat([parts[0][0], sum_out.to(parts[0][0].dtype)], dim=2)
        is_flat = self.plan.is_pinned
        asking = unrotate(content, keys.turns[1]) if is_flat else content
        parts.append(_attend(asking, *keys.prefix(is_flat), scaling))
        content_out, (key, value) = _merge(parts), keys.ahead
        prefix_out = sdpa(
            prefix.to(value.dtype), key.to(value.dtype), value, is_causal=True, scale=scaling, enable_gqa=True
        )
        return torch.cat([part.to(value.dtype) for part in (prefix_out, content_out, sum_out)], dim=2)

    def _read_sums(self, query: Tensor, keys: LayerKeys, scaling: float) -> Float[Tensor, "B H S D"]:
        """[SUM] queries are few: scores and softmax in fp32, whatever the model's precision."""
        exact, is_flat, rotated = keys.float(), self.plan.debias.rotary == "drop", _exact(query)
        flat = unrotate(rotated, keys.turns[2])
        layout = self.layout("sum", len(exact.contents), query.shape[1])
        parts = [_attend(flat if is_flat else rotated, *exact.content(is_flat), scaling, layout)]
        if self.plan.sizes[0]:
            is_flat = is_flat or self.plan.is_pinned
            parts.append(_attend(flat if is_flat else rotated, *exact.prefix(is_flat), scaling))
        ((key, value),) = for_all_heads([exact.own], query.shape[1])
        return _merge([*parts, (value, (rotated * key).sum(-1) * scaling)])  # rotating both alike changes nothing


class LayerKeys:
    """The keys and values of one layer, cut as both kinds of queries need them."""

    def __init__(self, copies: Sequence[Copy], plan: AttentionPlan) -> None:
        self.copies, self.plan = copies, plan
        self.turns = list(zip(*(part.split(plan.sizes, dim=1) for part in plan.rotary), strict=True))
        split = [tuple(zip(*(x.split(plan.sizes, dim=2) for x in copy), strict=True)) for copy in copies]
        self.ahead, _, self.own = split[0]
        self.contents: list[Copy] = [part[1] for part in split]

    def float(self) -> LayerKeys:
        """Return all of them in fp32, in one memory layout, so that the last layer needs no kernels of its own."""
        return LayerKeys([(_exact(key), _exact(value)) for key, value in self.copies], self.plan)

    def prefix(self, is_flat: bool) -> Copy:
        """Return the prefix."""
        key, value = self.ahead
        return unrotate(key, self.turns[0]) if is_flat else key, value

    def content(self, is_flat: bool) -> Copy:
        """Return the copies of content one behind the other, each but a single one filled up to whole blocks."""
        pairs = self.contents
        if is_flat:
            pairs = [(unrotate(key, self.turns[1]), value) for key, value in pairs]
        if len(pairs) == 1:
            return pairs[0]
        fill = (0, 0, 0, -pairs[0][0].shape[2] % BLOCK)
        key, value = (torch.cat([pad(x, fill) for x in side], dim=2) for side in zip(*pairs, strict=True))
        return key, value


def make_score_mod(
    plan: AttentionPlan, queries: Coordinates, keys: Coordinates, copies: int, heads: int | None
) -> ScoreMod | None:
    """Return what is added to scores: debias' bias and, of two copies, the logarithms of their weights.

    Args:
        plan: debias, reset and rules.
        queries: [B, Q].
        keys: of all copies, one behind the other, [B, K].
        copies: 1 or 2.
        heads: of [SUM] queries; None: content queries, which have no bias.
    """
    device, n, debias = keys.prompt.device, plan.rules.n, plan.debias
    has_bias = heads is not None and debias.strength > 0
    if copies == 1 and not has_bias:
        return None
    slopes = -debias.strength * bias_slopes(heads or 1, device)
    alpha = reset_weight(torch.arange(n + 1, device=device), plan.reset, n)  # the same from distance n on
    weights = torch.stack([torch.log1p(-alpha), torch.log(alpha)]).clamp(min=HIDDEN)
    copy = torch.arange(copies, device=device).repeat_interleave(keys.prompt.shape[1] // copies)

    @no_type_check  # FlexAttention counts positional arguments
    def score_mod(score, b, h, q, k):
        d = distance(_at(queries, b, q), _at(keys, b, k))
        if has_bias:
            score = score + slopes[h] * bias_growth(d, debias)
        if copies == 2:
            score = score + weights[copy[k], d.clamp(min=0, max=n)]
        return score

    return score_mod


def make_block_mask(queries: Coordinates, keys: Coordinates, rules: Rules, copies: int) -> BlockMask:
    """Return the blocks to compute, in closed form: whole ones, and those where tokens must be asked.

    Args:
        queries: [B, Q].
        keys: of one copy of content, [B, C].
        rules: the window.
        copies: how many copies of the keys follow each other.
    """
    some, all_ = block_verdicts(queries, keys, rules)
    some, all_ = (blocks.repeat(1, 1, copies) for blocks in (some & ~all_, all_))
    repeated = _repeated(keys, copies)

    @no_type_check
    def mask_mod(b, h, q, k):  # noqa: ARG001 - one mask for all heads
        return visible(_at(queries, b, q), _at(repeated, b, k), rules)

    return BlockMask.from_kv_blocks(
        *_listed(some),
        *_listed(all_),
        BLOCK_SIZE=BLOCK,
        mask_mod=cast("MaskMod", mask_mod),
        seq_lengths=(queries.prompt.shape[1], repeated.prompt.shape[1]),
    )


def block_verdicts(
    queries: Coordinates, keys: Coordinates, rules: Rules
) -> tuple[Bool[Tensor, "B MQ MK"], Bool[Tensor, "B MQ MK"]]:
    """Say of each pair of blocks whether some query may see some key, and whether all surely see all.

    Spans forget which values occur together, so `some` may be too generous and `all` too strict: both are safe,
    since the tokens of a block that is not whole are asked one by one.
    """
    asking, asked = (_spans(side) for side in (queries, keys))
    all_, some = visible(
        asking.map(lambda span: span[:, :, None]), asked.map(lambda span: span[:, None, :]), rules
    ).unbind(0)
    is_real = _in_blocks(queries.prompt > 0).all(-1)[:, :, None] & _in_blocks(keys.prompt > 0).all(-1)[:, None, :]
    return some, all_ & some & is_real


class Span:
    """Least and greatest value of a coordinate in blocks; comparing tells [for all pairs, for some pair].

    It knows the operators that the rules use, and no others, so that a new one fails loudly.
    """

    def __init__(self, low: Tensor, high: Tensor) -> None:
        self.low, self.high = low, high

    def __getitem__(self, index: tuple[slice | None, ...]) -> Span:
        return Span(self.low[index], self.high[index])

    def __sub__(self, other: Span | int) -> Span:
        other = self._span(other)
        return Span(self.low - other.high, self.high - other.low)

    def __le__(self, other: Span | int) -> Bool[Tensor, "2 B MQ MK"]:
        other = self._span(other)
        return torch.stack([self.high <= other.low, self.low <= other.high])

    def __lt__(self, other: Span | int) -> Bool[Tensor, "2 B MQ MK"]:
        other = self._span(other)
        return torch.stack([self.high < other.low, self.low < other.high])

    def __ge__(self, other: Span | int) -> Bool[Tensor, "2 B MQ MK"]:
        return self._span(other) <= self

    def __eq__(self, other: object) -> Bool[Tensor, "2 B MQ MK"]:  # pyright: ignore[reportIncompatibleMethodOverride]
        assert isinstance(other, Span | int)
        return (self <= other) & (self >= other)

    def _span(self, value: Span | int) -> Span:
        return value if isinstance(value, Span) else Span(*[torch.full_like(self.low, value)] * 2)


def _spans(coordinates: Coordinates) -> Coordinates:
    """Return the spans [B, M] of blocks, padding left out; the span of nothing contains nothing."""
    is_real = _in_blocks(coordinates.prompt > 0)

    def span(values: Int[Tensor, "B I"]) -> Tensor:
        blocks = _in_blocks(values)
        low = blocks.masked_fill(~is_real, BEYOND).amin(-1)
        return cast("Tensor", Span(low, blocks.masked_fill(~is_real, -BEYOND).amax(-1)))

    return coordinates.map(span)


def _in_blocks(values: Tensor) -> Tensor:
    return pad(values, (0, -values.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))


def _listed(blocks: Bool[Tensor, "B MQ MK"]) -> tuple[Int[Tensor, "B 1 MQ"], Int[Tensor, "B 1 MQ MK"]]:
    """Return how many key blocks each query block has, and which come first."""
    order = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1).int().unsqueeze(1), order.int().unsqueeze(1)


def _asking(coordinates: Coordinates) -> Coordinates:
    return replace(coordinates, prompt=coordinates.prompt.masked_fill(coordinates.prompt == 0, NOBODY))


def _repeated(keys: Coordinates, copies: int) -> Coordinates:
    """Lay coordinates out as `LayerKeys.content` does keys."""
    if copies == 1:
        return keys
    return keys.map(lambda values: pad(values, (0, -values.shape[1] % BLOCK)).repeat(1, copies))


@no_type_check
def _at(coordinates, row, index):
    return Coordinates(
        coordinates.prompt[row, index], coordinates.interaction[row, index], coordinates.cut[row, index],
        coordinates.position[row, index], coordinates.order[row, index],
    )  # fmt: skip


def _exact(x: Tensor) -> Tensor:
    return x.float().contiguous()


def _attend(query: Tensor, key: Tensor, value: Tensor, scaling: float, layout: Layout | None = None) -> Part:
    """Answer queries from some of their keys, in the values' precision; without a layout from all of them."""
    query, key, width = query.to(value.dtype), key.to(value.dtype), query.shape[-1]
    if query.is_cuda and width < LEAST_WIDTH:
        query, key, value = (pad(x, (0, LEAST_WIDTH - width)) for x in (query, key, value))
    blocks, score_mod = (layout.blocks, layout.score_mod) if layout else (None, None)
    with torch._dynamo.config.patch(recompile_limit=VARIANTS):
        out, lse = _compiled(query.device.type)(query, key, value, score_mod, blocks, scaling)
    return out[..., :width], lse


@cache
def _compiled(device: str) -> Callable[..., Part]:
    """Compile once per process; a kernel that cannot be had is an error, never a T x T fallback."""
    return torch.compile(_flex_attention, fullgraph=True, backend="inductor" if device == "cuda" else "eager")


def _flex_attention(
    query: Tensor, key: Tensor, value: Tensor, score_mod: ScoreMod | None, blocks: BlockMask | None, scaling: float
) -> Part:
    out, more = flex_attention(
        query, key, value, score_mod, blocks, scaling, enable_gqa=True, return_aux=AuxRequest(lse=True),
        kernel_options={"FORCE_USE_FLEX_ATTENTION": True},  # few queries too: one kernel in training and in scoring
    )  # fmt: skip
    assert more.lse is not None
    return out, more.lse


def _merge(parts: Sequence[Part]) -> Float[Tensor, "B H Q D"]:
    """Join answers to one softmax, in fp32."""
    shares = torch.stack([lse for _, lse in parts]).softmax(0).unsqueeze(-1)
    first, *others = (out * share for (out, _), share in zip(parts, shares, strict=True))
    return sum(others, first)


def _refuse_gradients_on_cpu(query: Tensor, copies: Sequence[Copy]) -> None:
    tensors = [query, *(x for copy in copies for x in copy)]
    if query.device.type == "cpu" and torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        problem = "got flex, and gradients are wanted on a CPU, where FlexAttention has no backward"
        raise ConfigError(Fault("model.attention", problem, "auto, banded or dense", "flex on a CPU can only score"))
