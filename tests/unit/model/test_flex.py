"""Law 6 for FlexAttention: it computes what the reference computes, over blocks that miss nothing.

On CPUs the library has no backward, looks at no block, and traces each shape for seconds. So most tests put
`_by_contract` in its place: what its documentation promises, blocks obeyed, in ten lines. Two tests ask the
library itself on a CPU, and its kernels need CUDA.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from itertools import chain
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from dti_ray.config import RunConfig
from dti_ray.data.packing import pack
from dti_ray.errors import ConfigError
from dti_ray.model.attention import choose_backend, flex
from dti_ray.model.attention.plan import AttentionPlan
from dti_ray.model.backbone import ClickModel
from dti_ray.model.batch import PackedBatch, collate
from dti_ray.model.loss import loss_sum
from dti_ray.model.masks import Rules, dense_mask
from tests.builders import make_config, make_model, make_sequences, make_table, train_spec

TOLERANCE = 1e-4
BF16_TOLERANCE = 0.05  # of a gradient's norm
LENGTHS = [14, 5, 23, 1]
NEEDS_CUDA = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="FlexAttention's kernels and its backward need CUDA"
)
LIBRARY = flex._compiled

WINDOWS = st.sampled_from(
    [["packing.window=interactions"], ["packing.window=tokens", "packing.window_tokens=11"], ["packing.window=off"]]
)
CONTEXTS = st.sampled_from(["ordered", "strictly_earlier"]).map(lambda context: [f"prompt.context={context}"])
DEBIASES = st.sampled_from(
    [
        [],
        ["debias.strength=0.4"],
        ["debias.rotary=drop"],
        ["debias.strength=0.3", "debias.rotary=drop", "debias.distance=log1p"],
    ]
)
RESETS = st.sampled_from(
    [
        [],
        ["reset.mode=uniform", "reset.alpha=0.2"],
        ["reset.mode=distance", "reset.alpha=0.7"],
        ["reset.mode=constant", "reset.alpha=0.5"],
        ["reset.mode=constant", "reset.alpha=1.0"],
    ]
)
HEADS = st.sampled_from([[], ["model.heads=2", "model.kv_heads=2"], ["model.heads=4", "model.kv_heads=1"]])
METHODS = st.tuples(WINDOWS, CONTEXTS, DEBIASES, RESETS, HEADS).map(lambda parts: list(chain(*parts)))
EVERYTHING = ["packing.window=interactions", "debias.strength=0.3", "debias.rotary=drop", "reset.mode=distance"]


def _expanded(count: Tensor | None, index: Tensor | None) -> Tensor:
    """Return listed blocks as a matrix [B, MQ, MK] of 0 and 1."""
    assert count is not None
    assert index is not None
    is_listed = torch.arange(index.shape[-1]) < count[:, 0, :, None]
    return torch.zeros(is_listed.shape, dtype=torch.bool).scatter(2, index[:, 0].long(), is_listed)


def _computed(mask: BlockMask) -> Tensor:
    """Return which scores [B, 1, Q, K] a kernel keeps: all of whole blocks, of others those that are asked for."""
    some, whole = (
        _expanded(mask.kv_num_blocks, mask.kv_indices),
        _expanded(mask.full_kv_num_blocks, mask.full_kv_indices),
    )
    assert not (some & whole).any(), "no block is visited twice"
    q, k = (torch.arange(size) for size in mask.seq_lengths)
    b, none = torch.arange(len(some)).view(-1, 1, 1, 1), torch.tensor(0)
    some, whole = (blocks[:, None, q // flex.BLOCK][..., k // flex.BLOCK] for blocks in (some, whole))
    return whole | (some & mask.mask_mod(b, none, q[:, None], k))


def _by_contract(
    query: Tensor, key: Tensor, value: Tensor, score_mod: flex.ScoreMod | None, blocks: BlockMask | None, scale: float
) -> flex.Part:
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    score = query.float() @ key.float().mT * scale
    b, h, q, k = (torch.arange(size).view(-1, *[1] * (3 - i)) for i, size in enumerate(score.shape))
    if score_mod is not None:
        score = score_mod(score, b, h, q, k)
    if blocks is not None:
        score = score.masked_fill(~_computed(blocks), float("-inf"))
    lse = score.logsumexp(-1)
    weights = (score - lse.masked_fill(lse.isinf(), 0.0).unsqueeze(-1)).exp()
    return weights.to(value.dtype) @ value, lse


@pytest.fixture(autouse=True, scope="module")
def _contract_on_cpus() -> Iterator[None]:
    with patch.object(flex, "_compiled", lambda device: _by_contract if device == "cpu" else LIBRARY(device)):
        yield


def _batch(config: RunConfig, prefix: int = 3, k: int | None = 5, row_tokens: int = 90, seed: int = 0) -> PackedBatch:
    table, sequences = make_table(seed, prefix), make_sequences(LENGTHS, seed)
    return collate(list(pack(sequences, table, train_spec(config, k=k, row_tokens=row_tokens))), table)


def _twins(overrides: list[str], prefix: int = 3, seed: int = 0) -> tuple[ClickModel, ClickModel]:
    """Return the same model with the reference's and with FlexAttention's attention."""
    dense, fast = (
        make_model(make_config(*overrides, f"model.attention={backend}"), make_table(seed, prefix), seed)
        for backend in ("dense", "flex")
    )
    return dense, fast


def _log_odds(model: ClickModel, batch: PackedBatch) -> Tensor:
    with torch.no_grad():
        return model(batch)[batch.is_target]


def _gradients(model: ClickModel, batch: PackedBatch) -> dict[str, Tensor]:
    model.zero_grad()
    with patch.object(flex, "_refuse_gradients_on_cpu"):
        loss_sum(model(batch), batch.labels, batch.is_target).backward()
    return {name: weight.grad.float().clone() for name, weight in model.named_parameters() if weight.grad is not None}


def _largest_error(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Return the largest difference of two gradients, relative to the larger of 1 and the gradient's norm."""
    assert found.keys() == wanted.keys()
    return max(((found[name] - wanted[name]).norm() / wanted[name].norm().clamp(min=1)).item() for name in wanted)


@settings(max_examples=15, deadline=None)
@given(
    method=METHODS,
    prefix=st.sampled_from([0, 3]),
    position=st.sampled_from(["pinned", "first"]),
    n=st.integers(1, 9),
    k=st.integers(1, 12) | st.none(),
    row_tokens=st.sampled_from([90, 400]),
    seed=st.integers(0, 99),
)
def test_law_6_logits_and_gradients_equal_the_reference(
    method: list[str], prefix: int, position: str, n: int, k: int | None, row_tokens: int, seed: int
) -> None:
    overrides = [*method, "model.layers=3", f"packing.n={n}", f"prompt.prefix_position={position}"]
    dense, fast = _twins(overrides, prefix, seed)
    batch = _batch(make_config(*overrides), prefix, k, row_tokens, seed)
    with patch.object(flex, "BLOCK", 32):
        assert torch.allclose(_log_odds(fast, batch), _log_odds(dense, batch), atol=TOLERANCE, rtol=0)
        assert _largest_error(_gradients(fast, batch), _gradients(dense, batch)) < TOLERANCE


@settings(max_examples=8, deadline=None)
@given(method=METHODS, is_autocast=st.booleans(), seed=st.integers(0, 99))
def test_law_6_bf16_differs_from_fp32_by_rounding_alone(method: list[str], is_autocast: bool, seed: int) -> None:
    overrides = [*method, "model.layers=2", "packing.n=4"]
    dense, fast = _twins(overrides, seed=seed)
    batch = _batch(make_config(*overrides), seed=seed)
    wanted, reference = _log_odds(dense, batch), dense
    if not is_autocast:
        fast, reference = fast.to(torch.bfloat16), copy.deepcopy(dense).to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
        error, rounding = ((_log_odds(model, batch) - wanted).norm() for model in (fast, reference))
    assert error < 2 * rounding + BF16_TOLERANCE * wanted.norm()


@pytest.mark.parametrize(
    ("method", "prefix"),
    [
        (["packing.window=off"], 0),
        pytest.param(EVERYTHING, 3, marks=pytest.mark.slow),
        pytest.param(["packing.window=tokens", "prompt.context=strictly_earlier"], 3, marks=pytest.mark.slow),
    ],
)
def test_law_6_the_library_traced_on_a_cpu_equals_the_reference(method: list[str], prefix: int) -> None:
    dense, fast = _twins([*method, "model.layers=2", "packing.n=4"], prefix)
    batch = _batch(make_config(*method), prefix)
    with patch.object(flex, "_compiled", LIBRARY):
        assert torch.allclose(_log_odds(fast, batch), _log_odds(dense, batch), atol=TOLERANCE, rtol=0)


@pytest.mark.slow
def test_more_kinds_of_calls_than_dynamo_allows_by_itself_are_all_compiled() -> None:
    with patch.object(flex, "_compiled", LIBRARY):
        for size in range(1, 11):
            query, key, value = (torch.randn(1, 1, tokens, 2 * size) for tokens in (3, 5, 5))
            out, lse = flex._attend(query, key, value, 0.5)
            wanted = _by_contract(query, key, value, None, None, 0.5)
            assert torch.allclose(out, wanted[0], atol=TOLERANCE)
            assert torch.allclose(lse, wanted[1], atol=TOLERANCE)


def _flex(batch: PackedBatch, config: RunConfig) -> flex.Flex:
    layers, embeddings = torch.nn.ModuleList(), torch.empty(0)
    return flex.Flex(AttentionPlan(batch, Rules.of(config.packing), config.debias, config.reset, layers, embeddings))


@settings(max_examples=40, deadline=None)
@given(
    window=WINDOWS,
    context=CONTEXTS,
    n=st.integers(1, 9),
    k=st.integers(1, 12) | st.none(),
    block=st.sampled_from([4, 8, 16]),
    row_tokens=st.sampled_from([90, 400]),
    copies=st.sampled_from([1, 2]),
    seed=st.integers(0, 99),
)
def test_partial_and_whole_blocks_together_are_the_dense_mask(
    window: list[str], context: list[str], n: int, k: int | None, block: int, row_tokens: int, copies: int, seed: int
) -> None:
    config = make_config(*window, *context, f"packing.n={n}")
    batch = _batch(config, 3, k, row_tokens, seed)
    prefix, content, _ = sizes = [batch.prefix_size, *batch.prompt.shape[1:], *batch.after.shape[1:]]
    dense = dense_mask(batch, Rules.of(config.packing))[:, prefix:, prefix : prefix + content]
    is_real = torch.cat([batch.prompt > 0, batch.is_target], dim=1)
    wanted = (dense & is_real.unsqueeze(-1)).split(sizes[1:], dim=1)
    with patch.object(flex, "BLOCK", block):
        for kind, expected in zip(("content", "sum"), wanted, strict=True):
            found = _computed(_flex(batch, config).layout(kind, copies, heads=4).blocks)[:, 0]
            filled = content if copies == 1 else -(-content // block) * block
            for first in range(0, copies * filled, filled):
                assert torch.equal(found[:, :, first : first + content], expected)
                assert not found[:, :, first + content : first + filled].any()


def test_a_long_row_visits_few_blocks_and_asks_in_fewer() -> None:
    lengths = [1200, 300, 900]
    table, sequences = make_table(longest=12), make_sequences(lengths)
    visited, whole = {}, {}
    for window in ("interactions", "tokens", "off"):
        config = make_config(f"packing.window={window}", "packing.n=10", "packing.window_tokens=256")
        row, *_ = pack(sequences, table, train_spec(config, k=None, row_tokens=16_384))
        blocks = _flex(collate([row], table), config).layout("content", 1, heads=4).blocks
        side = blocks.kv_indices.shape[-1]
        assert side > 40
        assert blocks.full_kv_num_blocks is not None
        whole[window] = blocks.full_kv_num_blocks.sum().item() / side
        visited[window] = blocks.kv_num_blocks.sum().item() / side + whole[window]
    assert visited["interactions"] < 3  # a look-back of 80 tokens: its own block and the one before
    assert visited["tokens"] < 5
    assert whole["off"] > visited["off"] - 4, "tokens are asked on the diagonal and where prompts meet"


def test_blocks_of_a_row_of_65536_tokens_are_laid_without_a_matrix_of_its_size() -> None:
    config = make_config("packing.window=interactions")
    size = 65_536
    one = torch.ones(1, size, dtype=torch.long)
    interaction = torch.arange(size).unsqueeze(0) // 12
    after = torch.arange(11, size, 240).unsqueeze(0)
    batch = PackedBatch(
        torch.zeros(1, size + after.shape[1], dtype=torch.long),
        torch.cat([torch.arange(size).unsqueeze(0), after + 1], dim=1),
        one, interaction, interaction, after, torch.ones_like(after, dtype=torch.bool), torch.zeros(after.shape),
    )  # fmt: skip
    fast = _flex(batch, config)
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        blocks = fast.layout("content", 1, heads=4).blocks
    largest = max(event.cpu_memory_usage for event in profile.function_events)
    assert largest < size * 1024, "bytes of one tensor: far below a bit for each pair"
    assert blocks.kv_num_blocks.max() <= 3


def test_spans_refuse_an_operator_that_no_rule_uses() -> None:
    span = flex.Span(torch.tensor([1]), torch.tensor([2]))
    with pytest.raises(TypeError):
        span + 1


def test_auto_takes_flex_on_cuda_and_banded_on_cpus_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    choose_backend.cache_clear()
    with caplog.at_level(logging.INFO):
        assert [choose_backend("auto", device) for device in ("cuda", "cpu", "cuda")] == ["flex", "banded", "flex"]
    assert [record.message.split(" (")[0] for record in caplog.records] == ["attention: flex", "attention: banded"]


def test_banded_is_refused_on_cuda() -> None:
    with pytest.raises(ConfigError, match=r"model\.attention: got banded.*on cuda; expected auto, flex or dense"):
        choose_backend("banded", "cuda")


def test_flex_refuses_to_train_on_a_cpu_and_says_so_once_that_it_is_slow_there(
    caplog: pytest.LogCaptureFixture,
) -> None:
    choose_backend.cache_clear()
    _, fast = _twins(["model.layers=2"])
    batch = _batch(make_config())
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            with pytest.raises(ConfigError, match=r"model\.attention: .*no backward; expected auto, banded or dense"):
                fast(batch)
    assert len(caplog.records) == 1
    assert _log_odds(fast, batch).isfinite().all()


CUDA_METHODS = pytest.mark.parametrize(
    "method",
    [
        ["packing.window=off"],
        ["packing.window=tokens", "packing.window_tokens=40", "prompt.context=strictly_earlier"],
        ["packing.window=interactions", "debias.strength=0.4", "reset.mode=uniform"],
        EVERYTHING,
        ["packing.window=interactions", "reset.mode=constant", "reset.alpha=1.0", "model.kv_heads=1"],
        ["packing.window=off", "model.hidden_size=96", "model.heads=4"],  # heads of 24: no power of two
    ],
    ids=lambda method: " ".join(method),
)


@NEEDS_CUDA
@CUDA_METHODS
@pytest.mark.parametrize("prefix", [0, 3])
def test_on_cuda_logits_and_gradients_equal_the_reference_in_fp32(method: list[str], prefix: int) -> None:
    overrides = [*method, "model.layers=3", "packing.n=4"]
    dense, fast = (model.to("cuda") for model in _twins(overrides, prefix))
    for row_tokens in (400, 250):  # the second shape is traced as a dynamic one
        batch = _batch(make_config(*overrides), prefix, row_tokens=row_tokens).to("cuda")
        assert torch.allclose(_log_odds(fast, batch), _log_odds(dense, batch), atol=1e-3, rtol=0)
        assert _largest_error(_gradients(fast, batch), _gradients(dense, batch)) < 1e-3


@NEEDS_CUDA
@CUDA_METHODS
@pytest.mark.parametrize("is_autocast", [False, True])
def test_on_cuda_gradients_in_bf16_are_near_those_of_fp32(method: list[str], is_autocast: bool) -> None:
    overrides = [*method, "model.layers=3", "packing.n=4"]
    dense, fast = (model.to("cuda") for model in _twins(overrides))
    batch = _batch(make_config(*overrides), row_tokens=400).to("cuda")
    wanted, reference = _gradients(dense, batch), dense
    if not is_autocast:
        fast, reference = fast.to(torch.bfloat16), copy.deepcopy(dense).to(torch.bfloat16)
    with torch.autocast("cuda", torch.bfloat16, enabled=is_autocast):
        found, rounded = _gradients(fast, batch), _gradients(reference, batch)
    for name, gradient in wanted.items():
        error, rounding = ((other[name] - gradient).norm() for other in (found, rounded))
        assert error < 2 * rounding + BF16_TOLERANCE * gradient.norm(), name
