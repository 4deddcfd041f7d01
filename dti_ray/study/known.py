"""What is known of an interaction before it happens, in numbers that classical models read.

Stage: study, before its baselines. In: all users of a data set and its catalogue. Out: one row per interaction, in the
order of the data set.
Invariant: no row reads its own label or a later one of its user. Of its user it reads earlier feedback, whatever split
that is of, as a model's context does; of all others it reads labels of training, and a row of training only those of
earlier (second, row), since its own must not be among them. One number knows all labels of training: their click rate,
towards which means are shrunk.

    user u: items c a b a    labels 1 0 1 1    splits train train valid test
    row 3:  the last two feedbacks are 0 and 1; item a has 0 clicks of 1 in training
    row 1:  the last feedback is 1; nothing of item a is earlier in training: 0 clicks of 0
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy import sparse

from dti_ray.data.interactions import TRAIN, UserSequences

CATEGORY_WORDS = 100  # a text column with more distinct words is prose, such as a title
SEPARATORS = re.compile(r"[\s|,;]+")
WINDOWS = (3, 10, 30, None)  # last feedbacks of a user; None: all
SHRINKAGE = 5.0  # pseudo-interactions at the click rate that a mean is shrunk towards
LATEST = 3  # feedbacks that trees read one by one

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Log:
    """All interactions of a data set, and what their items are.

    Attributes:
        users: all of them, one after the other.
        words: float64 [items, words], 1 where a categorical text column of the item has the word.
    """

    users: UserSequences
    words: sparse.csr_matrix

    @property
    def user(self) -> Ints:
        """Number of each interaction's user."""
        return np.repeat(np.arange(len(self.users.user_ids)), np.diff(self.users.offsets))

    @property
    def position(self) -> Ints:
        """Number of each interaction in its user's history."""
        return np.arange(len(self.users.items)) - self.users.offsets[self.user]

    @property
    def is_train(self) -> NDArray[np.bool_]:
        """Whether each interaction is one of training."""
        return self.users.splits == TRAIN

    @property
    def click_rate(self) -> float:
        """Of training, with one pseudo-click and one pseudo-no-click."""
        labels = self.users.labels[self.is_train]
        return (int(labels.sum()) + 1) / (len(labels) + 2)


def category_words(items: pa.Table) -> sparse.csr_matrix:
    """Return which words each item has in those text columns that have few distinct ones, such as genres.

    Args:
        items: the ItemTable.

    Returns:
        float64 [items, words], 0 or 1; the same word of two columns is two words.
    """
    rows: list[int] = []
    columns: list[int] = []
    width = 0
    for name in items.column_names[1:]:
        texts = [set(filter(None, SEPARATORS.split(text))) for text in items[name].to_pylist()]
        number = {word: width + i for i, word in enumerate(sorted(set().union(*texts)))}
        if len(number) <= CATEGORY_WORDS:
            width += len(number)
            rows += [row for row, words in enumerate(texts) for _ in words]
            columns += [number[word] for words in texts for word in sorted(words)]
    return sparse.csr_matrix((np.ones(len(rows)), (rows, columns)), shape=(items.num_rows, width))


def one_hots(log: Log) -> list[sparse.csr_matrix]:
    """Return who, what and of which words each interaction is: float64 [N, ...] each, of what training has seen.

    Words are scaled so that those of an item have length 1 together.
    """
    words = log.words[log.users.items]
    words.data /= np.sqrt(np.repeat(np.diff(words.indptr), np.diff(words.indptr)))
    blocks = [_indicator(log.user), _indicator(log.users.items), words]
    seen = [block[:, np.unique(block[log.is_train].indices)] for block in blocks]
    return [block for block in seen if block.shape[1]]


def history(log: Log) -> Floats:
    """Return the user's earlier feedback, float64 [N, 5].

    Its last 3, 10, 30 feedbacks and all of them, each as the logit of their shrunk mean less that of the click rate;
    then how much more than usual the user has liked items with this one's words, as the mean of such logits over them.
    """
    rate = log.click_rate
    return np.column_stack([*(_lift(*_recent(log, window), rate) for window in WINDOWS), _taste(log)])


def counts(log: Log) -> Floats:
    """Return `history` and what trees read beside it, float64 [N, 14].

    The latest three feedbacks (1, -1, or 0 where there is none), the user's number of interactions so far, seconds
    since the last one, the item's clicks and count so far in training, and the seconds since it first was there; what
    is long-tailed as log(1 + x), and the item's clicks also as the lift of their mean.
    """
    users, position = log.users, log.position
    row = np.arange(len(users.items))
    feedback = 2 * users.labels.astype(np.float64) - 1
    latest = [np.where(position >= back, feedback[row - back], 0.0) for back in range(1, LATEST + 1)]
    since = np.where(position > 0, users.times - users.times[row - 1], 0)
    clicks, count = _item_counts(log)
    lift = _lift(clicks, count, log.click_rate)
    tails = [np.log1p(values) for values in (position, since, clicks, count, _age(log))]
    return np.column_stack([history(log), *latest, *tails, lift])


def _indicator(number: NDArray[np.integer]) -> sparse.csr_matrix:
    """Return float64 [N, largest number + 1] with one 1 in each row."""
    rows = len(number)
    return sparse.csr_matrix(
        (np.ones(rows), number, np.arange(rows + 1)), shape=(rows, int(number.max(initial=-1)) + 1)
    )


def _lift(clicks: Floats, count: Floats, rate: float | Floats) -> Floats:
    """Return the logit of a shrunk mean less that of the rate that it is shrunk towards."""
    odds = (clicks + SHRINKAGE * rate) / (count - clicks + SHRINKAGE * (1 - rate))
    return np.log(odds * (1 - rate) / rate)


def _recent(log: Log, window: int | None) -> tuple[Floats, Floats]:
    """Return (clicks, count) of the user's last feedbacks before each interaction."""
    start, row = log.users.offsets[log.user], np.arange(len(log.users.items))
    first = start if window is None else np.maximum(start, row - window)
    before = np.concatenate([[0.0], np.cumsum(log.users.labels, dtype=np.float64)])
    return before[row] - before[first], (row - first).astype(np.float64)


def _taste(log: Log) -> Floats:
    """Return the mean over the item's words of what the user's earlier feedback on each says beside its mean so far."""
    words = log.words[log.users.items]
    row = np.repeat(np.arange(len(log.users.items)), np.diff(words.indptr))
    pair = log.user[row] * words.shape[1] + words.indices
    order = np.argsort(pair, kind="stable")
    clicks, count = _earlier(pair[order], log.users.labels[row[order]])
    of_user, so_far = _recent(log, None)
    usual = (of_user + SHRINKAGE * log.click_rate) / (so_far + SHRINKAGE)
    total = np.bincount(row[order], _lift(clicks, count, usual[row[order]]), minlength=len(log.users.items))
    return total / np.maximum(np.diff(words.indptr), 1)


def _item_counts(log: Log) -> tuple[Floats, Floats]:
    """Return (clicks, count) of the item in training: earlier ones for a row of training, otherwise all."""
    item, label, train = log.users.items, log.users.labels, np.flatnonzero(log.is_train)
    size = int(item.max(initial=-1)) + 1
    clicks = np.bincount(item[train], label[train], minlength=size)[item].astype(np.float64)
    count = np.bincount(item[train], minlength=size)[item].astype(np.float64)
    order = train[np.lexsort((train, log.users.times[train], item[train]))]
    clicks[order], count[order] = _earlier(item[order], label[order])
    return clicks, count


def _earlier(group: NDArray[np.integer], label: NDArray[np.int8]) -> tuple[Floats, Floats]:
    """Return (clicks, count) of the rows before each one in its group, for rows that lie group by group."""
    row = np.arange(len(group))
    is_first = np.concatenate([[True], group[1:] != group[:-1]])[: len(group)]
    first = np.maximum.accumulate(np.where(is_first, row, 0)) if len(group) else row
    before = np.concatenate([[0.0], np.cumsum(label, dtype=np.float64)])
    return before[row] - before[first], (row - first).astype(np.float64)


def _age(log: Log) -> Floats:
    """Return the seconds since the item's first row of training, 0 where that is later or there is none."""
    item, times, train = log.users.items, log.users.times, log.is_train
    first = np.full(int(item.max(initial=-1)) + 1, np.iinfo(np.int64).max)
    np.minimum.at(first, item[train], times[train])
    return np.maximum(times - np.minimum(first[item], times), 0).astype(np.float64)
