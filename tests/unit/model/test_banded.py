"""Law 6 for the path that trains on CPUs: banded equals dense, forward and backward."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dti_ray.data.packing import end_to_end, pack
from dti_ray.model.attention.banded import Part, read
from dti_ray.model.backbone import ClickModel
from dti_ray.model.batch import PackedBatch, collate
from dti_ray.model.loss import loss_sum
from tests.builders import make_config, make_model, make_sequences, make_table, train_spec

TOLERANCE = 1e-4
LENGTHS = [14, 5, 23, 1, 40]
RESETS = [
    [],
    ["reset.mode=uniform", "reset.alpha=0.2"],
    ["reset.mode=distance", "reset.alpha=0.7"],
    ["reset.mode=constant", "reset.alpha=1.0"],
]
DEBIASES = [[], ["debias.strength=0.4"], ["debias.strength=0.3", "debias.rotary=drop", "debias.distance=log1p"]]


@settings(max_examples=30, deadline=None)
@given(
    window=st.sampled_from(["off", "interactions", "tokens"]),
    context=st.sampled_from(["ordered", "strictly_earlier"]),
    reset=st.sampled_from(RESETS),
    debias=st.sampled_from(DEBIASES),
    kv_heads=st.sampled_from([1, 2, 4]),
    prefix=st.sampled_from([0, 3]),
    position=st.sampled_from(["pinned", "first"]),
    n=st.integers(1, 9),
    k=st.integers(1, 12) | st.none(),
    is_joined=st.booleans(),
    seed=st.integers(0, 99),
)
def test_law_6_banded_equals_dense_forward_and_backward(
    window: str, context: str, reset: list[str], debias: list[str], kv_heads: int, prefix: int,
    position: str, n: int, k: int | None, is_joined: bool, seed: int,
) -> None:  # fmt: skip
    method = [
        f"packing.window={window}", "packing.window_tokens=17", f"prompt.context={context}", *reset, *debias,
        f"model.kv_heads={kv_heads}", f"packing.n={n}", "model.layers=3", f"prompt.prefix_position={position}",
    ]  # fmt: skip
    table, sequences = make_table(seed, prefix), make_sequences(LENGTHS, seed)
    rows = list(pack(sequences, table, train_spec(make_config(*method), k=k, row_tokens=150)))
    batch = collate([end_to_end(rows)] if is_joined else rows, table)
    dense, banded = (
        make_model(make_config(*method, f"model.attention={backend}"), table, seed) for backend in ("dense", "banded")
    )
    (wanted, slopes), (found, ours) = _answers(dense, batch), _answers(banded, batch)
    assert torch.allclose(found, wanted, atol=TOLERANCE, rtol=0)
    for name, slope in slopes.items():
        assert (ours[name] - slope).norm() / slope.norm().clamp(min=1) < TOLERANCE, name


def _answers(model: ClickModel, batch: PackedBatch) -> tuple[Tensor, dict[str, Tensor]]:
    log_odds = model(batch)
    loss_sum(log_odds, batch.labels, batch.is_target).backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return log_odds.detach()[batch.is_target], gradients


@pytest.mark.parametrize("hidden", [False, True], ids=["all parts seen", "one part hidden"])
def test_parts_joined_are_one_softmax(hidden: bool) -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, requires_grad=True)

    query = random(2, 3, 5, 8)
    keys, values = [random(2, 3, size, 8) for size in (4, 7)], [random(2, 3, size, 8) for size in (4, 7)]
    masks = [torch.zeros(2, 1, 5, size) for size in (4, 7)]
    if hidden:
        masks[0] += -1e30
    parts = [Part(query, key, value, mask) for key, value, mask in zip(keys, values, masks, strict=True)]
    joined = read(parts, 0.4)
    scores = query @ torch.cat(keys, 2).mT * 0.4 + torch.cat(masks, -1)
    wanted = scores.softmax(-1) @ torch.cat(values, 2)
    assert torch.allclose(joined, wanted, atol=1e-6)
    for found, expected in zip(
        torch.autograd.grad(joined.sin().sum(), [query, *keys, *values]),
        torch.autograd.grad(wanted.sin().sum(), [query, *keys, *values]),
        strict=True,
    ):
        assert torch.allclose(found, expected, atol=1e-5)
