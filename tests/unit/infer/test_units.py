"""Units hold every target once, are about equal and bounded; what is lost or doubled on the way back is an error."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from operator import itemgetter

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dti_ray.data.interactions import TEST, Segment
from dti_ray.errors import IncompleteError
from dti_ray.infer import units
from dti_ray.infer.units import TargetScores, Unit, collect, from_table, plan_units, to_table

PROTOCOLS = 2

counts = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9), st.integers(0, 60)), min_size=1, max_size=40)


def make_segments(rows: Iterable[tuple[int, int, int]]) -> list[Segment]:
    """Make segments of (shard, users, test targets), in the order of shards."""
    of_shards = sorted(rows, key=itemgetter(0))
    return [Segment(f"part-{shard}", i, users, 100, (40, 0, test)) for i, (shard, users, test) in enumerate(of_shards)]


def make_scores(unit: Unit, seed: int = 0) -> TargetScores:
    """Make scores of a unit all of whose targets are of its first user."""
    rng, size = np.random.default_rng(seed), unit.targets
    return TargetScores(
        user=np.full(size, unit.users[0]),
        user_id=pa.chunked_array([[f"user {unit.users[0]}"] * size]),
        position=np.arange(size),
        label=rng.integers(0, 2, size).astype(np.int8),
        log_odds=rng.normal(size=(PROTOCOLS, size)),
        tokens=np.array([100 * size, 10 * size]),
        seconds=np.array([0.5, 0.25]),
    )


def make_found(planned: list[Unit]) -> list[tuple[int, TargetScores]]:
    return [(unit.number, make_scores(unit, unit.number)) for unit in planned]


def make_units() -> list[Unit]:
    return plan_units(make_segments([(0, 2, 30), (0, 1, 0), (0, 3, 10), (0, 2, 20), (1, 4, 5)]), TEST, 10_000.0)


def nothing(_done: int, _total: int) -> None:
    pass


def test_documented_example_is_cut_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "UNIT_TOKENS", 250)
    segments = make_segments([(0, 2, 30), (0, 1, 0), (0, 3, 10), (0, 2, 20), (0, 4, 5)])
    planned = plan_units(segments, TEST, tokens_per_target=10.0)
    assert [[segment.targets[TEST] for segment in unit.segments] for unit in planned] == [[30], [10, 20], [5]]
    assert [unit.first_users for unit in planned] == [(0,), (3, 6), (8,)]
    assert planned[1].users.tolist() == [3, 4, 5, 6, 7]


@given(counts, st.floats(1.0, 1e7))
def test_every_segment_with_targets_is_in_one_unit_of_its_shard_and_no_unit_is_large(
    rows: list[tuple[int, int, int]], tokens_per_target: float
) -> None:
    segments = make_segments(rows)
    planned = plan_units(segments, TEST, tokens_per_target)
    assert [segment for unit in planned for segment in unit.segments] == [one for one in segments if one.targets[TEST]]
    assert [unit.number for unit in planned] == list(range(len(planned)))
    least = max(units.UNIT_TOKENS / tokens_per_target, sum(segment.targets[TEST] for segment in segments) / units.UNITS)
    before = np.cumsum([0, *(segment.users for segment in segments)])
    for unit in planned:
        assert len({segment.shard for segment in unit.segments}) == 1
        assert unit.targets == sum(segment.targets[TEST] for segment in unit.segments)
        assert unit.targets - unit.segments[-1].targets[TEST] < least
        assert unit.first_users == tuple(before[segments.index(segment)] for segment in unit.segments)


def test_a_long_log_has_about_a_thousand_units_at_most() -> None:
    segments = make_segments((0, 5, 50) for _ in range(5000))
    assert 900 < len(plan_units(segments, TEST, 1e6)) <= units.UNITS


def test_scores_survive_arrow() -> None:
    for unit in make_units():
        scores = make_scores(unit, seed=3)
        table = to_table(unit.number, scores)
        ((number, back),) = from_table(pa.concat_tables([table]))
        assert number == unit.number
        for name in ("user", "position", "label", "log_odds", "tokens", "seconds"):
            np.testing.assert_array_equal(getattr(back, name), getattr(scores, name))
        assert back.user_id.to_pylist() == scores.user_id.to_pylist()


def test_scores_are_laid_in_order_whatever_the_order_in_which_they_come() -> None:
    planned = make_units()
    told: list[tuple[int, int]] = []
    scores = collect(planned, reversed(make_found(planned)), 0, lambda done, total: told.append((done, total)))
    assert told[-1] == (65, 65)
    assert scores.user.tolist() == sorted(scores.user.tolist())
    assert scores.log_odds.shape == (PROTOCOLS, 65)
    assert scores.tokens.tolist() == [6500, 650]
    assert scores.seconds.sum() == pytest.approx(0.75 * len(planned))


def test_what_is_lost_is_named() -> None:
    planned = make_units()
    found = make_found(planned)
    with pytest.raises(IncompleteError, match=r"unit 1 \(part-0, from row group 2\): was not scored; expected 30 targ"):
        collect(planned, [found[0], *found[2:]], 0, nothing)
    short = replace(planned[2], targets=planned[2].targets - 1)
    with pytest.raises(IncompleteError, match=r"unit 2 .*: 4 targets were scored; expected 5 as in the manifest"):
        collect(planned, [*found[:2], (2, make_scores(short))], 0, nothing)


def test_what_comes_twice_is_refused() -> None:
    planned = make_units()
    found = make_found(planned)
    with pytest.raises(IncompleteError, match="unit 0: was scored twice; expected once"):
        collect(planned, [*found, found[0]], 0, nothing)
    doubled = replace(found[1][1], position=np.zeros(planned[1].targets, dtype=np.int64))
    with pytest.raises(IncompleteError, match="65 targets scored, 36 distinct; expected each one once"):
        collect(planned, [found[0], (1, doubled), *found[2:]], 0, nothing)
