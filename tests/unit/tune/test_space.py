"""The search space: configurations by number, in full, and checked against a base configuration."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dti_ray.config import Dimension, Value, load_config, with_values
from dti_ray.errors import ConfigError
from dti_ray.tune.space import (
    check_space,
    check_together,
    combinations,
    corners,
    count,
    grid_part,
    holds,
    identity,
    sample,
)

BASE = load_config([], ["eval.n=10"])
LR = Dimension(loguniform=(3e-4, 3e-3))
MIXED: tuple[Value, ...] = (None, True, 1, 0.5, "all")


def faults_of(space: dict[str, Dimension], *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        check_space(load_config([], ["eval.n=10", *overrides]), space)
    return [str(fault) for fault in caught.value.faults]


numbers = st.floats(-1e9, 1e9)
positive = st.floats(1e-12, 1e9)
dimensions = st.one_of(
    st.builds(lambda values: Dimension(choice=values), st.permutations(MIXED)),
    st.builds(lambda a, width: Dimension(randint=(a, a + width)), st.integers(-9, 9), st.integers(1, 9)),
    st.builds(
        lambda pair: Dimension(uniform=(min(pair), max(pair))), st.lists(numbers, min_size=2, max_size=2, unique=True)
    ),
    st.builds(
        lambda pair: Dimension(loguniform=(min(pair), max(pair))),
        st.lists(positive, min_size=2, max_size=2, unique=True),
    ),
)


@settings(max_examples=60, deadline=None)
@given(
    space=st.dictionaries(st.sampled_from(["optim.lr", "packing.k", "reset.alpha", "lora.rank"]), dimensions),
    number=st.integers(0, 10**6), seed=st.integers(0, 2**31 - 1),
)  # fmt: skip
def test_a_sample_is_within_its_bounds_and_always_the_same(space: dict[str, Dimension], number: int, seed: int) -> None:
    drawn = sample(space, number, seed)
    assert holds(space, drawn)
    assert identity(drawn) == identity(sample(space, number, seed))


@settings(max_examples=40, deadline=None)
@given(mine=dimensions, other=dimensions, number=st.integers(0, 99))
def test_another_key_changes_no_value(mine: Dimension, other: Dimension, number: int) -> None:
    alone = sample({"optim.lr": mine}, number, seed=1)["optim.lr"]
    assert repr(sample({"packing.k": other, "optim.lr": mine}, number, seed=1)["optim.lr"]) == repr(alone)


def test_samples_of_other_numbers_and_seeds_are_others() -> None:
    drawn = [sample({"optim.lr": LR}, number, seed)["optim.lr"] for number in range(20) for seed in range(20)]
    assert len(set(drawn)) > 395


def test_a_random_number_has_six_digits() -> None:
    drawn = [sample({"optim.lr": LR}, number, 0)["optim.lr"] for number in range(50)]
    assert all(value == float(f"{value:.6g}") for value in drawn)


def test_every_integer_and_every_choice_comes_as_often() -> None:
    space = {"packing.k": Dimension(randint=(1, 4)), "reset.mode": Dimension(choice=("off", "uniform"))}
    drawn = [sample(space, number, 3) for number in range(2000)]
    integers = Counter(one["packing.k"] for one in drawn)
    assert set(integers) == {1, 2, 3, 4}
    assert all(abs(times - 500) < 100 for times in integers.values())
    assert abs(Counter(one["reset.mode"] for one in drawn)["off"] - 1000) < 150


def test_each_factor_of_a_loguniform_is_as_likely() -> None:
    space = {"optim.lr": Dimension(loguniform=(1e-6, 1.0))}
    drawn = [math.log10(float(sample(space, number, 0)["optim.lr"] or 0)) for number in range(1000)]
    assert all(abs(times - 1000 / 6) < 60 for times in Counter(map(math.floor, drawn)).values())


def test_grid_keys_are_not_sampled() -> None:
    space = {"packing.k": Dimension(grid=(10, 20)), "optim.lr": LR}
    assert list(sample(space, 0, 0)) == ["optim.lr"]
    assert list(grid_part(space)) == ["packing.k"]


def test_of_all_combinations_the_first_key_changes_slowest() -> None:
    space = {"packing.k": Dimension(grid=(10, "all")), "reset.mode": Dimension(choice=("off", "uniform"))}
    assert combinations(space) == [
        {"packing.k": 10, "reset.mode": "off"},
        {"packing.k": 10, "reset.mode": "uniform"},
        {"packing.k": "all", "reset.mode": "off"},
        {"packing.k": "all", "reset.mode": "uniform"},
    ]
    assert combinations({}) == [{}]


@settings(max_examples=50, deadline=None)
@given(sizes=st.lists(st.integers(1, 4), max_size=4))
def test_there_are_as_many_different_combinations_as_the_product_of_the_choices(sizes: list[int]) -> None:
    space = {str(key): Dimension(choice=tuple(range(size))) for key, size in enumerate(sizes)}
    assert len({identity(one) for one in combinations(space)}) == math.prod(sizes) == count(space)


@pytest.mark.parametrize(
    ("dimension", "expected"),
    [
        (Dimension(randint=(3, 5)), 3),
        (Dimension(grid=(1, 2)), 1),  # crossed, not counted
        (Dimension(uniform=(1.0, 1.00003)), 3),
        (Dimension(uniform=(1.0, 1.0000001)), 1),
        (Dimension(uniform=(-2.0, 1.0)), 300_000),
    ],
)
def test_configurations_are_counted_at_the_digits_that_they_are_drawn_with(dimension: Dimension, expected: int) -> None:
    assert count({"optim.lr": dimension}) == pytest.approx(expected, abs=1 if dimension.uniform else 0)


def test_equal_numbers_are_one_value_whatever_their_type() -> None:
    assert len({identity({"key": value}) for value in (1, 1.0, True, "1")}) == 3
    space = {"key": Dimension(choice=(1, True))}
    assert [holds(space, {"key": value}) for value in (1, True, 1.0, 2)] == [True, True, True, False]


def test_a_configuration_that_lacks_a_key_or_has_another_is_not_of_the_space() -> None:
    space = {"optim.lr": LR, "packing.k": Dimension(randint=(1, 9))}
    assert holds(space, {"packing.k": 9, "optim.lr": 1e-3})
    assert not holds(space, {"optim.lr": 1e-3})
    assert not holds(space, {"packing.k": 9, "optim.lr": 1e-3, "reset.alpha": 0.1})
    assert not holds(space, {"packing.k": 9, "optim.lr": 1e-2})


def test_corners_are_every_choice_and_every_bound() -> None:
    space = {"packing.k": Dimension(choice=(10, "all")), "optim.lr": LR, "packing.n": Dimension(randint=(5, 9))}
    assert corners(space) == [
        ("packing.k", 10), ("packing.k", "all"), ("optim.lr", 3e-4), ("optim.lr", 3e-3), ("packing.n", 5),
        ("packing.n", 9),
    ]  # fmt: skip


def test_a_trial_has_its_values_and_else_the_base_s() -> None:
    config = with_values(BASE, {"packing.k": "all", "optim.lr": 1e-4, "lora.rank": None})
    assert (config.packing.k, config.optim.lr, config.lora.rank) == ("all", 1e-4, None)
    assert config.packing.n == BASE.packing.n


def test_the_default_space_fits_the_default_configuration() -> None:
    check_space(load_config(), load_config().tune.space)


@pytest.mark.parametrize(
    ("key", "dimension", "fault"),
    [
        ("packing.kk", Dimension(choice=(1, 2)), "tune.space.packing.kk: unknown key; did you mean packing.k?"),
        ("optimm.lr", LR, "tune.space.optimm.lr: unknown key; did you mean optim.lr?"),
        ("lr", LR, "tune.space.lr: unknown key; did you mean optim.lr?"),
        ("optim", Dimension(choice=(1,)), "tune.space.optim: got 1; expected a valid dictionary"),
        ("optim.lr", Dimension(uniform=(-1.0, 1.0)), "tune.space.optim.lr: got -1.0; expected greater than 0"),
        ("model.dropout", Dimension(uniform=(0.0, 1.0)), "tune.space.model.dropout: got 1.0; expected less than 1"),
        ("reset.mode", Dimension(choice=("off", "some")), "tune.space.reset.mode: got 'some'; expected 'off', "),
        ("packing.k", Dimension(grid=(20, None)), "tune.space.packing.k: got None; expected a valid integer or 'all'"),
    ],
)  # fmt: skip
def test_a_bad_key_or_value_is_one_fault_that_says_what_is_allowed(key: str, dimension: Dimension, fault: str) -> None:
    (found,) = faults_of({key: dimension})
    assert found.startswith(fault)


def test_a_field_of_whole_numbers_is_not_drawn_between_two_bounds() -> None:
    (fault,) = faults_of({"packing.k": Dimension(uniform=(5.0, 9.0))})
    assert "tune.space.packing.k: got 6.52786; expected a valid integer" in fault
    assert "try randint" in fault


def test_a_value_that_only_the_rest_of_the_base_forbids_is_a_fault() -> None:
    (fault,) = faults_of({"model.heads": Dimension(choice=(4, 3))})
    assert fault.startswith("tune.space.model.heads: got 3: model: hidden_size must be a multiple of 2 x heads")
    assert "all else is as in the base configuration" in fault
    check_space(
        load_config([], ["model.hidden_size=120", "model.kv_heads=1"]), {"model.heads": Dimension(choice=(4, 3))}
    )


def test_all_faults_of_a_space_come_at_once() -> None:
    space = {
        "packing.k": Dimension(choice=(0, 20, -1)),
        "optim.speed": LR,
        "debias.strength": Dimension(choice=(-0.1,)),
    }
    assert [fault.split(";")[0] for fault in faults_of(space)] == [
        "tune.space.packing.k: got 0",
        "tune.space.packing.k: got -1",
        "tune.space.optim.speed: unknown key",
        "tune.space.debias.strength: got -0.1",
    ]


def test_context_is_searched_only_where_all_trials_are_evaluated_with_the_same() -> None:
    space = {"packing.n": Dimension(randint=(5, 20))}
    check_space(BASE, space)
    (fault,) = faults_of(space, "eval.n=null")
    assert fault.startswith("tune.space.packing.n: ")
    assert fault.endswith("set eval.n")


def test_values_that_exclude_each_other_are_found_in_whole_configurations() -> None:
    space = {"model.heads": Dimension(choice=(4, 8)), "model.hidden_size": Dimension(choice=(128, 24))}
    check_space(BASE, space)
    with pytest.raises(ConfigError) as caught:
        check_together(BASE, combinations(space))
    (fault,) = caught.value.faults
    assert str(fault).startswith("tune.space: model.heads=8, model.hidden_size=24: model: hidden_size must be")
