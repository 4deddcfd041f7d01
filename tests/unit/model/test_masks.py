from __future__ import annotations

import numpy as np
import pytest
import torch

from dti_ray.config import Window
from dti_ray.data.interactions import TEST, TRAIN, UserSequences
from dti_ray.data.packing import PackedRow, pack
from dti_ray.data.prompts import TokenTable
from dti_ray.model.batch import collate
from dti_ray.model.masks import Rules, dense_distance, dense_mask
from tests.builders import make_config, train_spec

# Interactions a ... e, one token each; a b are context, c d e are targets; n = 2, k = 3.
#        a a+ b b+ c c+ d d+ e | Sc Sd Se
INTERACTIONS = """
a        1 0  0 0  0 0  0 0  0   0  0  0
a+       1 1  0 0  0 0  0 0  0   0  0  0
b        1 1  1 0  0 0  0 0  0   0  0  0
b+       1 1  1 1  0 0  0 0  0   0  0  0
c        1 1  1 1  1 0  0 0  0   0  0  0
c+       1 1  1 1  1 1  0 0  0   0  0  0
d        0 0  1 1  1 1  1 0  0   0  0  0
d+       0 0  1 1  1 1  1 1  0   0  0  0
e        0 0  0 0  1 1  1 1  1   0  0  0
Sc       1 1  1 1  1 0  0 0  0   1  0  0
Sd       0 0  1 1  1 1  1 0  0   0  1  0
Se       0 0  0 0  1 1  1 1  1   0  0  1
"""
ANCHORED = """
a        1 0  0 0  0 0  0 0  0   0  0  0
a+       1 1  0 0  0 0  0 0  0   0  0  0
b        1 1  1 0  0 0  0 0  0   0  0  0
b+       1 1  1 1  0 0  0 0  0   0  0  0
c        1 1  1 1  1 0  0 0  0   0  0  0
c+       1 1  1 1  1 1  0 0  0   0  0  0
d        1 1  1 1  1 1  1 0  0   0  0  0
d+       1 1  1 1  1 1  1 1  0   0  0  0
e        1 1  1 1  1 1  1 1  1   0  0  0
Sc       1 1  1 1  1 0  0 0  0   1  0  0
Sd       1 1  1 1  1 1  1 0  0   0  1  0
Se       1 1  1 1  1 1  1 1  1   0  0  1
"""
THREE_TOKENS = """
a        1 0  0 0  0 0  0 0  0   0  0  0
a+       1 1  0 0  0 0  0 0  0   0  0  0
b        1 1  1 0  0 0  0 0  0   0  0  0
b+       0 1  1 1  0 0  0 0  0   0  0  0
c        0 0  1 1  1 0  0 0  0   0  0  0
c+       0 0  0 1  1 1  0 0  0   0  0  0
d        0 0  0 0  1 1  1 0  0   0  0  0
d+       0 0  0 0  0 1  1 1  0   0  0  0
e        0 0  0 0  0 0  1 1  1   0  0  0
Sc       0 0  0 1  1 0  0 0  0   1  0  0
Sd       0 0  0 0  0 1  1 0  0   0  1  0
Se       0 0  0 0  0 0  0 1  1   0  0  1
"""
# c and d share a second: d may not see c nor its feedback.
STRICTLY_EARLIER = """
a        1 0  0 0  0 0  0 0  0   0  0  0
a+       1 1  0 0  0 0  0 0  0   0  0  0
b        1 1  1 0  0 0  0 0  0   0  0  0
b+       1 1  1 1  0 0  0 0  0   0  0  0
c        1 1  1 1  1 0  0 0  0   0  0  0
c+       1 1  1 1  1 1  0 0  0   0  0  0
d        1 1  1 1  0 0  1 0  0   0  0  0
d+       1 1  1 1  0 0  1 1  0   0  0  0
e        0 0  0 0  1 1  1 1  1   0  0  0
Sc       1 1  1 1  1 0  0 0  0   1  0  0
Sd       1 1  1 1  0 0  1 0  0   0  1  0
Se       0 0  0 0  1 1  1 1  1   0  0  1
"""


def _matrix(text: str) -> np.ndarray:
    return np.array([line.split()[1:] for line in text.strip().splitlines()], dtype=int)


def _row(times: list[int], context: str, prefix: int = 0) -> tuple[PackedRow, TokenTable]:
    table = TokenTable(np.arange(5, dtype=np.int32), np.arange(6), np.arange(prefix, dtype=np.int32), 5, (None, 0, 1))
    sequences = UserSequences(
        np.array(["u"]), np.array([0, 5]), np.arange(5, dtype=np.int32), np.array([1, 0, 1, 1, 0], dtype=np.int8),
        np.array(times), np.array([TEST, TEST, TRAIN, TRAIN, TRAIN], dtype=np.int8),
    )  # fmt: skip
    config = make_config("packing.n=2", "packing.k=3", f"prompt.context={context}")
    (row,) = pack(sequences, table, train_spec(config))
    return row, table


@pytest.mark.parametrize(
    ("window", "times", "context", "expected"),
    [
        (Window.INTERACTIONS, [1, 2, 3, 4, 5], "ordered", INTERACTIONS),
        (Window.OFF, [1, 2, 3, 4, 5], "ordered", ANCHORED),
        (Window.TOKENS, [1, 2, 3, 4, 5], "ordered", THREE_TOKENS),
        (Window.INTERACTIONS, [1, 2, 3, 3, 5], "strictly_earlier", STRICTLY_EARLIER),
    ],
)
def test_mask_equals_the_matrix_written_by_hand(window: Window, times: list[int], context: str, expected: str) -> None:
    row, table = _row(times, context)
    mask = dense_mask(collate([row], table), Rules(window, n=2, window_tokens=3))[0]
    assert mask.int().numpy().tolist() == _matrix(expected).tolist()


def test_everyone_sees_the_whole_prefix_and_the_prefix_sees_itself_causally() -> None:
    row, table = _row([1, 2, 3, 4, 5], "ordered", prefix=2)
    mask = dense_mask(collate([row], table), Rules(Window.INTERACTIONS, n=2, window_tokens=3))[0]
    assert mask[2:, :2].all()
    assert mask[:2, :2].int().tolist() == [[1, 0], [1, 1]]
    assert not mask[:2, 2:].any()
    assert mask[2:, 2:].int().numpy().tolist() == _matrix(INTERACTIONS).tolist()


def test_positions_count_content_only_and_a_sum_stands_where_its_feedback_does() -> None:
    row, table = _row([1, 2, 3, 4, 5], "ordered")
    batch = collate([row], table)
    assert batch.positions[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 5, 7, 9]


def test_interactions_of_one_second_stand_side_by_side() -> None:
    row, table = _row([1, 2, 3, 3, 5], "strictly_earlier")
    batch = collate([row], table)
    assert batch.positions[0].tolist() == [0, 1, 2, 3, 4, 5, 4, 5, 8, 5, 5, 9]


def test_distance_counts_interactions_back_from_the_newest_one_that_may_be_seen() -> None:
    row, table = _row([1, 2, 3, 4, 5], "ordered")
    distance = dense_distance(collate([row], table))[0]
    assert distance[-1, :9].tolist() == [4, 4, 3, 3, 2, 2, 1, 1, 0]
    assert distance[-1, 9:].tolist() == [0, 0, 0]


def test_prompts_of_a_row_never_see_each_other() -> None:
    first, table = _row([1, 2, 3, 4, 5], "ordered")
    config = make_config("packing.n=2", "packing.k=1")
    sequences = UserSequences(
        np.array(["u"]), np.array([0, 5]), np.arange(5, dtype=np.int32), np.ones(5, dtype=np.int8),
        np.arange(5), np.full(5, TRAIN, dtype=np.int8),
    )  # fmt: skip
    (row,) = pack(sequences, table, train_spec(config))
    assert row.targets == 5
    batch = collate([row, first], table)
    mask = dense_mask(batch, Rules(Window.OFF, n=2, window_tokens=3))
    content = len(row.tokens)
    for q in range(content):
        for k in range(content):
            if row.prompt[q] != row.prompt[k]:
                assert not mask[0, q, k]
    sums = torch.eye(5, dtype=torch.bool)
    assert torch.equal(mask[0, batch.prompt.shape[1] :, batch.prompt.shape[1] :], sums)
