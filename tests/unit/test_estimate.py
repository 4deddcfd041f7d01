from __future__ import annotations

from pathlib import Path

import pytest

from dti_ray.config import RunConfig
from dti_ray.data.interactions import read_all
from dti_ray.data.mixture import mean_targets
from dti_ray.data.packing import pack
from dti_ray.estimate import Cost, _saved_bytes, estimate
from dti_ray.model.backbone import build_model
from dti_ray.model.batch import collate
from dti_ray.model.flops import Work, count_flops, count_work
from tests.builders import make_config, make_table, train_spec, write_dataset

LENGTHS = [30, 25, 41, 18, 60, 33]
PEAK, MFU = 1e12, 0.5


def costs(root: Path, *overrides: str) -> tuple[RunConfig, list[Cost]]:
    config = make_config("packing.n=4", "packing.k=5", "optim.epochs=3", "cluster.workers=2", *overrides)
    return config, estimate(config, write_dataset(root, LENGTHS), make_table(), PEAK, MFU)


def test_tokens_and_flops_are_those_of_the_rows_that_would_be_packed(tmp_path: Path) -> None:
    config, (sliding, packed) = costs(tmp_path)
    table, users = make_table(), read_all(write_dataset(tmp_path / "again", LENGTHS))
    model = build_model(config, table)
    for cost, k in ((sliding, 1), (packed, 5)):
        batches = [collate([row], table) for row in pack(users, table, train_spec(config, k=k))]
        work = sum((count_work(batch, model.rules) for batch in batches), Work())
        assert cost.k == k
        assert cost.tokens == pytest.approx(3 * work.tokens)
        assert cost.flops == pytest.approx(3 * count_flops(model, work).train)
        assert cost.device_hours == pytest.approx(cost.flops / (PEAK * MFU) / 3600)
    assert sliding.tokens > 2 * packed.tokens


@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_activations_of_shallow_copies_foretell_those_of_the_whole_depth(tmp_path: Path, checkpointing: str) -> None:
    overrides = ["model.layers=6", f"model.gradient_checkpointing={checkpointing}"]
    config, (_, packed) = costs(tmp_path, *overrides)
    table, users = make_table(), read_all(write_dataset(tmp_path / "again", LENGTHS))
    row = max(pack(users, table, train_spec(config, row_tokens=1024)), key=lambda row: row.size_tokens)
    measured = _saved_bytes(build_model(config, table), row, table, config)
    if checkpointing == "true":  # and one layer, computed again
        whole = make_config("packing.n=4", "packing.k=5", "model.layers=6")
        everything = _saved_bytes(build_model(whole, table), row, table, whole)
        assert measured < everything / 3
        measured += everything // 6
    assert packed.memory.activations / packed.pass_tokens == pytest.approx(measured / row.size_tokens, rel=0.1)


def test_mixture_costs_what_its_draws_cost(tmp_path: Path) -> None:
    _, (sliding, packed) = costs(tmp_path / "plain")
    _, (_, mixed) = costs(tmp_path / "mixed", "packing.k_min=1")
    assert (mixed.k, mixed.k_min, packed.k_min) == (5, 1, None)
    assert sliding.tokens > mixed.tokens > packed.tokens
    per_prompt = (sliding.tokens - packed.tokens) / (1 - 1 / 5)  # context tokens of a prompt of its own, all targets
    assert mixed.tokens == pytest.approx(packed.tokens + per_prompt * (1 / mean_targets(1, 5) - 1 / 5), rel=0.1)


def test_sliding_tail_costs_its_share(tmp_path: Path) -> None:
    _, (sliding, packed) = costs(tmp_path / "plain")
    _, (_, tailed) = costs(tmp_path / "tail", "optim.sliding_tail=0.25")
    assert tailed.tokens == pytest.approx(0.75 * packed.tokens + 0.25 * sliding.tokens, abs=1)
    assert tailed.memory.total == max(packed.memory.total, sliding.memory.total)


def test_zero_divides_what_it_shards(tmp_path: Path) -> None:
    by_stage = [costs(tmp_path / str(stage), f"train.zero_stage={stage}")[1][0].memory for stage in range(4)]
    none, one, two, three = by_stage
    assert one.optimizer == pytest.approx((none.optimizer + none.weights) / 2)  # and the fp32 copy of the weights
    assert (one.gradients, two.gradients) == (none.gradients, none.gradients // 2)
    assert (two.weights, three.weights) == (none.weights, none.weights // 2)


def test_frozen_weights_have_neither_gradients_nor_moments(tmp_path: Path) -> None:
    _, (full, _) = costs(tmp_path / "full")
    _, (adapted, _) = costs(tmp_path / "lora", "lora.rank=2")
    assert adapted.memory.weights > full.memory.weights
    assert adapted.memory.gradients < full.memory.gradients / 4
    assert adapted.memory.optimizer < full.memory.optimizer / 4


def test_predicted_texts_cost_the_logits_of_the_whole_vocabulary(tmp_path: Path) -> None:
    _, (_, plain) = costs(tmp_path / "plain")
    _, (_, texts) = costs(tmp_path / "texts", "optim.text_weight=0.1")
    assert texts.memory.logits > 10 * plain.memory.logits
    assert texts.flops > plain.flops
