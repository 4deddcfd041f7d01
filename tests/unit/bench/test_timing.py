from __future__ import annotations

import pytest
import torch

from dti_ray.bench.timing import Timing, interleave

CPU = torch.device("cpu")


def test_cases_take_turns_step_by_step_after_one_untimed_step_each() -> None:
    order: list[str] = []
    cases = {name: [lambda name=name, i=i: order.append(f"{name}{i}") for i in range(2)] for name in "ab"}
    done: list[int] = []
    timings = interleave(cases, 2, CPU, done.append)
    assert order == ["a0", "b0", *(["a0", "b0", "a1", "b1"] * 2)]
    assert done == [1, 2, 3, 4]
    assert {name: (len(timing.steps), len(timing.repetitions)) for name, timing in timings.items()} == {
        "a": (2, 2),
        "b": (2, 2),
    }


def test_seconds_sum_the_medians_of_steps_and_spread_compares_repetitions() -> None:
    timing = Timing(steps=(1.0, 2.5), repetitions=(3.0, 4.0, 3.5))
    assert timing.seconds == pytest.approx(3.5)
    assert timing.spread == pytest.approx(1 / 3.5)
