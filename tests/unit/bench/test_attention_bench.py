from __future__ import annotations

import torch

from dti_ray.bench.attention import bench_attention, one_row
from tests.builders import make_config

CONFIG = make_config("packing.window=interactions", "packing.n=5", "packing.k=10")


def test_a_row_has_about_the_tokens_asked_for() -> None:
    batch = one_row(CONFIG, 1000)
    assert 900 < batch.tokens.shape[1] <= 1000
    assert bool(batch.is_target.all())


def test_ratios_are_of_the_measured_seconds() -> None:
    found = bench_attention(CONFIG, 300, ["banded"], 2, torch.device("cpu"))
    assert set(found.seconds) == {"dense", "banded"}
    assert found.speedup == {"banded": found.seconds["dense"] / found.seconds["banded"]}
