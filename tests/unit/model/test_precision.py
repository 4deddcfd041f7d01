"""bf16: how far logits may move, and that the distance bias of [SUM] queries stays exact."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from dti_ray.data.packing import PackedRow, pack
from dti_ray.data.prompts import TokenTable
from dti_ray.model.attention import make_plan
from dti_ray.model.backbone import ClickModel
from dti_ray.model.batch import PackedBatch, collate
from dti_ray.model.masks import bias_slopes
from tests.builders import make_config, make_model, make_sequences, make_table, train_spec

WINDOW = 200  # interactions, the longest that is promised
HEADS = 9  # as SmolLM2 has; of 8 heads the slopes are powers of two, which bf16 holds exactly
ROUNDING = 2**-8  # of one number in bf16, relative
LOGIT_TOLERANCE = 0.15  # of logits whose standard deviation is about 1, after four layers

both_backends = pytest.mark.parametrize("backend", ["dense", "banded"])


def _long_row(table: TokenTable) -> PackedRow:
    spec = train_spec(make_config(), k=1, n=WINDOW, row_tokens=450)
    return list(pack(make_sequences([WINDOW + 21]), table, spec))[-1]


def _scores(model: ClickModel, batch: PackedBatch) -> Tensor:
    with torch.no_grad():
        return model(batch)[batch.is_target].float()


@pytest.mark.parametrize("how", ["autocast", "weights"])
@both_backends
@pytest.mark.parametrize("window", ["interactions", "off"])
def test_logits_in_bf16_stay_near_those_in_fp32(how: str, backend: str, window: str) -> None:
    config = make_config(
        "model.layers=4", f"model.attention={backend}", f"packing.window={window}", "packing.n=8",
        "reset.mode=distance", "debias.strength=0.5",
    )  # fmt: skip
    table = make_table()
    model = make_model(config, table)
    batch = collate(list(pack(make_sequences([40, 25, 9]), table, train_spec(config, k=10))), table)
    exact = _scores(model, batch)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        rounded = _scores(model if how == "autocast" else model.to(torch.bfloat16), batch)
    assert exact.std() > 0.5
    assert (rounded - exact).abs().max() < LOGIT_TOLERANCE


@both_backends
def test_distance_bias_in_bf16_blinds_no_head_at_the_longest_window(backend: str) -> None:
    """Queries and keys are zero, so the weights are the bias alone; values tell the interactions apart."""
    config = make_config(f"packing.n={WINDOW}", "packing.window=interactions", "debias.strength=1.0")
    table = make_table(longest=1)
    row = _long_row(table)
    batch = collate([row], table)
    model = make_model(config, table)
    plan = make_plan(batch, model.rules, config.debias, config.reset, backend, model.decoder.layers, torch.empty(0))
    size, prefix, content = batch.tokens.shape[1], batch.prefix_size, len(row.tokens)
    nothing = torch.zeros(1, HEADS, size, size, dtype=torch.bfloat16)
    plan.rotary = (torch.ones_like(nothing[:, 0]), torch.zeros_like(nothing[:, 0]))
    value = torch.eye(size, dtype=torch.bfloat16).expand(1, HEADS, size, size)
    weights = plan.attend(nothing, [(nothing, value)], 1.0, 0.0)[0, :, -1].double()

    after = int(row.after[-1])
    target, cut = int(row.interaction[after]), int(row.cut[after])
    d = torch.from_numpy(np.where(row.interaction == target, 0, cut - row.interaction))
    is_own = row.prompt == row.prompt[after]
    seen = torch.from_numpy(is_own & (row.interaction >= cut - WINDOW) & (np.arange(content) <= after))
    bias = torch.full([HEADS, size], -torch.inf, dtype=torch.float64)
    slopes = bias_slopes(HEADS, d.device).double()[:, None]
    bias[:, prefix : prefix + content] = (-slopes * d).masked_fill(~seen, -torch.inf)
    bias[:, :prefix], bias[:, -1] = 0.0, 0.0
    expected = bias.softmax(-1)
    torch.testing.assert_close(weights, expected, rtol=ROUNDING, atol=1e-9)
    assert int(d[seen].max()) == WINDOW
    assert (weights[-1, prefix : prefix + content][seen] > 0).all(), "the flattest head sees the whole window"


def test_distance_bias_contrast_computed_in_bf16_it_would_merge_neighbours() -> None:
    far = torch.arange(WINDOW - 10, WINDOW + 1).float()
    bias = -bias_slopes(HEADS, far.device)[:, None] * far
    assert all(len(head.unique()) == len(far) for head in bias)
    assert any(len(head.unique()) < len(far) for head in bias.to(torch.bfloat16))
