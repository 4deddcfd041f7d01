from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from dti_ray.data.packing import pack
from dti_ray.gpus import peak_of
from dti_ray.model.batch import PackedBatch, collate
from dti_ray.model.flops import Work, count_flops, count_work, peak_flops
from dti_ray.model.loss import loss_sum, predicted_text
from dti_ray.model.masks import Rules, dense_distance, dense_mask
from tests.builders import make_config, make_model, make_sequences, make_table, train_spec

WINDOWS = ["off", "interactions", "tokens"]


def batch_of(*overrides: str, lengths: list[int], k: int | None, seed: int = 0, prefix: int = 3) -> PackedBatch:
    config = make_config(*overrides, "packing.row_tokens=100")
    table = make_table(seed, prefix=prefix)
    rng = np.random.default_rng(seed)
    return collate(list(pack(make_sequences(lengths, seed), table, train_spec(config, k=k), rng=rng)), table)


@settings(max_examples=40, deadline=None)
@given(
    window=st.sampled_from(WINDOWS), context=st.sampled_from(["ordered", "strictly_earlier"]),
    n=st.integers(1, 8), k=st.integers(1, 9) | st.none(), prefix=st.sampled_from([0, 3]), seed=st.integers(0, 99),
)  # fmt: skip
def test_pairs_are_those_of_the_dense_mask(
    window: str, context: str, n: int, k: int | None, prefix: int, seed: int
) -> None:
    method = [f"packing.window={window}", "packing.window_tokens=7", f"prompt.context={context}", f"packing.n={n}"]
    batch = batch_of(*method, lengths=[9, 4, 13, 1], k=k, seed=seed, prefix=prefix)
    rules = Rules.of(make_config(*method).packing)
    is_real = torch.cat([torch.ones_like(batch.tokens[:, :prefix]), batch.prompt > 0, batch.is_target], dim=1) > 0
    mask = dense_mask(batch, rules) & is_real[:, :, None] & is_real[:, None, :]
    far = mask & (dense_distance(batch) > 0)
    sums = prefix + batch.prompt.shape[1]
    found = count_work(batch, rules)
    assert found.tokens == int(is_real.sum())
    assert (found.prefix, found.sums) == (len(batch.tokens) * prefix, int(batch.is_target.sum()))
    assert found.content_pairs == int(mask[:, :sums].sum())
    assert found.sum_pairs == int(mask[:, sums:].sum())
    assert found.far_content_pairs == int(far[:, :sums].sum())
    assert found.far_sum_pairs == int(far[:, sums:].sum())


def dense_work(batch: PackedBatch) -> Work:
    """Return the work of the reference, which meets all T x T pairs in every layer, the last one too."""
    rows, size = batch.tokens.shape
    sums = batch.after.shape[1]
    texts = int(predicted_text(batch).sum())
    return Work(content=rows * (size - sums), sums=rows * sums, sum_pairs=rows * size * size, text_tokens=texts)


@pytest.mark.parametrize("text_weight", [0.0, 0.1])
@pytest.mark.parametrize("trained", ["all", "head only"])
def test_flops_equal_those_that_torch_counts_on_the_dense_path(trained: str, text_weight: float) -> None:
    texts = f"optim.text_weight={text_weight}"
    config = make_config("model.attention=dense", "model.layers=3", "packing.window=off", texts)
    table = make_table(prefix=0)
    rows = list(pack(make_sequences([12, 7]), table, train_spec(config, k=5)))
    batch = collate(rows, table)
    model = make_model(config, table)
    if trained == "head only":
        for parameter in model.decoder.parameters():
            parameter.requires_grad_(False)
    with FlopCounterMode(display=False) as forward:
        log_odds, text_loss = model(batch, is_text_asked=True)
        loss = loss_sum(log_odds, batch.labels, batch.is_target) + text_loss
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    work = dense_work(batch)
    expected = count_flops(model, work)
    early = 0  # of the second loss, whose gradients are made on the way forward
    if text_weight:
        early = 2 * model.words.numel() * work.text_tokens * (2 if model.words.requires_grad else 1)
    assert forward.get_total_flops() == expected.forward + early
    assert backward.get_total_flops() == expected.backward - early


def test_a_dual_reset_makes_keys_twice_and_meets_other_interactions_twice() -> None:
    work = Work(prefix=2, content=30, sums=4, content_pairs=300, sum_pairs=50, far_content_pairs=200, far_sum_pairs=40)
    table = make_table()
    plain, dual = (
        count_flops(make_model(make_config("model.layers=2", *reset), table), work)
        for reset in ([], ["reset.mode=constant", "reset.alpha=0.5"])
    )
    kv_width, width = 2 * 8, 32
    keys, pairs = 2 * 2 * width * kv_width * work.tokens, 4 * 32 * work.far_sum_pairs
    assert dual.forward - plain.forward == keys + pairs  # layer 1 alone: in layer 0 both copies are one
    assert dual.backward - plain.backward == 2 * (keys + pairs)


def test_work_adds_up() -> None:
    assert Work(1, 2, 3, 4, 5, 6, 7, 8) + Work(1, 1, 1, 1, 1, 1, 1, 1) == Work(2, 3, 4, 5, 6, 7, 8, 9)
    assert Work(1, 2, 3).tokens == 6


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA RTX A1000", None), ("NVIDIA A10G", None), ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
    ],
)  # fmt: skip
def test_a_gpu_is_known_by_its_whole_name(name: str, peak: float | None) -> None:
    assert peak_of(name) == peak


def test_the_peak_of_a_cpu_is_not_known() -> None:
    assert peak_flops(torch.device("cpu")) is None
