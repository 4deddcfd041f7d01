"""A mixture of prompts of different length: its distribution, and that it loses nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dti_ray.data.interactions import TRAIN
from dti_ray.data.mixture import draw_targets, mean_targets
from dti_ray.data.packing import PackedRow, PackSpec, pack
from dti_ray.data.pipeline import tokens_per_target
from tests.builders import make_sequences, make_table

SPEC = PackSpec(k=20, n=4, strictly_earlier=False, min_context=0, row_tokens=1000, split=TRAIN, k_min=2)


def targets_of(rows: list[PackedRow]) -> list[tuple[int, int]]:
    """Return (user, interaction) of each target."""
    pairs = (zip(row.users.tolist(), row.interaction[row.after].tolist(), strict=True) for row in rows)
    return sorted(pair for row in pairs for pair in row)


def lengths_of(rows: list[PackedRow]) -> list[int]:
    """Return the number of targets of each prompt."""
    return [int(count) for row in rows for count in np.bincount(row.prompt[row.after])[1:]]


@given(bounds=st.tuples(st.integers(1, 300), st.integers(1, 300)).map(sorted), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_draws_stay_between_their_bounds_and_come_from_the_seed(bounds: list[int], seed: int) -> None:
    low, high = bounds
    drawn = draw_targets(low, high, 500, np.random.default_rng(seed))
    assert drawn.min() >= low
    assert drawn.max() <= high
    assert drawn.tolist() == draw_targets(low, high, 500, np.random.default_rng(seed)).tolist()
    assert low <= mean_targets(low, high) * (1 + 1e-12)
    assert mean_targets(low, high) <= high * (1 + 1e-12)


def test_each_factor_is_as_likely_as_any_other() -> None:
    drawn = draw_targets(1, 127, 200_000, np.random.default_rng(0))
    octaves = np.bincount(np.floor(np.log2(drawn)).astype(int)) / len(drawn)
    assert octaves == pytest.approx(np.full(7, 1 / 7), abs=0.005), "1, 2-3, 4-7, ..., 64-127"
    assert drawn.mean() == pytest.approx(mean_targets(1, 127), rel=0.01)


def test_worked_example_of_the_module() -> None:
    drawn = draw_targets(1, 3, 100_000, np.random.default_rng(0))
    assert np.bincount(drawn)[1:] / len(drawn) == pytest.approx([0.5, 0.29, 0.21], abs=0.01)


@settings(max_examples=80, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    bounds=st.tuples(st.integers(1, 30), st.integers(1, 30)).map(sorted),
    min_context=st.integers(0, 4),
    rows=st.none() | st.integers(1, 9),
    seeds=st.tuples(st.integers(0, 99), st.integers(0, 99)),
)
def test_each_target_stands_in_one_prompt_whatever_is_drawn(
    lengths: list[int], bounds: list[int], min_context: int, rows: int | None, seeds: tuple[int, int]
) -> None:
    sequences, table = make_sequences(lengths, seeds[0]), make_table(longest=2)
    spec = replace(SPEC, k_min=bounds[0], k=bounds[1], min_context=min_context)
    packed = list(pack(sequences, table, spec, rows, np.random.default_rng(seeds[1])))
    assert targets_of(packed) == [(user, i) for user, n in enumerate(lengths) for i in range(min_context, n)]
    assert max(lengths_of(packed), default=0) <= bounds[1]


def test_prompts_of_long_histories_have_what_was_drawn() -> None:
    sequences, table = make_sequences([4000, 4000]), make_table()
    lengths = lengths_of(list(pack(sequences, table, SPEC, rng=np.random.default_rng(0))))
    assert set(range(2, 21)) <= set(lengths) <= set(range(1, 21))
    assert lengths.count(1) <= 2, "at the end of a history"
    assert np.mean(lengths) == pytest.approx(mean_targets(2, 20), rel=0.03)


def test_another_seed_begins_prompts_elsewhere() -> None:
    sequences, table = make_sequences([300]), make_table()

    def begins(seed: int) -> set[int]:
        packed = list(pack(sequences, table, SPEC, rng=np.random.default_rng(seed)))
        prompts = (row.interaction[row.after][row.prompt[row.after] == i] for row in packed for i in set(row.prompt))
        return {int(targets[0]) for targets in prompts}

    assert begins(0) == begins(0)
    assert len(begins(0) ^ begins(1)) > 20


def test_mixture_of_one_length_is_packed_as_that_length() -> None:
    sequences, table = make_sequences([60, 31, 44]), make_table()
    one, none = (
        list(pack(sequences, table, replace(SPEC, k=5, k_min=k_min), 4, np.random.default_rng(3)))
        for k_min in (5, None)
    )
    assert [row.tokens.tolist() for row in one] == [row.tokens.tolist() for row in none]
    assert [row.users.tolist() for row in one] == [row.users.tolist() for row in none]


@pytest.mark.parametrize(("k_min", "k"), [(1, 100), (5, 20), (20, 20), (None, 20)])
def test_tokens_per_target_are_those_of_the_packed_mixture(k_min: int | None, k: int) -> None:
    sequences, table = make_sequences([5000] * 3), make_table(prefix=3)
    spec = replace(SPEC, k=k, k_min=k_min)
    one_prompt_a_row = list(pack(sequences, table, spec, 15_000, np.random.default_rng(0)))
    packed = sum(row.size_tokens for row in one_prompt_a_row) / 15_000
    assert packed == pytest.approx(tokens_per_target(spec, table), rel=0.05)


def test_sliding_prompts_are_no_mixture() -> None:
    assert SPEC.sliding() == replace(SPEC, k=1, k_min=None)
