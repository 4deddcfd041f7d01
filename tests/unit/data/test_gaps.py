"""Gaps of time that are written between interactions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from dti_ray.data.interactions import TRAIN, VALID
from dti_ray.data.packing import PackSpec, pack
from dti_ray.data.prompts import GAPS
from tests.builders import make_sequences, make_table


def test_time_gap_counts_from_the_last_earlier_second_of_the_whole_history() -> None:
    day, week = 86_400, 7 * 86_400
    table = replace(
        make_table(prefix=0), gap_tokens=np.arange(100, 100 + len(GAPS), dtype=np.int32),
        gap_offsets=np.concatenate([[0], np.arange(len(GAPS) + 1)]),
    )  # fmt: skip
    names = {100 + i: phrase for i, (_, phrase) in enumerate(GAPS)}
    times = np.array([0, 0, 59, 59, 59 + day, 59 + day, 59 + day + 3 * week])
    splits = np.array([TRAIN] * 4 + [VALID] * 3, np.int8)
    sequences = replace(make_sequences([7]), times=times, splits=splits)
    for strictly_earlier in (False, True):
        spec = PackSpec(k=2, n=7, strictly_earlier=strictly_earlier, min_context=0, row_tokens=ROOMY, split=VALID)
        said: dict[int, set[str]] = {}
        for prompt in prompts_of(list(pack(sequences, table, spec))):
            for i in set(prompt.interactions):
                first = prompt.tokens[prompt.interactions.index(i)]
                said.setdefault(i, set()).add(names.get(first, ""))
        moments, later, weeks = "moments later:", "1 day later:", "2 weeks later:"
        expected = ["", "", moments, moments, later, later, weeks]
        assert said == {i: {phrase} for i, phrase in enumerate(expected) if i in said}
        assert {4, 5, 6} <= said.keys()
