"""What is tried next: nothing twice, nothing lost when a sweep goes on, and TPE told of all that is known."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dti_ray.config import Dimension, TuneConfig, Value
from dti_ray.errors import ConfigError
from dti_ray.tune.ledger import Report, RunState, Status, SweepState, Trial, run_name
from dti_ray.tune.search import ask, check_plan, check_search, plan_ahead
from dti_ray.tune.space import holds, identity, sample

LR = Dimension(loguniform=(3e-4, 3e-3))
K_GRID = Dimension(grid=(10, 20))
K_CHOICE = Dimension(choice=(10, 20, "all"))


def tune(space: Mapping[str, Dimension], trials: int = 4, **changes: object) -> TuneConfig:
    return TuneConfig(space=dict(space), trials=trials, **changes)  # pyright: ignore[reportArgumentType]


def params_of(trials: Sequence[Trial]) -> list[dict[str, Value]]:
    return [dict(trial.params) for trial in trials]


def faults_of(config: TuneConfig) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        check_plan(config)
    return [str(fault) for fault in caught.value.faults]


def test_random_search_plans_the_first_samples() -> None:
    planned = plan_ahead(tune({"optim.lr": LR, "packing.k": K_CHOICE}, seed=7), [])
    assert [trial.number for trial in planned] == [0, 1, 2, 3]
    assert params_of(planned) == [sample({"optim.lr": LR, "packing.k": K_CHOICE}, number, 7) for number in range(4)]


spaces = st.dictionaries(
    st.sampled_from(["a", "b", "c"]),
    st.sampled_from([LR, K_GRID, K_CHOICE, Dimension(randint=(1, 3)), Dimension(choice=(1, True, None))]),
    min_size=1,
)


@settings(max_examples=150, deadline=None)
@given(space=spaces, trials=st.integers(1, 12), planned=st.integers(0, 40), seed=st.integers(0, 9))
def test_a_sweep_that_was_cut_off_plans_the_same_rest(
    space: dict[str, Dimension], trials: int, planned: int, seed: int
) -> None:
    config = tune(space, trials, seed=seed)
    whole = plan_ahead(config, [])
    known = [Trial(trial.number, json.loads(json.dumps(trial.params))) for trial in whole[:planned]]
    assert [*known, *plan_ahead(config, known)] == whole
    assert plan_ahead(config, whole) == []
    assert len({identity(trial.params) for trial in whole}) == len(whole)
    assert all(holds(space, trial.params) for trial in whole)


@settings(max_examples=50, deadline=None)
@given(space=spaces, few=st.integers(1, 8), more=st.integers(0, 8))
def test_more_trials_keep_the_first_ones(space: dict[str, Dimension], few: int, more: int) -> None:
    first = plan_ahead(tune(space, few), [])
    assert [*first, *plan_ahead(tune(space, few + more), first)] == plan_ahead(tune(space, few + more), [])
    assert plan_ahead(tune(space, few), plan_ahead(tune(space, few + more), [])) == []


def test_random_search_ends_where_the_space_does() -> None:
    planned = plan_ahead(tune({"packing.k": K_CHOICE, "lora.rank": Dimension(randint=(1, 3))}, trials=50), [])
    assert len(planned) == 9
    narrow = tune({"optim.lr": Dimension(uniform=(1.0, 1.0000001))}, trials=50)
    assert len(plan_ahead(narrow, [])) == 1


def test_each_sample_is_repeated_with_every_combination_of_the_grid() -> None:
    space = {"optim.lr": LR, "packing.k": K_GRID, "reset.mode": Dimension(grid=("off", "uniform"))}
    planned = plan_ahead(tune(space, trials=3), [])
    assert len(planned) == 12
    assert len({trial.params["optim.lr"] for trial in planned}) == 3
    assert [(trial.params["packing.k"], trial.params["reset.mode"]) for trial in planned[4:8]] == [
        (10, "off"), (10, "uniform"), (20, "off"), (20, "uniform"),
    ]  # fmt: skip


def test_a_wider_grid_is_tried_with_the_known_samples() -> None:
    first = plan_ahead(tune({"optim.lr": LR, "packing.k": K_GRID}, trials=3), [])
    wider = tune({"optim.lr": LR, "packing.k": Dimension(grid=(10, 20, 50))}, trials=3)
    new = plan_ahead(wider, first)
    assert [trial.number for trial in new] == [6, 7, 8]
    assert params_of(new) == [{"optim.lr": trial.params["optim.lr"], "packing.k": 50} for trial in first[::2]]


def test_other_bounds_change_no_known_trial_and_number_the_new_ones_behind() -> None:
    first = plan_ahead(tune({"optim.lr": LR}, trials=3), [])
    wider = {"optim.lr": Dimension(loguniform=(1e-5, 1e-1))}
    new = plan_ahead(tune(wider, trials=5), first)
    assert [trial.number for trial in new] == [3, 4]
    assert params_of(new) == [sample(wider, 3, 0), sample(wider, 4, 0)]


def test_grid_search_plans_every_combination_and_later_only_the_new_ones() -> None:
    space = {"packing.k": K_GRID, "optim.lr": Dimension(choice=(1e-3, 3e-3))}
    first = plan_ahead(tune(space, search="grid", trials=1), [])
    assert [list(params.values()) for params in params_of(first)] == [[10, 1e-3], [10, 3e-3], [20, 1e-3], [20, 3e-3]]
    wider = tune({**space, "packing.k": Dimension(grid=(5, 10, 20))}, search="grid")
    assert plan_ahead(wider, first) == [
        Trial(4, {"packing.k": 5, "optim.lr": 1e-3}), Trial(5, {"packing.k": 5, "optim.lr": 3e-3}),
    ]  # fmt: skip


def state_of(*trials: tuple[Mapping[str, Value], Sequence[tuple[Status, Sequence[float]]]]) -> SweepState:
    """Return a sweep from each trial's values, and each of its runs' status and reported auc."""
    runs = {
        (name := run_name("sweep", number, seed)): RunState(
            name, number, seed, status, tuple(Report(at * 1000 + seed, auc, 1.0, 1.0) for at, auc in enumerate(aucs, 1))
        )
        for number, (_, of_trial) in enumerate(trials)
        for seed, (status, aucs) in enumerate(of_trial)
    }
    return SweepState({number: Trial(number, params) for number, (params, _) in enumerate(trials)}, runs)


def sweep(config: TuneConfig, best_lr: float) -> list[Trial]:
    """Return the trials of a whole sweep whose value falls with the distance to a learning rate."""
    known: list[tuple[Mapping[str, Value], Sequence[tuple[Status, Sequence[float]]]]] = []
    while (trial := ask(config, state_of(*known))) is not None:
        assert trial.number == len(known)
        lr = trial.params["optim.lr"]
        assert isinstance(lr, float)
        known.append((trial.params, [(Status.DONE, [0.6, 0.8 - abs(lr - best_lr) / best_lr / 10])]))
    return list(state_of(*known).trials.values())


needs_optuna = pytest.mark.skipif(find_spec("optuna") is None, reason="tpe needs the extra `search`")
tpe: Mapping[str, Any] = {"search": "tpe"}
pbt: Mapping[str, Any] = {"scheduler": "pbt", "max_concurrent": 2}
SPACE = {
    "optim.lr": LR, "packing.k": K_CHOICE, "debias.strength": Dimension(uniform=(0.0, 0.1)),
    "lora.rank": Dimension(choice=(None, 8, True)), "packing.n": Dimension(randint=(5, 9)),
}  # fmt: skip


def test_tpe_plans_nothing_ahead_and_only_tpe_is_asked() -> None:
    assert plan_ahead(tune(SPACE, **tpe), []) == []
    assert ask(tune(SPACE), SweepState()) is None
    assert ask(tune({"packing.k": K_GRID}, search="grid"), SweepState()) is None


@needs_optuna
def test_tpe_plans_so_many_trials_all_within_the_space() -> None:
    trials = sweep(tune(SPACE, trials=8, **tpe), best_lr=1e-3)
    assert len(trials) == 8
    assert all(holds(SPACE, trial.params) for trial in trials)
    assert len({identity(trial.params) for trial in trials}) == 8


@needs_optuna
def test_tpe_proposes_the_same_from_the_same_state_and_the_ledger_s_types() -> None:
    known = state_of(*[(sample(SPACE, number, 1), [(Status.DONE, [0.7 + number / 100])]) for number in range(6)])
    config = tune(SPACE, trials=8, **tpe)
    first = ask(config, known)
    assert first is not None
    assert ask(config, known) == first
    assert json.loads(json.dumps(first.params)) == first.params
    assert ask(tune(SPACE, trials=8, seed=1, **tpe), known) != first


WIDE = {"optim.lr": Dimension(loguniform=(1e-5, 1e-1))}
NAN = float("nan")


def proposed_lrs(known: SweepState) -> list[float]:
    """Return the next learning rate of sweeps with other seeds."""
    trials = [ask(tune(WIDE, trials=20, seed=seed, **tpe), known) for seed in range(30)]
    return [float(trial.params["optim.lr"] or 0) for trial in trials if trial is not None]


def near(lrs: Sequence[float], lr: float) -> int:
    return sum(abs(math.log10(one / lr)) < 1 for one in lrs)


@needs_optuna
@pytest.mark.parametrize(
    "bad", [(Status.DONE, [0.5, 0.6]), (Status.DONE, [NAN]), (Status.STOPPED, [0.5]), (Status.STOPPED, [0.5, NAN])]
)
@pytest.mark.parametrize("best", [1e-4, 1e-2])
def test_tpe_prefers_what_was_good(bad: tuple[Status, list[float]], best: float) -> None:
    good = (Status.DONE, [0.8, NAN])
    other = good if bad[0] is Status.STOPPED else bad  # a configuration is stopped if one of its runs is
    known = state_of(
        *[({"optim.lr": best * (1 + at / 10)}, [good, good]) for at in range(3)],
        *[({"optim.lr": 1e-6 / best * (1 + at / 10)}, [bad, other]) for at in range(9)],
    )
    lrs = proposed_lrs(known)
    assert (near(lrs, best), near(lrs, 1e-6 / best)) == (30, 0)


@needs_optuna
@pytest.mark.parametrize("status", [Status.RUNNING, Status.WAITING])
def test_tpe_keeps_away_from_what_is_being_tried(status: Status) -> None:
    known = [({"optim.lr": lr}, [(Status.DONE, [0.8 - lr])]) for lr in (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)]
    tried = [({"optim.lr": 1e-5 * (1 + at / 10)}, [(status, [0.7]), (Status.DONE, [0.7])]) for at in range(9)]
    assert near(proposed_lrs(state_of(*known)), 1e-5) > near(proposed_lrs(state_of(*known, *tried)), 1e-5) + 5


@needs_optuna
def test_tpe_learns_nothing_from_a_failed_trial_and_a_run_without_a_report_is_the_worst() -> None:
    known = [({"optim.lr": lr}, [(Status.DONE, [0.8 - lr])]) for lr in (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)]
    failed = [({"optim.lr": 2e-5}, [(Status.FAILED, [0.9]), (Status.FAILED, [])])] * 3
    empty = [({"optim.lr": 3e-5}, [(Status.DONE, []), (Status.FAILED, [])])] * 9
    far = near(proposed_lrs(state_of(*known)), 1e-5)
    assert near(proposed_lrs(state_of(*known, *failed)), 1e-5) > far - 5
    assert near(proposed_lrs(state_of(*known, *empty)), 1e-5) < far - 5


@needs_optuna
def test_tpe_leaves_out_what_the_space_does_not_hold_any_more() -> None:
    known = [
        ({"packing.k": 99, "optim.lr": 1e-3}, [(Status.DONE, [0.7])]),
        ({"optim.lr": 1e-3}, [(Status.DONE, [0.7])]),
    ]
    proposed = ask(tune(SPACE, trials=3, **tpe), state_of(*known))
    assert proposed is not None
    assert holds(SPACE, proposed.params)


@needs_optuna
def test_tpe_tries_a_small_space_in_full_and_nothing_twice() -> None:
    space = {"packing.k": K_CHOICE, "optim.lr": Dimension(choice=(1e-3, 3e-3))}
    trials = sweep(tune(space, trials=20, **tpe), best_lr=1e-3)
    assert len({identity(trial.params) for trial in trials}) == len(trials) == 6


def test_tpe_without_optuna_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    check_search(tune(SPACE))
    with pytest.raises(ConfigError, match=r"tune.search: tpe needs Optuna; pip install 'dti-ray\[search\]'"):
        check_search(tune(SPACE, **tpe))
    with pytest.raises(ConfigError, match="needs Optuna"):
        ask(tune(SPACE, **tpe), SweepState())


def test_searches_and_schedulers_that_go_together_pass() -> None:
    lr_and_grid = {"optim.lr": LR, "packing.k": K_GRID}
    for config in (TuneConfig(), tune(SPACE, **tpe), tune(lr_and_grid, **pbt), tune(lr_and_grid)):
        check_plan(config)
    check_plan(tune({"optim.lr": Dimension(choice=(1e-3,)), "packing.k": K_CHOICE}, search="grid", **pbt))


def test_tpe_refuses_a_grid_and_pbt() -> None:
    assert faults_of(tune({"optim.lr": LR, "packing.k": K_GRID}, **pbt, **tpe)) == [
        "tune.space.packing.k: is a grid with search: tpe, which proposes one configuration at a time; expected choice",
        "tune.scheduler: pbt with search: tpe, which would learn from learning rates that no run keeps; "
        "expected asha, median or none; or search: random or grid",
    ]


def test_pbt_refuses_other_keys_that_are_drawn_at_random() -> None:
    (fault,) = faults_of(tune({"optim.lr": LR, "packing.k": K_CHOICE}, **pbt))
    assert fault.startswith("tune.space.packing.k: is drawn at random with scheduler: pbt")
    assert "expected grid" in fault


def test_pbt_refuses_runs_one_after_another() -> None:
    (fault,) = faults_of(tune({"optim.lr": LR}, scheduler="pbt"))
    assert fault.startswith("tune.max_concurrent: 1 with scheduler: pbt")
