from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dti_ray.metrics import Estimate, Predictions, evaluate, paired_difference
from dti_ray.study.draws import draw_users, drawn_auc, estimate


def predictions(seed: int, targets: int = 120, steps: int = 7) -> Predictions:
    """Random answers for the same targets, with ties."""
    shared, own = np.random.default_rng(99), np.random.default_rng(seed)
    user, label = shared.integers(0, 15, targets), shared.integers(0, 2, targets)
    return Predictions(user, label, own.integers(0, steps + 1, targets) / steps)


def test_value_and_interval_are_those_of_the_evaluation() -> None:
    one = predictions(1)
    draws = draw_users(one.user, one.label, 40, seed=3)
    measured, wanted = estimate(drawn_auc(draws, one.probability)), evaluate(one, 40, seed=3).auc
    assert [measured.value, measured.low, measured.high] == pytest.approx([wanted.value, wanted.low, wanted.high])


@settings(max_examples=20, deadline=None)
@given(first=st.integers(0, 10**6), second=st.integers(0, 10**6), steps=st.integers(1, 200))
def test_differences_are_those_of_the_paired_bootstrap(first: int, second: int, steps: int) -> None:
    a, b = predictions(first, steps=steps), predictions(second, steps=steps)
    draws = draw_users(a.user, a.label, 20, seed=5)
    measured = estimate(drawn_auc(draws, a.probability) - drawn_auc(draws, b.probability))
    wanted = paired_difference(a, b, 20, seed=5)["auc"]
    assert [measured.value, measured.low, measured.high] == pytest.approx([wanted.value, wanted.low, wanted.high])


def test_auc_of_one_class_is_not_defined() -> None:
    draws = draw_users(np.array([0, 0, 1]), np.array([1, 1, 1]), 5, seed=0)
    measured = estimate(drawn_auc(draws, np.array([0.1, 0.2, 0.3])))
    assert all(math.isnan(value) for value in (measured.value, measured.low, measured.high))


def test_draws_without_both_classes_are_left_out_of_the_interval() -> None:
    label = np.array([0, 1])
    draws = draw_users(np.array([4, 9]), label, 50, seed=0)  # half of the draws take one of the two users twice
    measured = drawn_auc(draws, np.array([0.1, 0.9]))
    assert np.isnan(measured).any()
    assert estimate(measured) == Estimate(1.0, 1.0, 1.0)


def test_without_replicates_there_is_no_interval() -> None:
    one = predictions(1)
    measured = estimate(drawn_auc(draw_users(one.user, one.label, 0, seed=0), one.probability))
    assert measured.value == pytest.approx(evaluate(one, 0, seed=0).auc.value)
    assert math.isnan(measured.low)
    assert math.isnan(measured.high)
