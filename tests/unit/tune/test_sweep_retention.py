from __future__ import annotations

import pytest

from dti_ray.config import TuneConfig
from dti_ray.tune.ledger import Event, SweepState, fold, run_name
from dti_ray.tune.retention import states_gb, to_delete

FOLDERS = ["s-0000-s0", "s-0001-s0", "s-0002-s0", "other-0000-s0", "s-0000-s0x", "demo"]


def swept(*ends: tuple[float, str] | None, seeds: tuple[int, ...] = (0,)) -> SweepState:
    """Return a sweep whose trials ended with an AUC and a status, or are under way."""
    events: list[Event] = []
    for number, end in enumerate(ends):
        runs = {run_name("s", number, seed): seed for seed in seeds}
        events.append({"event": "trial", "trial": number, "params": {}, "runs": runs})
        for run in runs:
            events.append({"event": "start", "run": run})
            if end is not None:
                auc, status = end
                events.append(
                    {"event": "report", "run": run, "targets": 9, "auc": auc, "log_loss": 0.6, "seconds": 1.0}
                )
                events.append(
                    {"event": "done", "run": run, "targets": 9, "seconds": 1.0, "status": status, "reason": ""}
                )
    return fold(events)


def test_runs_that_are_not_among_the_best_go() -> None:
    state = swept((0.70, "done"), (0.72, "done"), (0.71, "done"))
    assert to_delete(state, TuneConfig(sweep="s"), FOLDERS) == ["s-0000-s0", "s-0002-s0"]
    assert to_delete(state, TuneConfig(sweep="s", keep_best=2), FOLDERS) == ["s-0000-s0"]


def test_run_under_way_stays_and_a_stopped_one_goes_whatever_its_metric() -> None:
    state = swept((0.70, "done"), (0.75, "stopped"), None)
    assert to_delete(state, TuneConfig(sweep="s"), FOLDERS) == ["s-0001-s0"]


def test_trial_stays_until_all_its_seeds_have_ended() -> None:
    state = swept((0.70, "done"), (0.72, "done"), seeds=(0, 1))
    waiting = fold([
        {"event": "trial", "trial": 0, "params": {}, "runs": {"s-0000-s0": 0, "s-0000-s1": 1}},
        {"event": "start", "run": "s-0000-s0"},
        {"event": "done", "run": "s-0000-s0", "targets": 9, "seconds": 1.0, "status": "done", "reason": ""},
    ])  # fmt: skip
    assert to_delete(state, TuneConfig(sweep="s"), ["s-0000-s0", "s-0000-s1"]) == ["s-0000-s0", "s-0000-s1"]
    assert to_delete(waiting, TuneConfig(sweep="s"), ["s-0000-s0"]) == []


def test_population_keeps_all_states_until_its_end() -> None:
    config = TuneConfig(sweep="s", scheduler="pbt")
    assert to_delete(swept((0.70, "done"), (0.72, "done"), None), config, FOLDERS) == []
    assert to_delete(swept((0.70, "done"), (0.72, "done")), config, FOLDERS) == ["s-0000-s0"]


def test_population_keeps_what_a_changed_run_may_still_take_over_and_nothing_older() -> None:
    config = TuneConfig(sweep="s", scheduler="pbt")
    events: list[Event] = [
        {"event": "trial", "trial": number, "params": {}, "runs": {f"s-000{number}-s0": 0}} for number in range(2)
    ]
    events += [{"event": "change", "run": "s-0000-s0", "targets": 9, "source": "s-0001-s0", "lr": 1e-3}] * 2
    folders = ["s-0000-s0", "s-0000-s0-g1", "s-0000-s0-g2", "s-0001-s0"]
    assert to_delete(fold(events), config, folders) == ["s-0000-s0"]


def test_folders_of_others_are_never_named() -> None:
    folders = ["other-0000-s0", "s-0000-s0x", "demo", "s", "s-best", "xs-0000-s0", "s-0077-s5"]
    assert to_delete(swept((0.70, "failed")), TuneConfig(sweep="s"), folders) == []


def test_folder_that_a_changed_run_has_left_goes() -> None:
    state = swept((0.7, "done"))
    assert to_delete(state, TuneConfig(sweep="s"), ["s-0000-s0", "s-0000-s0-g1"]) == ["s-0000-s0-g1"]


@pytest.mark.parametrize(
    ("changes", "parts"),
    [({}, 2), ({"keep_best": 3, "max_concurrent": 2}, 5), ({"seeds": (0, 1)}, 4), ({"scheduler": "pbt"}, 8)],
)
def test_budget_is_shared_by_all_runs_that_may_lie_there_and_holds_the_state_being_written(
    changes: dict[str, object], parts: int
) -> None:
    tune = TuneConfig.model_validate({"max_gb": 10, **changes})
    assert 2 * parts * states_gb(tune, 4) == pytest.approx(10)
