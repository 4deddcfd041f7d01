"""A server answers by one whole state at a time, and takes newer ones without a pause."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from dti_ray import CtrModel, Request, Text
from dti_ray.config import RunConfig
from dti_ray.errors import InputError
from dti_ray.export import export_run
from dti_ray.serve.bodies import Question, Refused, Scored, Worded
from dti_ray.serve.scorer import Scorer, Source
from dti_ray.storage import Storage
from tests.scoring import write_run
from tests.serving import damage_state, write_state

QUESTION = Question((("03", 1, None), (Worded("film 9"), 0, None)), ("01", Worded("film 3")), None)
UNKNOWN = Question((("03", 1, None),), ("nope",), None)


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return write_run(tmp_path)


@pytest.fixture
def scorer(config: RunConfig) -> Scorer:
    return Scorer(source(config), "cpu")


def source(config: RunConfig) -> Source:
    return Source(config.train.run, config.storage.root)


def test_answers_are_those_of_the_library(config: RunConfig, scorer: Scorer) -> None:
    model = CtrModel.load(config.train.run, "cpu", config.storage.root)
    expected = model.score([("03", 1), (Text("film 9"), 0)], ["01", Text("film 3")])
    (found,) = scorer.score([QUESTION])
    assert isinstance(found, Scored)
    assert np.array_equal(found.probabilities, expected)


def test_a_bad_question_is_refused_alone(scorer: Scorer) -> None:
    (expected,) = scorer.score([QUESTION])
    found = scorer.score([QUESTION, UNKNOWN, QUESTION, QUESTION, UNKNOWN])
    assert isinstance(expected, Scored)
    for index, one in enumerate(found):
        if index in (1, 4):
            assert isinstance(one, Refused)
            assert "an unknown item: 'nope'" in one.lines[0]
            assert '{"text": ...}' in one.lines[0]
        else:
            assert isinstance(one, Scored)
            assert np.allclose(one.probabilities, expected.probabilities, atol=1e-6)


def test_a_newer_state_is_taken_and_an_older_batch_keeps_its_own(config: RunConfig, scorer: Scorer) -> None:
    (before,) = scorer.score([QUESTION])
    old = scorer.loaded
    assert scorer.refresh() is None
    state = write_state(config, step=2, seed=5)
    assert scorer.refresh() is True
    (after,) = scorer.score([QUESTION])
    assert isinstance(before, Scored)
    assert isinstance(after, Scored)
    assert (before.state, after.state) == (old.state, state)
    assert not np.allclose(before.probabilities, after.probabilities, atol=1e-3)
    (kept,) = old.model.score_batch([Request([("03", 1), (Text("film 9"), 0)], ["01", Text("film 3")])])
    assert np.array_equal(kept, before.probabilities)
    assert scorer.refresh() is None


def test_a_state_that_gives_no_numbers_changes_nothing(
    config: RunConfig, scorer: Scorer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.serving.LARGE_STD", float("inf"))
    write_state(config, step=2, seed=5)
    with caplog.at_level(logging.WARNING):
        assert scorer.refresh() is False
        assert scorer.refresh() is None  # it is not read again and again
    assert "are not finite" in caplog.text
    assert isinstance(scorer.score([QUESTION])[0], Scored)


def test_a_damaged_state_is_passed_over(config: RunConfig, scorer: Scorer) -> None:
    (before,) = scorer.score([QUESTION])
    damage_state(config, write_state(config, step=2, seed=5))
    assert scorer.refresh() is False
    assert scorer.refresh() is None
    assert scorer.score([QUESTION]) == [before]
    assert Scorer(source(config), "cpu").score([QUESTION]) == [before]
    state = write_state(config, step=3, seed=6)
    assert scorer.refresh() is True
    assert scorer.loaded.state == state


def test_a_state_that_comes_while_the_one_before_is_read_has_its_own_name(config: RunConfig) -> None:
    class Overtaken(Source):
        def newest(self) -> str:
            found = super().newest()
            if found.startswith("step-00000001"):
                write_state(config, step=2, seed=5)
            return found

    scorer = Scorer(Overtaken(config.train.run, config.storage.root), "cpu")
    assert scorer.loaded.state == source(config).newest() == "step-00000002-test"
    assert scorer.refresh() is None


def test_an_export_has_another_name_once_it_was_written_anew(config: RunConfig, tmp_path: Path) -> None:
    place = Source(str(tmp_path / "exported"))
    export_run(config, Storage(config.storage.root), place.uri)
    first = place.newest()
    assert first.startswith("step-00000001-test/")
    assert place.newest() == first == place.load("cpu").state
    write_state(config, step=2, seed=5)
    export_run(config, Storage(config.storage.root), place.uri)
    assert place.newest().startswith("step-00000002-test/")


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is neither an export nor a run"):
        Source(str(tmp_path / "runs" / "none")).newest()
