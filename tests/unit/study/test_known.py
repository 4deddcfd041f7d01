"""What is known of an interaction: hand-computed examples, and the arrow of time."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from dti_ray.data.interactions import TEST, TRAIN, VALID, UserSequences
from dti_ray.study.known import CATEGORY_WORDS, Log, category_words, counts, history, one_hots
from tests.builders import ITEMS, make_sequences

CLICKS, COUNT, LIFT = -4, -3, -1  # columns of `counts`


def make_log(seed: int = 0) -> Log:
    """Return random users with all three splits, and items of one or two of three words."""
    lengths = np.random.default_rng(seed).integers(1, 25, 5).tolist()
    users = make_sequences(lengths, seed)
    splits = np.concatenate([np.digitize(np.arange(n) / n, [0.6, 0.8]) for n in lengths]).astype(np.int8)
    words = sparse.csr_matrix((np.random.default_rng(seed).random((ITEMS, 3)) < 0.5).astype(float))
    return Log(replace(users, splits=splits), words)


def log_of(items: str, labels: str, splits: str, offsets: list[int]) -> Log:
    users = UserSequences(
        user_ids=np.array([f"user {i}" for i in range(len(offsets) - 1)]),
        offsets=np.array(offsets),
        items=np.array(["abcd".index(item) for item in items], np.int32),
        labels=np.array(list(labels), np.int8),
        times=np.arange(len(items)),
        splits=np.array(["tve".index(split) for split in splits], np.int8),
    )
    return Log(users, sparse.csr_matrix((4, 0)))


def lift(clicks: float, count: float, rate: float) -> float:
    mean = (clicks + 5 * rate) / (count + 5)
    return float(np.log(mean / (1 - mean)) - np.log(rate / (1 - rate)))


def test_history_holds_the_lift_of_the_last_feedbacks_of_the_same_user() -> None:
    log = log_of("dd" + "abcab", "00" + "01101", "tt" + "tttve", [0, 2, 7])
    rate = (2 + 1) / (5 + 2)
    assert history(log)[0].tolist() == pytest.approx([0.0] * 5)
    assert history(log)[-1].tolist() == pytest.approx([lift(2, 3, rate), *[lift(2, 4, rate)] * 3, 0.0])


def test_taste_is_what_a_user_thinks_of_a_word_beside_what_it_thinks_of_all() -> None:
    log = log_of("aabbc", "11000", "tttte", [0, 5])
    log = Log(log.users, sparse.csr_matrix(np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 0.0]])))
    usual = (2 + 5 * 0.5) / (4 + 5)
    assert history(log)[-1, -1] == pytest.approx((lift(2, 2, usual) + lift(0, 2, usual)) / 2)


def test_items_are_counted_in_training_up_to_a_row_of_training_and_in_all_of_it_for_others() -> None:
    log = log_of("aaab" + "aaa", "1011" + "010", "ttve" + "tte", [0, 4, 7])
    clicks, count = np.expm1(counts(log)[:, CLICKS]), np.expm1(counts(log)[:, COUNT])
    assert clicks == pytest.approx([0, 1, 2, 0, 1, 1, 2])
    assert count == pytest.approx([0, 1, 4, 0, 2, 3, 4])
    assert counts(log)[-1, LIFT] == pytest.approx(lift(2, 4, (2 + 1) / (4 + 2)))


@given(st.integers(0, 10_000), st.sampled_from([TRAIN, VALID, TEST]))
@settings(deadline=None, max_examples=40)
def test_no_row_reads_its_own_label_or_a_later_one(seed: int, split: int) -> None:
    log, rng = make_log(seed), np.random.default_rng(seed)
    users, of_split = log.users, np.flatnonzero(log.users.splits == split)
    if not len(of_split):
        return
    row = int(rng.choice(of_split))
    later = (users.times > users.times[row]) | ((users.times == users.times[row]) & (np.arange(len(log.user)) >= row))
    own, train = log.user == log.user[row], users.splits == TRAIN
    labels = users.labels.copy()
    if split == TRAIN:  # in another order, so that the click rate stays
        hidden = np.flatnonzero(train & later)
        labels[hidden] = rng.permutation(labels[hidden])
    hidden = ~train & (later | ~own)
    labels[hidden] = 1 - labels[hidden]
    changed = Log(replace(users, labels=labels), log.words)
    assert np.array_equal(counts(changed)[row], counts(log)[row])


def test_earlier_feedback_of_any_split_is_read() -> None:
    log = log_of("abcd", "1010", "tvee", [0, 4])
    other = log_of("abcd", "1000", "tvee", [0, 4])
    assert (history(log)[3] != history(other)[3])[:4].all()


def test_columns_that_training_never_met_are_left_out() -> None:
    log = log_of("ab" + "cab", "10" + "101", "ee" + "ttv", [0, 2, 5])
    user, item = one_hots(log)
    assert user.toarray().tolist() == [[0], [0], [1], [1], [1]]
    assert item.toarray().tolist() == [[1, 0], [0, 0], [0, 1], [1, 0], [0, 0]]


def test_words_of_columns_with_few_distinct_ones_are_categories() -> None:
    titles = [f"film {i}" for i in range(CATEGORY_WORDS)]
    genres = ["Drama", "Drama|War", ""] + ["War"] * (CATEGORY_WORDS - 3)
    items = pa.table({"item_id": [str(i) for i in range(CATEGORY_WORDS)], "title": titles, "genres": genres})
    assert category_words(items).toarray()[:4].tolist() == [[1, 0], [1, 1], [0, 0], [0, 1]]
