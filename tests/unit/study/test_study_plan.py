"""What a study would train is known, and refused if need be, before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from dti_ray.config import StudyConfig, TuneConfig, load_config
from dti_ray.errors import ConfigError
from dti_ray.study.plan import plan_study
from dti_ray.study.run import hours_left
from dti_ray.study.train import training_seconds
from tests.studies import study_config

CONFIGS = Path(__file__).parents[3] / "configs"
STUDIES = sorted(CONFIGS.glob("study_*.yaml"))


def faults_of(tmp_path: Path, rows: dict[str, object]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        plan_study(study_config(tmp_path, rows))
    return [str(fault) for fault in caught.value.faults]


def test_all_rows_train_with_one_seed_before_the_next_seed_begins(tmp_path: Path) -> None:
    rows: dict[str, object] = {"a": {}, "b": {"seeds": [0]}, "c": {"seeds": [1, 7]}}
    runs = plan_study(study_config(tmp_path, rows))
    assert [run.name for run in runs] == ["tiny-a-s0", "tiny-b-s0", "tiny-a-s1", "tiny-c-s1", "tiny-c-s7"]
    assert [run.config.train.seed for run in runs] == [run.seed for run in runs]


def test_run_is_the_base_with_its_rows_changes_in_one_process(tmp_path: Path) -> None:
    base = study_config(tmp_path)
    sliding, dti, *_ = plan_study(base)
    assert (sliding.config.packing.k, dti.config.packing.k) == (1, 4)
    assert sliding.config.packing.model_copy(update={"k": 4}) == dti.config.packing
    for run in (sliding, dti):
        assert (run.config.train.engine, run.config.cluster.workers) == ("torch", 1)
        assert (run.config.study, run.config.tune) == (StudyConfig(), TuneConfig())


def test_row_is_asked_with_its_contexts_and_only_a_final_one_on_the_test_split(tmp_path: Path) -> None:
    sliding, dti, *_ = plan_study(study_config(tmp_path))
    assert (sliding.contexts, sliding.splits) == ((3,), ("valid",))
    assert (dti.contexts, dti.splits) == ((3, 5), ("valid", "test"))


def test_context_of_a_row_that_names_none_is_that_of_its_training(tmp_path: Path) -> None:
    (run,) = plan_study(study_config(tmp_path, {"longer": {"change": {"packing.n": 9}, "seeds": [0]}}))
    assert run.contexts == (9,)


def test_every_wrong_row_is_named_at_once(tmp_path: Path) -> None:
    rows: dict[str, object] = {
        "good": {},
        "typo": {"change": {"packing.kk": 3}},
        "low": {"change": {"packing.k": 0, "optim.lr": -1.0}},
        "ours": {"change": {"train.engine": "deepspeed"}},
        "a name": {},
    }
    assert faults_of(tmp_path, rows) == [
        "row typo: packing.kk: unknown key; did you mean packing.k?",
        "row low: packing.k: got 0; expected greater than 0 or 'all'",
        "row low: optim.lr: got -1.0; expected greater than 0",
        "row ours: train.engine: is set by the study; expected other keys: a study trains in one process",
        "row a name: train.run: got 'tiny-a name-s0'; expected String should match pattern '^[A-Za-z0-9._-]+$'",
    ]


def test_study_without_rows_says_how_one_looks() -> None:
    with pytest.raises(ConfigError, match=r"study\.rows: holds nothing; .*configs/study_smoke\.yaml"):
        plan_study(load_config())


@pytest.mark.parametrize("key", ["data.name", "eval.n", "storage.root", "train.seed", "packing.min_context"])
def test_what_would_make_rows_incomparable_is_no_change(tmp_path: Path, key: str) -> None:
    with pytest.raises(ConfigError, match=f"row other: {key} cannot differ between rows"):
        study_config(tmp_path, {"other": {"change": {key: 1}}})


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_study_in_configs_can_be_planned(path: Path) -> None:
    config = load_config([path])
    runs = plan_study(config)
    assert len({run.name for run in runs}) == len(runs)
    compared = {row for table in config.study.tables for row in table.rows} | set(config.study.headline)
    assert compared == set(config.study.rows), "a row that stands in no table is trained for nobody"


def test_training_seconds_leave_out_the_waits_for_states_and_those_of_the_pace_a_machine_that_stood_still() -> None:
    lines = [
        {"targets": 100, "targets_per_s": 50.0, "checkpoint_s": 0.5},
        {"targets": 160, "targets_per_s": 20.0, "checkpoint_s": 0.0},
        {"targets": 260, "targets_per_s": 0.5, "checkpoint_s": 0.0},
    ]
    assert training_seconds(lines, 0.0) == pytest.approx((260 * 3.0 / 60, 1.5 + 3.0 + 200.0))


def test_sliding_tail_has_a_pace_of_its_own() -> None:
    lines = [
        {"targets": targets, "targets_per_s": pace, "checkpoint_s": 0.0}
        for targets, pace in [(25, 5.0), (50, 5.0), (75, 1.0), (85, 0.5), (100, 0.5)]
    ]
    assert training_seconds(lines, 0.25) == pytest.approx((75 / 5 + 25 / 0.5, 10.0 + 25.0 + 50.0))


def test_line_in_which_the_tail_begins_counts_as_it_is() -> None:
    lines = [
        {"targets": targets, "targets_per_s": pace, "checkpoint_s": 0.0}
        for targets, pace in [(40, 5.0), (80, 2.0), (90, 0.5), (100, 0.5)]
    ]
    assert training_seconds(lines, 0.25) == pytest.approx((40 / 5 + 40 / 2 + 20 / 0.5,) * 2)


def test_hours_left_are_those_of_the_same_row_or_of_as_many_tokens() -> None:
    assert hours_left([("a", 10.0)], []) is None
    done = [("a", 10.0, 3600.0), ("b", 30.0, 3600.0)]
    assert hours_left([("b", 99.0), ("c", 20.0)], done) == pytest.approx(1.0 + 1.0)
