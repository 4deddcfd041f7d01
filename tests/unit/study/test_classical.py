"""Baselines without a language model: whose targets they predict, and what they must not know."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from scipy import sparse
from scipy.special import expit

from dti_ray.data.interactions import TEST, TRAIN, VALID, Dataset, UserSequences
from dti_ray.errors import ConfigError, InputError
from dti_ray.infer.units import plan_units, read_unit, targets_of
from dti_ray.metrics import auc
from dti_ray.study import rivals
from dti_ray.study.classical import RIVALS, fit_classics
from dti_ray.study.known import Log
from dti_ray.study.results import Classic
from dti_ray.study.rivals import Fitted, Learning
from tests import builders
from tests.builders import ITEMS, make_sequences, write_dataset

LENGTHS = [30, 12, 25, 40, 3]
needs_myfm = pytest.mark.skipif(find_spec("myfm") is None, reason="needs the extra `study`")
each_rival = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=needs_myfm if "factor" in name else ()) for name in RIVALS]
)


@cache
def make_log() -> Log:
    """Return users whose labels come of what items are worth and of what users like."""
    lengths, rng = [40] * 20, np.random.default_rng(0)
    users = make_sequences(lengths)
    taste, worth = rng.normal(size=(len(lengths), 1)).repeat(40), rng.normal(size=ITEMS) * 2
    labels = rng.random(len(users.items)) < expit(taste + worth[users.items])
    splits = np.concatenate([np.digitize(np.arange(n) / n, [0.6, 0.8]) for n in lengths])
    users = replace(users, labels=labels.astype(np.int8), splits=splits.astype(np.int8))
    return Log(users, sparse.csr_matrix((rng.random((ITEMS, 3)) < 0.5).astype(float)))


def learning_of(log: Log) -> Learning:
    train, valid = (np.flatnonzero(log.users.splits == split) for split in (TRAIN, VALID))
    return Learning(log.users.labels, train, valid, seed=1)


@cache
def fits(name: str) -> list[Fitted]:
    return list(RIVALS[name][0](make_log(), learning_of(make_log())))


def best(fits: Iterable[Fitted]) -> Fitted:
    return min(fits, key=lambda fitted: fitted.loss)


def clicks_only(lengths: list[int]) -> UserSequences:
    users = make_sequences(lengths)
    return replace(users, labels=np.ones_like(users.labels))


def fitted_on(dataset: Dataset, min_context: int = 0) -> tuple[Classic, ...]:
    return fit_classics(dataset, ("valid", "test"), min_context, 0, lambda _done, _total: None)


@each_rival
def test_labels_of_a_target_and_of_all_later_ones_change_no_prediction(name: str) -> None:
    log = make_log()
    row = int(np.flatnonzero(log.users.splits == TEST)[70])
    hidden = (log.users.splits == TEST) & (np.arange(len(log.user)) >= row)
    labels = np.where(hidden, 1 - log.users.labels, log.users.labels).astype(np.int8)
    changed = Log(replace(log.users, labels=labels), log.words)
    until = [*np.flatnonzero((log.users.splits == TEST) & ~hidden).tolist(), row]
    before, after = best(fits(name)), best(RIVALS[name][0](changed, learning_of(changed)))
    assert after.choice == before.choice
    assert np.array_equal(after.predict(np.array(until)), before.predict(np.array(until)))


@each_rival
def test_a_rival_learns_what_items_are_worth_and_users_like(name: str) -> None:
    log = make_log()
    rows = np.flatnonzero(log.users.splits == TEST)
    assert auc(log.users.labels[rows], best(fits(name)).predict(rows)) > 0.75


@each_rival
def test_a_grid_has_as_many_models_as_progress_is_told(name: str) -> None:
    assert len(fits(name)) == RIVALS[name][1]


@needs_myfm
@pytest.mark.parametrize("min_context", [0, 26])
def test_targets_and_their_order_are_those_of_an_evaluation(tmp_path: Path, min_context: int) -> None:
    dataset = write_dataset(tmp_path, LENGTHS)
    classics = fitted_on(dataset, min_context)
    for number, split in [(VALID, "valid"), (TEST, "test")]:
        units = plan_units(dataset.segments, number, tokens_per_target=1 << 17)
        assert len(units) > 1
        users, labels = [], []
        for unit in units:
            sequences = read_unit(dataset, unit)
            user, position = targets_of(sequences, number, min_context)
            users += unit.users[user].tolist()
            labels += sequences.labels[sequences.offsets[user] + position].tolist()
        for classic in classics:
            assert classic.answers[split].user.tolist() == users, classic.name
            assert classic.answers[split].label.tolist() == labels, classic.name


@needs_myfm
def test_the_same_seed_gives_the_same_predictions_and_every_model_is_told(tmp_path: Path) -> None:
    dataset, told = write_dataset(tmp_path, LENGTHS), []
    first = fit_classics(dataset, ("test",), 0, 0, lambda done, total: told.append((done, total)))
    second = fitted_on(dataset)
    assert told == [(done, len(told)) for done in range(1, len(told) + 1)]
    for one, other in zip(first, second, strict=True):
        assert (one.name, one.chosen) == (other.name, other.chosen)
        assert np.array_equal(one.answers["test"].probability, other.answers["test"].probability)


@pytest.mark.parametrize("package", ["myfm", *(["pkg_resources"] if sys.version_info < (3, 12) else [])])
def test_without_the_extra_one_line_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setattr(rivals, "NEEDED", ("scipy", package))
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError) as error:
        fitted_on(write_dataset(tmp_path, LENGTHS))
    assert str(error.value) == (
        f"study.classical: needs the package {package}; "
        "pip install 'dti-ray[study]', or leave them out: study.classical=false"
    )


@needs_myfm
def test_a_split_without_targets_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="data set tiny: has no target in its valid split after 40 others; another"):
        fitted_on(write_dataset(tmp_path, LENGTHS), min_context=40)


@needs_myfm
def test_training_without_a_no_click_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builders, "make_sequences", clicks_only)
    with pytest.raises(InputError, match="one class only in its train split; expected clicks and no-clicks"):
        fitted_on(write_dataset(tmp_path, LENGTHS))
