"""The baselines against hand-computed examples, a slow loop, and the arrow of time."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dti_ray.errors import InputError
from dti_ray.infer import baselines
from dti_ray.infer.baselines import TEST, TRAIN, VALID, predict_baselines, stream_baselines
from dti_ray.metrics import Predictions, log_loss


@dataclass(frozen=True, eq=False)
class Sequences:
    """The columns of UserSequences that the baselines read."""

    offsets: np.ndarray
    items: np.ndarray
    labels: np.ndarray
    splits: np.ndarray


def sequences(*users: str) -> Sequences:
    """Users written as 'item label split' triples, such as 'a1t b0v c1e': t train, v valid, e test."""
    rows = [user.split() for user in users]
    flat = [row for user in rows for row in user]
    return Sequences(
        offsets=np.cumsum([0] + [len(user) for user in rows]),
        items=np.array([ord(row[0]) - ord("a") for row in flat], np.int32),
        labels=np.array([int(row[1]) for row in flat], np.int8),
        splits=np.array(["tve".index(row[2]) for row in flat], np.int8),
    )


def simulate(seed: int, users: int = 12, longest: int = 40) -> Sequences:
    generator = np.random.default_rng(seed)
    lengths = generator.integers(3, longest, size=users)
    parts = [(int(0.8 * n), int(0.9 * n) - int(0.8 * n), n - int(0.9 * n)) for n in lengths]
    taste = np.repeat(generator.normal(size=users), lengths)
    items = generator.integers(0, 9, size=lengths.sum())
    quality = generator.normal(size=9)[items]
    return Sequences(
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        items=items.astype(np.int32),
        labels=(generator.random(lengths.sum()) < 1 / (1 + np.exp(-taste - quality))).astype(np.int8),
        splits=np.concatenate([np.repeat((TRAIN, VALID, TEST), part) for part in parts]).astype(np.int8),
    )


def probability(predictions: dict[str, Predictions]) -> np.ndarray:
    return np.stack([predictions[name].probability for name in baselines.BASELINES])


def gathered(users: Sequences, split: int) -> baselines._Evidence:
    """Return what all train rows say of a split's targets."""
    (part,) = baselines._parts([users], split, tail=False, min_context=0)
    totals = part.totals(part.train, items=9)
    return baselines._Evidence.of([part.gather(part.train, part.target, totals)], totals)


def cut(users: Sequences, ends: list[int]) -> list[Sequences]:
    """Return the users in parts, which end before some of them."""
    bounds = [0, *ends, len(users.offsets) - 1]
    return [part_of(users, start, end) for start, end in pairwise(bounds)]


def part_of(users: Sequences, start: int, end: int) -> Sequences:
    rows = slice(users.offsets[start], users.offsets[end])
    offsets = users.offsets[start : end + 1] - users.offsets[start]
    return Sequences(offsets, users.items[rows], users.labels[rows], users.splits[rows])


def logit(share: float) -> float:
    return math.log(share / (1 - share))


@pytest.fixture
def shrinkage_two(monkeypatch: pytest.MonkeyPatch) -> float:
    monkeypatch.setattr(baselines, "SHRINKAGES", (2.0,))
    return 2.0


def test_every_baseline_by_hand(shrinkage_two: float) -> None:
    # Train: 4 clicks of 8 → g = (4 + 1) / (8 + 2) = 1/2. Target: user 1 meets item a.
    given_users = sequences("a1t a1t a0t b0t b0t", "a1t c1t c0t b1v a0e")
    item = (3 + 2 / 2) / (4 + 2)  # a: 3 of 4
    user = (2 + 2 / 2) / (3 + 2)  # user 1: 2 of 3 in train
    recent = (3 + 2 / 2) / (4 + 2)  # user 1: 3 of 4 before the target, validation too
    predictions = predict_baselines(given_users, TEST)
    got = {name: logit(float(one.probability[0])) for name, one in predictions.items()}
    assert got == pytest.approx(
        {
            "item mean": logit(item),
            "item + user mean": logit(item) + logit(user),
            "item mean + last 10 feedbacks": logit(item) + logit(recent),
        }
    )


def test_the_documented_example_gives_two_fifths() -> None:
    zero = np.zeros(1)
    evidence = baselines._Evidence(
        label=np.zeros(1, np.int8),
        click_rate=0.5,
        counted={"item": (zero + 3, zero + 4), "recent": (zero, zero + 2)},
    )
    assert evidence.probability({"item": 2.0, "recent": 2.0}) == pytest.approx([0.4])


def test_an_unknown_item_of_an_unknown_user_gets_the_click_rate(shrinkage_two: float) -> None:
    predictions = predict_baselines(sequences("a1t a1t a0t b0v", "z1e"), TEST)
    # Laplace: (2 + 1) / (3 + 2)
    assert probability(predictions) == pytest.approx(np.full((3, 1), 0.6))


def test_recent_mean_holds_ten_feedbacks_of_the_same_user(shrinkage_two: float) -> None:
    # User 1 has 12 clicks, then 9 misses and a click, then the target: 1 click of the last 10.
    given_users = sequences("a0t " * 30, "b1t " * 12 + "b0t " * 9 + "b1v " + "c1e")
    predictions = predict_baselines(given_users, TEST)
    rate = (12 + 1) / (51 + 2)
    expected = (1 + 2 * rate) / (10 + 2)
    assert predictions["item mean + last 10 feedbacks"].probability == pytest.approx([expected])


def test_rows_in_are_rows_scored_in_the_order_of_the_sequences() -> None:
    given_users = simulate(seed=0)
    user = np.repeat(np.arange(12), np.diff(given_users.offsets))
    for split in (VALID, TEST):
        target = given_users.splits == split
        for one in predict_baselines(given_users, split).values():
            assert np.array_equal(one.user, user[target])
            assert np.array_equal(one.label, given_users.labels[target])


@given(st.integers(0, 10_000), st.sampled_from([VALID, TEST]))
@settings(deadline=None, max_examples=30)
def test_counts_equal_a_loop_over_interactions(seed: int, split: int) -> None:
    given_users = simulate(seed)
    user = np.repeat(np.arange(12), np.diff(given_users.offsets))
    train, target = given_users.splits == TRAIN, given_users.splits == split
    evidence = gathered(given_users, split)
    labels = given_users.labels
    for position, row in enumerate(np.flatnonzero(target)):
        item = labels[train & (given_users.items == given_users.items[row])]
        own = labels[train & (user == user[row])]
        recent = labels[max(given_users.offsets[user[row]], row - 10) : row]
        for mean, rows in (("item", item), ("user", own), ("recent", recent)):
            clicks, count = evidence.counted[mean]
            assert (clicks[position], count[position]) == (rows.sum(), len(rows)), mean


@given(st.integers(0, 10_000), st.sampled_from([VALID, TEST]))
@settings(deadline=None, max_examples=30)
def test_later_labels_never_change_an_earlier_prediction(seed: int, split: int) -> None:
    given_users = simulate(seed)
    before = predict_baselines(given_users, split)
    rows = np.flatnonzero(given_users.splits == split)
    row = int(np.random.default_rng(seed).choice(rows))
    later = np.arange(len(given_users.labels)) >= row
    # Its own label, this user's later ones, and those of all following users in this split or a later one.
    flipped = np.where(later & (given_users.splits >= split), 1 - given_users.labels, given_users.labels)
    after = predict_baselines(replace(given_users, labels=flipped.astype(np.int8)), split)
    same = rows <= row
    assert np.array_equal(probability(after)[:, same], probability(before)[:, same])


def test_earlier_feedback_does_change_a_prediction(shrinkage_two: float) -> None:
    one = predict_baselines(sequences("a1t a0t b1v a1e a1e"), TEST)["item mean + last 10 feedbacks"].probability
    other = predict_baselines(sequences("a1t a0t b1v a0e a1e"), TEST)["item mean + last 10 feedbacks"].probability
    assert one[0] == other[0]
    assert one[1] > other[1]


def test_shrinkages_are_the_best_of_the_grid_on_validation(caplog: pytest.LogCaptureFixture) -> None:
    given_users = simulate(seed=3, users=12)
    with caplog.at_level(logging.INFO):
        predict_baselines(given_users, TEST)
    evidence = gathered(given_users, VALID)
    losses = {
        (item, recent): log_loss(evidence.label, evidence.probability({"item": item, "recent": recent}))
        for item in baselines.SHRINKAGES
        for recent in baselines.SHRINKAGES
    }
    item, recent = min(losses, key=losses.__getitem__)
    assert f"item mean + last 10 feedbacks: shrinkage {{'item': {item}, 'recent': {recent}}}" in caplog.text


@pytest.mark.parametrize("split", [VALID, TEST])
def test_shrinkages_do_not_depend_on_the_scored_labels(split: int, caplog: pytest.LogCaptureFixture) -> None:
    given_users = simulate(seed=11)
    flipped = np.where(given_users.splits >= split, 1 - given_users.labels, given_users.labels)
    with caplog.at_level(logging.INFO):
        predict_baselines(given_users, split)
        first = list(caplog.messages)
        caplog.clear()
        predict_baselines(replace(given_users, labels=flipped.astype(np.int8)), split)
    assert caplog.messages == first
    assert len(first) == len(baselines.BASELINES)


def test_the_validation_split_is_tuned_on_the_latest_eighth_of_each_users_train_rows() -> None:
    given_users = sequences("a1t " * 16 + "b1v", "a0t " * 7 + "b0v b1e", "a1t " * 9 + "b0e")
    (part,) = baselines._parts([given_users], VALID, tail=True, min_context=0)
    assert np.flatnonzero(part.tuning).tolist() == [14, 15, 34]


def test_train_rows_that_tune_are_not_in_the_means_that_they_tune(caplog: pytest.LogCaptureFixture) -> None:
    # Each user's eighth train row contradicts the only other row of its item: seen alone, that row misleads
    # and the strongest shrinkage is best; counted together with the tuning row, every shrinkage is equal.
    filler = "z1t z0t z1t z0t z1t z0t "
    with caplog.at_level(logging.INFO):
        predict_baselines(sequences(filler + "a1t a0t a1v", filler + "b0t b1t b1v"), VALID)
    assert f"item mean: shrinkage {{'item': {max(baselines.SHRINKAGES)}}}" in caplog.text


def test_without_tuning_targets_the_fixed_shrinkage_is_used_and_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    predictions = predict_baselines(sequences("a1t a1t a1e"), TEST)
    rate = (2 + 1) / (2 + 2)
    expected = (2 + 5 * rate) / (2 + 5)
    assert predictions["item mean"].probability == pytest.approx([expected])
    assert "no targets to choose shrinkages on" in caplog.text


def test_train_labels_of_one_class_give_finite_predictions() -> None:
    for label in "01":
        predictions = predict_baselines(sequences(f"a{label}t " * 20 + f"a{label}v a{label}e"), TEST)
        assert np.all((probability(predictions) > 0) & (probability(predictions) < 1))


@pytest.mark.parametrize("split", [TRAIN, 7])
def test_the_train_split_and_unknown_splits_are_refused(split: int) -> None:
    with pytest.raises(InputError, match="validation \\(1\\) or test \\(2\\)"):
        predict_baselines(sequences("a1t a1v a1e"), split)


def test_a_split_without_targets_is_refused() -> None:
    with pytest.raises(InputError, match="0 targets"):
        predict_baselines(sequences("a1t a1v"), TEST)


@given(st.integers(0, 10_000), st.sampled_from([VALID, TEST]), st.lists(st.integers(1, 11), unique=True))
@settings(deadline=None, max_examples=30)
def test_users_in_parts_get_the_predictions_of_the_whole(seed: int, split: int, ends: list[int]) -> None:
    given_users = simulate(seed)
    parts = cut(given_users, sorted(ends))
    streamed = stream_baselines(lambda: parts, 9, split, has_validation=True)
    for name, whole in predict_baselines(given_users, split).items():
        assert np.array_equal(streamed[name].user, whole.user)
        assert np.array_equal(streamed[name].label, whole.label)
        assert np.array_equal(streamed[name].probability, whole.probability)


def test_targets_without_enough_context_are_left_out(shrinkage_two: float) -> None:
    given_users = sequences("a1t a0e", "a1t b0t b1t a1e")
    streamed = stream_baselines(lambda: [given_users], 2, TEST, has_validation=False, min_context=2)
    whole = predict_baselines(given_users, TEST)
    for name, one in streamed.items():
        assert one.user.tolist() == [1]
        assert one.probability == whole[name].probability[1:]
