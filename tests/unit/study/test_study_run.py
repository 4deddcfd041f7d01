"""A study goes on where it was killed, trains nothing twice, and asks the test split only where it shall."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dti_ray.config import ModelConfig
from dti_ray.errors import InputError
from dti_ray.model.decoder import decoder_name
from dti_ray.storage import Storage
from dti_ray.study.again import choose_run, run_again
from dti_ray.study.answers import find_answers, read_classics, store_classics
from dti_ray.study.check import Study
from dti_ray.study.collect import collect_results
from dti_ray.study.once import measure_once, padded_over_packed
from dti_ray.study.results import Answer, Classic, StudyResults
from dti_ray.study.run import run_study
from dti_ray.train.checkpoint import list_checkpoints
from dti_ray.tune.ledger import Ledger, count_reruns
from tests.studies import ROWS, Notes, PowerCut, tiny_study

ROOT = Path(__file__).parents[3]
RUNS = ("tiny-sliding-s0", "tiny-dti-s0", "tiny-sliding-s1", "tiny-dti-s1")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root below which the study was run to its end, undisturbed; nobody may change it."""
    root = tmp_path_factory.mktemp("finished")
    notes = Notes()
    outcome = run_study(tiny_study(root), notes)
    assert (outcome.done, dict(outcome.failed), outcome.left) == (RUNS, {}, ())
    assert tuple(notes.runs) == RUNS
    return root


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(finished, tmp_path / "root")


def results_of(study: Study) -> StudyResults:
    return collect_results(study, "dti-ray bench quality")


def events(root: Path, kind: str) -> list[str]:
    return [event["run"] for event in Ledger(Storage(str(root)), "tiny").events if event["event"] == kind]


def assert_same(one: Answer, other: Answer) -> None:
    assert (one.split, one.protocol, one.n, one.tokens) == (other.split, other.protocol, other.n, other.tokens)
    for field in fields(one.predictions):
        np.testing.assert_array_equal(getattr(one.predictions, field.name), getattr(other.predictions, field.name))


def test_results_hold_every_run_with_what_it_cost_and_all_its_answers(finished: Path) -> None:
    study = tiny_study(finished)
    results = results_of(study)
    assert [(run.row, run.seed) for run in results.runs] == [("sliding", 0), ("sliding", 1), ("dti", 0), ("dti", 1)]
    for run in results.runs:
        assert run.targets == study.total_targets(study.runs[0])
        assert 0 < run.best_targets <= run.targets
        assert min(run.seconds, run.flops, run.tokens) > 0
    sliding, _, dti, _ = results.runs
    assert sliding.tokens > 1.5 * dti.tokens
    assert [(one.split, one.protocol, one.n) for one in sliding.answers] == [("valid", "sliding", 3)]
    assert [(one.split, one.protocol, one.n) for one in dti.answers] == [
        (split, protocol, n) for split in ("valid", "test") for n in (3, 5) for protocol in ("sliding", "streaming")
    ]
    assert results.padded_over_packed is not None
    assert results.padded_over_packed > 0


@pytest.mark.parametrize(
    ("model", "known"),
    [
        ({"layers": 3, "hidden_size": 64}, "Llama from scratch, 3 layers of 64"),
        ({"name_or_path": "/home/me/models/mine"}, "mine"),
        ({"name_or_path": "org/mine"}, "org/mine"),
        ({"name_or_path": "/home/me/models", "gguf_file": "mine.Q4_1.gguf"}, "mine.Q4_1.gguf"),
    ],
)
def test_report_names_a_model_and_not_the_folder_of_this_machine(model: dict[str, Any], known: str) -> None:
    assert decoder_name(ModelConfig(**model)) == known


def test_padding_is_timed_only_where_it_is_asked_for(tmp_path: Path) -> None:
    study = tiny_study(tmp_path, padded=False)
    measure_once(study, Notes())
    assert padded_over_packed(study) is None


def test_best_state_of_training_is_the_one_that_answers(finished: Path) -> None:
    from dti_ray.metrics import auc

    for run in results_of(tiny_study(finished)).runs:
        first = run.answers[0].predictions
        assert auc(first.label, first.probability) == pytest.approx(run.valid_auc, abs=1e-9)


def test_all_answers_of_a_split_hold_the_same_targets_in_the_same_order(finished: Path) -> None:
    answers = [one for run in results_of(tiny_study(finished)).runs for one in run.answers]
    for split in ("valid", "test"):
        first, *others = [one.predictions for one in answers if one.split == split]
        for other in others:
            np.testing.assert_array_equal(first.user, other.user)
            np.testing.assert_array_equal(first.label, other.label)


def test_test_split_is_asked_of_final_rows_alone(finished: Path) -> None:
    folder = finished / "sweeps/tiny/answers"
    assert {path.name for path in folder.glob("*sliding*/*")} == {"valid-n3"}
    assert {path.name for path in folder.glob("*dti*/*")} == {"valid-n3", "valid-n5", "test-n3", "test-n5"}


def test_states_go_when_a_run_has_answered_but_for_the_best_one_of_a_final_row(finished: Path) -> None:
    kept = {name: len(list_checkpoints(Storage(str(finished)), f"runs/{name}")) for name in RUNS}
    assert kept == {name: int("dti" in name) for name in RUNS}


@pytest.mark.parametrize("cut", [(1, 32), (2, 96)], ids=["before a state", "behind a state"])
def test_killed_study_goes_on_and_ends_with_the_same_answers(
    finished: Path, tmp_path: Path, cut: tuple[int, int]
) -> None:
    with pytest.raises(PowerCut):
        run_study(tiny_study(tmp_path, seeds=[0]), Notes(cut))
    assert len(events(tmp_path, "done")) == cut[0] - 1
    study, notes = tiny_study(tmp_path, seeds=[0]), Notes()
    outcome = run_study(study, notes)
    assert (outcome.done, tuple(notes.runs)) == (RUNS[:2], RUNS[cut[0] - 1 : 2])
    assert events(tmp_path, "done") == list(RUNS[:2]), "each run ends once"
    assert count_reruns(Ledger(study.storage, "tiny").events) == 0
    expected = [run for run in results_of(tiny_study(finished)).runs if run.seed == 0]
    for one, other in zip(expected, results_of(study).runs, strict=True):
        assert (one.row, one.targets, one.tokens) == (other.row, other.targets, other.tokens)
        assert (one.best_targets, one.valid_auc) == (other.best_targets, other.valid_auc)
        for answer, again in zip(one.answers, other.answers, strict=True):
            assert_same(answer, again)


WITHOUT_RAY = """
import sys
from pathlib import Path
sys.modules["ray"] = sys.modules["deepspeed"] = None
from dti_ray.study.collect import collect_results
from dti_ray.study.run import run_study
from tests.studies import Notes, tiny_study
study = tiny_study(Path(sys.argv[1]), {"sliding": {"change": {"packing.k": 1}}}, seeds=[0])
run_study(study, Notes())
print(len(collect_results(study, "").runs))
"""


@pytest.mark.slow
def test_study_runs_where_ray_and_deepspeed_are_missing(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WITHOUT_RAY, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "1\n", done.stderr


def test_finished_study_does_nothing_when_it_is_run_again(copied: Path) -> None:
    before = {path: path.read_bytes() for path in (copied / "sweeps/tiny/answers").rglob("*") if path.is_file()}
    notes = Notes()
    run_study(tiny_study(copied), notes)
    assert notes.runs == []
    assert {path: path.read_bytes() for path in before} == before


def test_time_limit_of_nothing_begins_no_run(tmp_path: Path) -> None:
    study = tiny_study(tmp_path)
    outcome = run_study(study, Notes(), limit_hours=0.0)
    assert (outcome.done, outcome.left) == ((), RUNS)
    assert not (tmp_path / "sweeps").exists()
    assert results_of(study).runs == ()


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)


def test_damaged_answer_of_a_final_row_is_asked_again_of_its_state(copied: Path, finished: Path) -> None:
    damage(copied / "sweeps/tiny/answers/tiny-dti-s0/test-n3/predictions.parquet")
    study = tiny_study(copied)
    assert find_answers(study.storage, "tiny", study.runs[1]) is None
    run_study(study, Notes())
    assert events(copied, "start") == list(RUNS), "nothing is trained again"
    found, expected = (find_answers(Storage(str(root)), "tiny", study.runs[1]) for root in (copied, finished))
    assert found is not None
    assert expected is not None
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)


def test_damaged_answer_of_a_row_without_states_is_told_and_the_run_trained_again(copied: Path) -> None:
    damage(copied / "sweeps/tiny/answers/tiny-sliding-s0/valid-n3/predictions.parquet")
    notes = Notes()
    outcome = run_study(tiny_study(copied), notes)
    assert (outcome.done, notes.runs) == (RUNS, ["tiny-sliding-s0"])
    assert any("it is trained again" in text for text in notes.texts)


def test_row_that_fails_is_told_the_others_go_on_and_the_next_command_tries_it_again(tmp_path: Path) -> None:
    wild: dict[str, object] = {"change": {"optim.lr": 1e30, "optim.grad_clip": 1e30}, "seeds": [0]}
    rows = {"wild": wild, "calm": {"seeds": [0]}}
    for times in (1, 2):
        outcome = run_study(tiny_study(tmp_path, rows), Notes())
        assert outcome.done == ("tiny-calm-s0",)
        assert list(outcome.failed) == ["tiny-wild-s0"]
        assert "finite" in outcome.failed["tiny-wild-s0"]
        assert events(tmp_path, "fail") == ["tiny-wild-s0"] * times
    assert [run.row for run in results_of(tiny_study(tmp_path, rows)).runs] == ["calm"]


def test_row_that_is_added_is_run_and_one_that_was_changed_is_refused(copied: Path) -> None:
    more = ROWS | {"anchored": {"change": {"packing.k": 4, "packing.window": "off"}, "seeds": [1]}}
    notes = Notes()
    run_study(tiny_study(copied, more), notes)
    assert notes.runs == ["tiny-anchored-s1"]
    changed = more | {"dti": {"change": {"packing.k": 5}}, "anchored": {"change": {"packing.k": 4}, "seeds": [1]}}
    with pytest.raises(InputError) as caught:
        tiny_study(copied, changed)
    assert [str(fault) for fault in caught.value.faults] == [
        'study.rows.dti.change: got {"packing.k": 5}; expected {"packing.k": 4} as it was run; '
        "give the row a new name; what was run stays what it was",
        'study.rows.anchored.change: got {"packing.k": 4}; expected {"packing.k": 4, "packing.window": "off"} '
        "as it was run; give the row a new name; what was run stays what it was",
    ]


def test_seed_that_is_added_is_run_beside_the_others(copied: Path) -> None:
    notes = Notes()
    run_study(tiny_study(copied, seeds=[0, 1, 2]), notes)
    assert notes.runs == ["tiny-sliding-s2", "tiny-dti-s2"]
    trials = Ledger(Storage(str(copied)), "tiny").state().trials
    assert {number: dict(trial.params) for number, trial in trials.items()} == {
        0: {"packing.k": 1},
        1: {"packing.k": 4},
    }


def test_other_base_and_ledger_of_a_sweep_are_refused(copied: Path, tmp_path: Path) -> None:
    config = copied / "sweeps/tiny/config.yaml"
    config.write_text(config.read_text().replace("targets_per_step: 16", "targets_per_step: 32"))
    with pytest.raises(InputError, match=r"study.name=tiny: exists with another base configuration"):
        tiny_study(copied)
    ledger = tmp_path / "other/sweeps/tiny/ledger.jsonl"
    ledger.parent.mkdir(parents=True)
    ledger.write_text(json.dumps({"event": "session", "base": "0"}) + "\n")
    with pytest.raises(InputError, match="is the ledger of a sweep"):
        tiny_study(tmp_path / "other")


def test_row_that_is_done_again_says_the_same_and_changes_nothing(copied: Path) -> None:
    study = tiny_study(copied)
    before = (copied / "sweeps/tiny/ledger.jsonl").read_bytes()
    run, notes = choose_run(study, "dti", 1), Notes()
    repeats = run_again(study, run, notes)
    assert notes.runs == ["tiny-dti-s1-again"]
    assert [(one.split, one.n) for one in repeats[::2]] == [("valid", 3), ("valid", 5), ("test", 3), ("test", 5)]
    for one in repeats:
        assert one.auc == pytest.approx(one.stated, abs=1e-6)
        assert one.within is not None
        assert one.within[0] < one.within[1]
    assert run_again(study, run, notes) == repeats
    assert notes.runs == ["tiny-dti-s1-again"], "not once more"
    assert (copied / "sweeps/tiny/ledger.jsonl").read_bytes() == before


def test_classics_are_read_as_they_were_stored(tmp_path: Path, finished: Path) -> None:
    (_, _, dti, _), storage = results_of(tiny_study(finished)).runs, Storage(str(tmp_path))
    answers = {one.split: one.predictions for one in dti.answers}
    stored = [Classic("item mean", answers, 1.5, "shrinkage 5"), Classic("other", answers, 2.5, "")]
    store_classics(storage, "tiny", stored)
    found = read_classics(storage, "tiny", ("valid", "test"))
    assert found is not None
    assert [(one.name, one.seconds, one.chosen) for one in found] == [
        ("item mean", 1.5, "shrinkage 5"),
        ("other", 2.5, ""),
    ]
    for split, predictions in answers.items():
        np.testing.assert_array_equal(found[1].answers[split].probability, predictions.probability)
    damage(next((tmp_path / "sweeps/tiny/classics").glob("1-test.parquet")))
    assert read_classics(storage, "tiny", ("valid",)) is None


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda study: choose_run(study, "dty", None), "--row: got 'dty'; expected one of sliding, dti"),
        (lambda study: choose_run(study, "dti", 7), "--seed: got 7; expected one of 0, 1, as row dti has"),
    ],
)
def test_row_or_seed_that_the_study_does_not_have_is_refused(
    finished: Path, ask: Callable[[Study], object], message: str
) -> None:
    with pytest.raises(Exception, match=message):
        ask(tiny_study(finished))
