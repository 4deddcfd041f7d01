from __future__ import annotations

import pytest
import torch

from dti_ray.bench.score import bench_score
from dti_ray.errors import ConfigError
from tests.builders import make_config

CPU = torch.device("cpu")


def test_ratios_are_of_the_measured_seconds() -> None:
    found = bench_score(
        make_config("packing.n=5", "model.layers=1"), candidates=6, item_tokens=2, repeats=1, device=CPU
    )
    assert set(found.seconds) == {"prompts", "slate", "prompt", "append"}
    assert found.slate_speedup == found.seconds["prompts"] / found.seconds["slate"]
    assert found.append_speedup == found.seconds["prompt"] / found.seconds["append"]


def test_a_prompt_that_fits_no_row_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"eval\.row_tokens: got 100; expected at least"):
        bench_score(make_config("packing.n=50", "eval.row_tokens=100"), 2, 20, 1, CPU)
