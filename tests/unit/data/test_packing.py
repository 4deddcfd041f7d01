"""Packing against a slow readable reference: every prompt token for token, every target exactly once."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dti_ray.config import load_config
from dti_ray.data.interactions import TEST, TRAIN, VALID, UserSequences
from dti_ray.data.packing import PackedRow, PackSpec, check_capacity, pack, pack_spec
from dti_ray.data.prompts import GAPS, NO, YES, TokenTable
from dti_ray.errors import ConfigError
from tests.builders import make_sequences, make_table

ROOMY = 100_000


@dataclass(frozen=True)
class Prompt:
    """One prompt as plain Python values; positions, interactions and cuts are those of each token."""

    user: int
    tokens: tuple[int, ...]
    positions: tuple[int, ...]
    interactions: tuple[int, ...]
    cuts: tuple[int, ...]
    after: tuple[int, ...]
    labels: tuple[int, ...]

    @property
    def size_tokens(self) -> int:
        return len(self.tokens) + len(self.after)

    @property
    def targets(self) -> list[tuple[int, int]]:
        return [(self.user, self.interactions[after]) for after in self.after]


def reference(sequences: UserSequences, table: TokenTable, spec: PackSpec) -> list[Prompt]:
    """Cut, lay out and measure one prompt at a time, with loops."""
    prompts = []
    for user in range(len(sequences.offsets) - 1):
        splits = history(sequences, user, "splits")
        targets = [i for i, split in enumerate(splits) if split == spec.split and i >= spec.min_context]
        run = spec.k or max(1, len(targets))
        for begin in range(0, len(targets), run):
            prompts.extend(fitting(sequences, table, spec, user, targets[begin : begin + run]))
    return prompts


def fitting(
    sequences: UserSequences, table: TokenTable, spec: PackSpec, user: int, targets: list[int]
) -> Iterator[Prompt]:
    """Halve a run of targets until each part fits a row."""
    prompt = lay_out(sequences, table, spec, user, targets)
    if len(table.prefix) + prompt.size_tokens <= spec.row_tokens:
        yield prompt
    else:
        half = (len(targets) + 1) // 2
        yield from fitting(sequences, table, spec, user, targets[:half])
        yield from fitting(sequences, table, spec, user, targets[half:])


def lay_out(sequences: UserSequences, table: TokenTable, spec: PackSpec, user: int, targets: list[int]) -> Prompt:
    items, labels, times = (history(sequences, user, name) for name in ("items", "labels", "times"))

    def text(i: int) -> list[int]:
        return [*gap_of(table, times, i), *text_of(table, items[i])]

    def cut(i: int) -> int:
        return times.index(times[i]) if spec.strictly_earlier else i

    def tokens_between(i: int, j: int) -> int:
        return sum(len(text(m)) + 1 for m in range(i, j))

    start = max(0, cut(targets[0]) - spec.n)
    tokens, positions, interactions, cuts, after = [], [], [], [], []
    for i in range(start, targets[-1] + 1):
        is_read = any(i < cut(target) for target in targets)
        if i not in targets and not is_read:
            continue
        content = text(i)
        if i in targets:
            after.append(len(tokens) + len(content) - 1)
        if i != targets[-1]:
            content.append(table.vocabulary + (YES if labels[i] else NO))
        tokens += content
        positions += range(tokens_between(cut(start), cut(i)), tokens_between(cut(start), cut(i)) + len(content))
        interactions += [i] * len(content)
        cuts += [cut(i)] * len(content)
    parts = (tokens, positions, interactions, cuts, after, [labels[i] for i in targets])
    return Prompt(user, *map(tuple, parts))


def history(sequences: UserSequences, user: int, name: str) -> list[int]:
    return getattr(sequences, name)[sequences.offsets[user] : sequences.offsets[user + 1]].tolist()


def text_of(table: TokenTable, item: int) -> list[int]:
    return table.tokens[table.offsets[item] : table.offsets[item + 1]].tolist()


def gap_of(table: TokenTable, times: list[int], i: int) -> list[int]:
    """Return the tokens of the time between interaction i and the last one of an earlier second."""
    earlier = [time for time in times[:i] if time < times[i]]
    if not table.tells_time or not earlier:
        return []
    phrase = sum(seconds <= times[i] - earlier[-1] for seconds, _ in GAPS)
    return table.gap_tokens[table.gap_offsets[phrase] : table.gap_offsets[phrase + 1]].tolist()


def prompts_of(rows: list[PackedRow]) -> list[Prompt]:
    """Take rows apart again."""
    prompts = []
    for row in rows:
        assert row.prompt.tolist() == sorted(row.prompt.tolist())
        assert set(row.prompt.tolist()) == set(range(1, int(row.prompt.max()) + 1))
        for number in range(1, int(row.prompt.max()) + 1):
            mine = np.flatnonzero(row.prompt == number)
            sums = np.flatnonzero(row.prompt[row.after] == number)
            (user,) = set(row.users[sums].tolist())
            arrays = [getattr(row, name)[mine] for name in ("tokens", "positions", "interaction", "cut")]
            lists = [*arrays, row.after[sums] - mine[0], row.labels[sums]]
            prompts.append(Prompt(user, *(tuple(values.tolist()) for values in lists)))
    return prompts


def targets_of(rows: list[PackedRow]) -> list[tuple[int, int]]:
    return [target for prompt in prompts_of(rows) for target in prompt.targets]


def expected_targets(sequences: UserSequences, spec: PackSpec) -> list[tuple[int, int]]:
    return [
        (user, i)
        for user in range(len(sequences.offsets) - 1)
        for i, split in enumerate(history(sequences, user, "splits"))
        if split == spec.split and i >= spec.min_context
    ]


def needed_tokens(spec: PackSpec, table: TokenTable) -> int:
    """Return the row size that `check_capacity` asks for."""
    with pytest.raises(ConfigError) as caught:
        check_capacity(replace(spec, row_tokens=1), table)
    found = re.search(r"expected at least (\d+)", str(caught.value))
    assert found is not None
    return int(found[1])


@st.composite
def worlds(draw: st.DrawFn) -> tuple[UserSequences, TokenTable, PackSpec]:
    """Some users, split in time order, with more or fewer shared seconds; rows from the smallest to roomy ones."""
    lengths = draw(st.lists(st.integers(1, 24), min_size=1, max_size=5))
    seed = draw(st.integers(0, 999))
    table = make_table(seed, prefix=draw(st.integers(0, 3)), longest=draw(st.integers(1, 4)), gaps=draw(st.booleans()))
    sequences = make_sequences(lengths, seed)
    rng = np.random.default_rng(seed)
    seconds = draw(st.sampled_from([1, 3, 1000, 50_000_000]))
    splits, times = [], []
    for length in lengths:
        valid, test = sorted(rng.integers(0, length + 1, 2))
        splits.append(np.repeat([TRAIN, VALID, TEST], [valid, test - valid, length - test]))
        times.append(np.sort(rng.integers(0, seconds, length)))
    sequences = replace(sequences, splits=np.concatenate(splits).astype(np.int8), times=np.concatenate(times))
    spec = PackSpec(
        k=draw(st.none() | st.integers(1, 9) | st.just(40)),
        n=draw(st.integers(1, 8) | st.just(40)),
        strictly_earlier=draw(st.booleans()),
        min_context=draw(st.integers(0, 4)),
        row_tokens=ROOMY,
        split=draw(st.sampled_from([TRAIN, VALID, TEST])),
    )
    spare = draw(st.sampled_from([0, 1, 7, 40, ROOMY]))
    return sequences, table, replace(spec, row_tokens=needed_tokens(spec, table) + spare)


@settings(max_examples=150, deadline=None)
@given(world=worlds())
def test_every_prompt_equals_the_reference_token_for_token(world: tuple[UserSequences, TokenTable, PackSpec]) -> None:
    sequences, table, spec = world
    assert prompts_of(list(pack(sequences, table, spec))) == reference(sequences, table, spec)


@settings(max_examples=100, deadline=None)
@given(world=worlds(), rows=st.none() | st.integers(1, 9), seed=st.none() | st.integers(0, 9))
def test_each_target_stands_in_one_row_and_no_row_is_too_long(
    world: tuple[UserSequences, TokenTable, PackSpec], rows: int | None, seed: int | None
) -> None:
    sequences, table, spec = world
    rng = None if seed is None else np.random.default_rng(seed)
    packed = list(pack(sequences, table, spec, rows, rng))
    assert sorted(targets_of(packed)) == expected_targets(sequences, spec)
    for row in packed:
        assert row.size_tokens == len(table.prefix) + len(row.tokens) + row.targets <= spec.row_tokens
        assert row.targets > 0
        assert row.prefix_tokens == len(table.prefix)


@settings(max_examples=100, deadline=None)
@given(world=worlds())
def test_context_never_reaches_forward_nor_further_than_n_back(
    world: tuple[UserSequences, TokenTable, PackSpec],
) -> None:
    sequences, table, spec = world
    for prompt in prompts_of(list(pack(sequences, table, spec))):
        times = history(sequences, prompt.user, "times")
        first, last = prompt.targets[0][1], prompt.targets[-1][1]
        assert max(prompt.interactions) == last
        shown = sorted(set(prompt.interactions))
        for after in prompt.after:
            target, cut = prompt.interactions[after], prompt.cuts[after]
            seen = [i for i in shown if i < cut]
            if spec.strictly_earlier:
                assert all(times[i] < times[target] for i in seen)
            if target == first:
                everything = [i for i in range(target) if not spec.strictly_earlier or times[i] < times[target]]
                assert seen == everything[-spec.n :]


@settings(max_examples=60, deadline=None)
@given(world=worlds(), rows=st.integers(1, 9), seed=st.integers(0, 9))
def test_shuffled_prompts_are_the_same_prompts(
    world: tuple[UserSequences, TokenTable, PackSpec], rows: int, seed: int
) -> None:
    sequences, table, spec = world
    shuffled = prompts_of(list(pack(sequences, table, spec, rows, np.random.default_rng(seed))))
    assert Counter(shuffled) == Counter(reference(sequences, table, spec))
    again = prompts_of(list(pack(sequences, table, spec, rows, np.random.default_rng(seed))))
    assert shuffled == again


@settings(max_examples=80, deadline=None)
@given(world=worlds(), rows=st.integers(1, 9))
def test_asked_number_of_rows_is_not_exceeded_where_the_capacity_allows(
    world: tuple[UserSequences, TokenTable, PackSpec], rows: int
) -> None:
    sequences, table, spec = world
    packed = list(pack(sequences, table, replace(spec, row_tokens=ROOMY), rows))
    total = len(expected_targets(sequences, spec))
    assert len(packed) <= rows
    assert bool(packed) == bool(total)
    if spec.k is not None:
        assert all(row.targets < total / rows + spec.k for row in packed)


def test_shuffling_changes_the_order() -> None:
    sequences, table = make_sequences([40, 40]), make_table()
    spec = PackSpec(k=2, n=3, strictly_earlier=False, min_context=0, row_tokens=100, split=TRAIN)
    orders = {tuple(targets_of(list(pack(sequences, table, spec, None, np.random.default_rng(i))))) for i in range(3)}
    assert len(orders) == 3


def test_worked_example_of_the_module() -> None:
    table = TokenTable(
        tokens=np.arange(10, 17, dtype=np.int32), offsets=np.array([0, 1, 2, 3, 5, 6, 7]),
        prefix=np.zeros(0, np.int32), vocabulary=100, marker_ids=(None, 0, 1),
    )  # fmt: skip
    sequences = UserSequences(
        user_ids=np.array(["u"]), offsets=np.array([0, 6]), items=np.arange(6, dtype=np.int32),
        labels=np.array([0, 1, 0, 0, 1, 0], np.int8), times=np.array([0, 1, 2, 3, 4, 5]),
        splits=np.array([0, 0, 0, 1, 1, 1], np.int8),
    )  # fmt: skip
    spec = PackSpec(k=3, n=2, strictly_earlier=False, min_context=0, row_tokens=20, split=VALID)
    (row,) = pack(sequences, table, spec)
    no, yes = 100 + NO, 100 + YES
    assert row.tokens.tolist() == [11, yes, 12, no, 13, 14, no, 15, yes, 16]
    assert row.interaction.tolist() == row.cut.tolist() == [1, 1, 2, 2, 3, 3, 3, 4, 4, 5]
    assert row.positions.tolist() == list(range(10))
    assert row.after.tolist() == [5, 7, 9]
    assert row.labels.tolist() == [0, 1, 0]
    earlier = replace(sequences, times=np.array([0, 1, 1, 1, 4, 5]))
    (row,) = pack(earlier, table, replace(spec, strictly_earlier=True))
    assert row.tokens.tolist() == [10, no, 11, yes, 12, no, 13, 14, no, 15, yes, 16]
    assert row.interaction.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 3, 4, 4, 5]
    assert row.cut.tolist() == [0, 0, 1, 1, 1, 1, 1, 1, 1, 4, 4, 5]
    assert row.positions.tolist() == [0, 1, 2, 3, 2, 3, 2, 3, 4, 9, 10, 11]


def test_what_no_target_may_see_is_left_out() -> None:
    sequences = replace(make_sequences([9], split=TRAIN), times=np.array([0, 1, 2, 5, 5, 5, 5, 5, 5]))
    spec = PackSpec(k=1, n=2, strictly_earlier=True, min_context=0, row_tokens=ROOMY, split=TRAIN)
    shown = [sorted(set(prompt.interactions)) for prompt in prompts_of(list(pack(sequences, make_table(), spec)))]
    assert shown == [[0], [0, 1], [0, 1, 2], *([1, 2, i] for i in range(3, 9))]


@pytest.mark.parametrize("strictly_earlier", [False, True])
@pytest.mark.parametrize("k", [1, 3, 10, None])
@pytest.mark.parametrize("seconds", [1, 2, 60])
@pytest.mark.parametrize("gaps", [False, True])
def test_size_that_check_capacity_asks_for_works_and_one_less_is_refused(
    k: int | None, strictly_earlier: bool, seconds: int, gaps: bool
) -> None:
    table = replace(make_table(prefix=2, gaps=gaps), tokens=np.arange(90, dtype=np.int32), offsets=np.arange(0, 91, 3))
    sequences = make_sequences([60, 7])
    times = [np.sort(np.arange(length) % seconds) for length in (60, 7)]
    sequences = replace(sequences, times=np.concatenate(times))
    spec = PackSpec(k=k, n=4, strictly_earlier=strictly_earlier, min_context=0, row_tokens=ROOMY, split=TRAIN)
    enough = replace(spec, row_tokens=needed_tokens(spec, table))
    check_capacity(enough, table)
    rows = list(pack(sequences, table, enough))
    assert sorted(targets_of(rows)) == expected_targets(sequences, spec)
    assert max(row.size_tokens for row in rows) <= enough.row_tokens
    with pytest.raises(ConfigError, match=rf"packing\.row_tokens: got {enough.row_tokens - 1}; expected at least"):
        check_capacity(replace(enough, row_tokens=enough.row_tokens - 1), table)


def test_capacity_that_check_capacity_asks_for_is_not_wasteful() -> None:
    table = replace(make_table(prefix=2), tokens=np.arange(90, dtype=np.int32), offsets=np.arange(0, 91, 3))
    spec = PackSpec(k=5, n=4, strictly_earlier=False, min_context=4, row_tokens=ROOMY, split=TRAIN)
    (row,) = pack(make_sequences([9]), table, spec)
    assert needed_tokens(spec, table) - row.size_tokens == 1, "the last feedback has no reader"


def test_check_capacity_names_the_setting_that_it_was_asked_about() -> None:
    spec = PackSpec(k=1, n=4, strictly_earlier=False, min_context=0, row_tokens=3, split=TEST)
    with pytest.raises(ConfigError, match=r"^eval\.row_tokens: got 3; expected at least \d+: n \+ k = 5 interactions"):
        check_capacity(spec, make_table(), where="eval.row_tokens")


def test_whole_histories_are_cut_to_fit_a_row() -> None:
    sequences, table = make_sequences([300, 2]), make_table()
    spec = PackSpec(k=None, n=5, strictly_earlier=False, min_context=0, row_tokens=200, split=TRAIN)
    prompts = prompts_of(list(pack(sequences, table, spec)))
    assert sorted(target for prompt in prompts for target in prompt.targets) == expected_targets(sequences, spec)
    longest = [prompt for prompt in prompts if prompt.user == 0]
    assert len(longest) > 4
    assert max(prompt.size_tokens for prompt in longest) > 80, "no shorter than needed"
    (whole,) = prompts_of(list(pack(make_sequences([300]), table, replace(spec, row_tokens=ROOMY))))
    assert len(whole.targets) == 300


def test_split_without_targets_gives_no_row() -> None:
    spec = PackSpec(k=3, n=2, strictly_earlier=False, min_context=0, row_tokens=ROOMY, split=TEST)
    assert list(pack(make_sequences([5, 6]), make_table(), spec)) == []
    late = replace(spec, split=TRAIN, min_context=9)
    assert list(pack(make_sequences([5, 6]), make_table(), late, rows=2)) == []


def test_spec_takes_the_configuration_and_sliding_is_one_target_a_prompt() -> None:
    config = load_config([], ["packing.k=all", "packing.n=7", "packing.min_context=3", "packing.row_tokens=99"])
    spec = pack_spec(config.packing, "strictly_earlier", VALID, n=8)
    assert spec == PackSpec(k=None, n=8, strictly_earlier=True, min_context=3, row_tokens=99, split=VALID)
    assert spec.sliding() == replace(spec, k=1)
    assert pack_spec(load_config([], ["packing.k=6"]).packing, "ordered", TRAIN).k == 6


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


def test_cold_users_are_targets_unless_they_are_left_out() -> None:
    sequences, table = make_sequences([1, 1, 2, 5]), make_table(gaps=True)
    for k in (1, 3, None):
        spec = PackSpec(k=k, n=4, strictly_earlier=True, min_context=0, row_tokens=ROOMY, split=TRAIN)
        assert sorted(targets_of(list(pack(sequences, table, spec)))) == expected_targets(sequences, spec)
        for min_context in (1, 2, 9):
            cold = replace(spec, min_context=min_context)
            users = {user for user, _ in targets_of(list(pack(sequences, table, cold)))}
            assert users == {user for user, length in enumerate([1, 1, 2, 5]) if length > min_context}


def test_a_default_row_holds_a_default_prompt_of_the_longest_texts() -> None:
    config = load_config([], [])
    packing, longest = config.packing, config.prompt.max_item_tokens + 1
    assert isinstance(packing.k, int)
    assert (packing.n + packing.k) * longest + packing.k <= packing.row_tokens
