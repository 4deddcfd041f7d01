"""The algorithm: users' interactions become prompts of n context and k target interactions, laid into rows.

Stage: packing. In: `UserSequences`, a `TokenTable`, a `PackSpec`. Out: `PackedRow`s of integers.
Invariant: each target of the split stands in exactly one row; no row holds more than `row_tokens` tokens;
a token carries all that the mask needs: its prompt, its interaction, and its *cut*, the first interaction
that it may not see (its own number if ordered, the first of its second if strictly earlier).

    6 interactions a..f, n = 2, targets d e f, k = 3      prompt   b + c - d S + e S - f S
    (+ and - are feedback, S is [SUM]; the last feedback has no reader and is left out)
    interaction   1 1 2 2 3 3 3 4 4 4 5 5        S has its interaction's number and the
    cut           1 1 2 2 3 3 3 4 4 4 5 5        position behind its text: + and S share one

Where texts tell the time, a text is [phrase | item]: how long after the last earlier second of the user's history the
interaction happened. That is a fact of the interaction, not of the prompt, so any prompt shows the same text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dti_ray.config import PackingConfig
from dti_ray.data.interactions import UserSequences
from dti_ray.data.mixture import draw_targets
from dti_ray.data.prompts import NO, TokenTable, phrase_of
from dti_ray.errors import ConfigError, Fault


@dataclass(frozen=True)
class PackSpec:
    """What the algorithm needs to know of the configuration.

    Attributes:
        k: targets of a prompt; None streams a user's whole run of targets.
        n: context interactions in front of a prompt's first target.
        strictly_earlier: hide feedback that carries the target's own timestamp.
        min_context: targets with fewer interactions before them are left out.
        row_tokens: capacity of a row, prefix and [SUM] included.
        split: 0 train, 1 valid, 2 test: whose interactions are targets.
        k_min: draw each prompt's targets between k_min and k; None gives every prompt k of them.
    """

    k: int | None
    n: int
    strictly_earlier: bool
    min_context: int
    row_tokens: int
    split: int
    k_min: int | None = None

    def sliding(self) -> PackSpec:
        """Return the same with one target a prompt."""
        return replace(self, k=1, k_min=None)


@dataclass(frozen=True)
class PackedRow:
    """Prompts laid one after another; [SUM] tokens are kept beside the content, by reference.

    Attributes:
        tokens: int32 [C], item tokens and feedback.
        positions: int32 [C], rotary position; every prompt starts at 0.
        prompt: int32 [C], number of the prompt in the row, from 1 (0 is padding).
        interaction: int32 [C], number of the interaction in its user's history.
        cut: int32 [C], first interaction of the user that the token may not see, its own apart.
        after: int32 [S], index of the content token that a [SUM] stands behind.
        labels: int8 [S], feedback of the target.
        users: int64 [S], the target's user, as numbered by the sequences that were packed.
        prefix_tokens: tokens of the shared prefix, counted into the capacity.
    """

    tokens: np.ndarray
    positions: np.ndarray
    prompt: np.ndarray
    interaction: np.ndarray
    cut: np.ndarray
    after: np.ndarray
    labels: np.ndarray
    users: np.ndarray
    prefix_tokens: int = 0

    @property
    def targets(self) -> int:
        """Number of targets in the row."""
        return len(self.after)

    @property
    def size_tokens(self) -> int:
        """Tokens of the row: prefix, content and [SUM]."""
        return self.prefix_tokens + len(self.tokens) + len(self.after)


@dataclass(frozen=True)
class _Prompts:
    """A table of prompts, one entry each; all numbers index the flat interactions of the sequences.

    The context is [start, first), the targets are [first, end). What no target may see is left out of the context.
    """

    user: np.ndarray
    start: np.ndarray
    first: np.ndarray
    end: np.ndarray

    def take(self, index: np.ndarray | slice) -> _Prompts:
        return _Prompts(self.user[index], self.start[index], self.first[index], self.end[index])


def pack_spec(packing: PackingConfig, context: str, split: int, **changes: int | None) -> PackSpec:
    """Derive the specification of one split from the configuration; only training asks for its `k_min`."""
    spec = PackSpec(
        k=None if packing.k == "all" else packing.k,
        n=packing.n,
        strictly_earlier=context == "strictly_earlier",
        min_context=packing.min_context,
        row_tokens=packing.row_tokens,
        split=split,
    )
    return replace(spec, **changes)


def check_capacity(spec: PackSpec, table: TokenTable, where: str = "packing.row_tokens") -> None:
    """Refuse a row that could not hold one prompt of the catalogue's longest items.

    Raises:
        ConfigError: with the size needed.
    """
    longest = int(table.gap_lengths.max() + table.lengths.max(initial=1)) + 1
    targets = spec.k if spec.k is not None else 1
    needed = len(table.prefix) + (spec.n + targets) * longest + targets
    if spec.row_tokens < needed:
        raise ConfigError(
            Fault(
                where,
                f"got {spec.row_tokens}",
                f"at least {needed}: n + k = {spec.n + targets} interactions of up to {longest} tokens",
                "raise it, or lower packing.k, packing.n or prompt.max_item_tokens",
            )
        )


def end_to_end(rows: Sequence[PackedRow]) -> PackedRow:
    """Lay rows one after another as one long row, its prompts numbered anew; the prefix is there once.

    Prompts never see each other and all read the same prefix, so the predictions are those of the rows apart,
    and a batch of rows of different length needs no padding.
    """
    if len(rows) == 1:
        return rows[0]
    prompts = np.cumsum([0, *(int(row.prompt.max(initial=0)) for row in rows)])
    tokens = np.cumsum([0, *(len(row.tokens) for row in rows)])
    moved = [
        replace(row, prompt=row.prompt + before, after=row.after + begin)
        for row, before, begin in zip(rows, prompts[:-1].tolist(), tokens[:-1].tolist(), strict=True)
    ]
    names = ("tokens", "positions", "prompt", "interaction", "cut", "after", "labels", "users")
    arrays = {name: np.concatenate([getattr(row, name) for row in moved]) for name in names}
    return PackedRow(**arrays, prefix_tokens=max(row.prefix_tokens for row in rows))


def pack(
    sequences: UserSequences,
    table: TokenTable,
    spec: PackSpec,
    rows: int | None = None,
    rng: np.random.Generator | None = None,
) -> Iterator[PackedRow]:
    """Pack one split of some users.

    Args:
        sequences: time-ordered interactions of whole users.
        table: item texts as tokens.
        spec: the layout; it must have passed `check_capacity`.
        rows: spread the targets evenly over so many rows; None fills each row to its capacity.
        rng: shuffles the prompts of all users; None keeps their order. A mixture of k is drawn from it.

    Yields:
        Rows in order; more than `rows` only where the capacity forces it, fewer where prompts run out.
    """
    histories = _Histories.of(sequences, table, spec)
    prompts = _cut_oversized(_prompts(sequences, histories.cut, spec, rng), histories, spec, len(table.prefix))
    if rng is not None:
        prompts = prompts.take(rng.permutation(len(prompts.user)))
    for chosen in _rows(prompts, histories.sizes(prompts), spec.row_tokens - len(table.prefix), rows):
        some = prompts.take(chosen)  # the feedback of a prompt's last target has no reader
        yield _assemble(some, histories.context_end(some), some.end - 1, histories, sequences, table)


def lay_prompt(
    sequences: UserSequences, table: TokenTable, spec: PackSpec, start: int, first: int, shown: int
) -> PackedRow:
    """Lay one user's interactions as one prompt, whatever its length.

    Args:
        sequences: of one user; what stands behind `shown` are candidates: they have no feedback, and none is seen by
            another, since they share a cut.
        table: item texts as tokens.
        spec: says whether context is strictly earlier.
        start: first interaction of the context.
        first: first target.
        shown: number of interactions that happened.
    """
    histories = _Histories.of(sequences, table, spec)
    histories = replace(histories, cut=np.minimum(histories.cut, shown))
    start_, first_, end = (np.array([index]) for index in (start, first, len(sequences.items)))
    prompt = _Prompts(np.zeros(1, dtype=np.int64), start_, first_, end)
    return _assemble(prompt, prompt.first, np.array([shown]), histories, sequences, table)


@dataclass(frozen=True)
class _Histories:
    """One entry per flat interaction.

    Attributes:
        user_start: first interaction of its user.
        cut: first interaction of its user that it may not see, itself at the latest.
        phrase: number of its time gap's phrase; empty where texts do not tell the time.
        content: tokens of phrase, item text and feedback.
        before: [N + 1], content tokens of all interactions before it.
    """

    user_start: np.ndarray
    cut: np.ndarray
    phrase: np.ndarray
    content: np.ndarray
    before: np.ndarray

    @classmethod
    def of(cls, sequences: UserSequences, table: TokenTable, spec: PackSpec) -> _Histories:
        user_start = np.repeat(sequences.offsets[:-1], np.diff(sequences.offsets))
        number = np.arange(len(sequences.items))
        cut = _starts_of_seconds(sequences, user_start) if spec.strictly_earlier else number
        content = table.offsets[sequences.items + 1] - table.offsets[sequences.items] + 1
        phrase = np.zeros(0, dtype=np.int64)
        if table.tells_time:
            phrase = phrase_of(_seconds_since(sequences, user_start))
            content += table.gap_lengths[phrase]
        return cls(user_start, cut, phrase, content, np.concatenate([[0], np.cumsum(content)]))

    def sizes(self, prompts: _Prompts) -> np.ndarray:
        """Tokens of each prompt, [SUM]s included; the last feedback is left out."""
        context = self.before[self.context_end(prompts)] - self.before[prompts.start]
        targets = self.before[prompts.end] - self.before[prompts.first]
        return context + targets - 1 + prompts.end - prompts.first

    def context_end(self, prompts: _Prompts) -> np.ndarray:
        """Where each prompt's context ends: what shares the second of all its targets has no reader."""
        return np.clip(self.cut[prompts.end - 1], prompts.start, prompts.first)


def _starts_of_seconds(sequences: UserSequences, user_start: np.ndarray) -> np.ndarray:
    """Return for each interaction the first one of its user in its second."""
    is_first = np.ones(len(user_start), dtype=bool)
    is_first[1:] = (np.diff(sequences.times) != 0) | (np.diff(user_start) != 0)
    return np.maximum.accumulate(np.where(is_first, np.arange(len(user_start)), 0))


def _seconds_since(sequences: UserSequences, user_start: np.ndarray) -> np.ndarray:
    """Return the seconds since the user's last earlier second, 0 in the first one: the same for all of a second."""
    first = _starts_of_seconds(sequences, user_start)
    earlier = np.where(first > user_start, first - 1, first)
    return sequences.times - sequences.times[earlier]


def _prompts(sequences: UserSequences, cut: np.ndarray, spec: PackSpec, rng: np.random.Generator | None) -> _Prompts:
    """Cut each user's targets into runs of k, or of what a mixture draws."""
    is_target = sequences.splits == spec.split
    counts = np.concatenate([[0], np.cumsum(is_target)])
    per_user = counts[sequences.offsets[1:]] - counts[sequences.offsets[:-1]]
    positions = np.flatnonzero(is_target)
    has = per_user > 0
    assert (np.diff(positions) == 1).sum() >= len(positions) - has.sum(), "a split is one run of each user"
    starts = sequences.offsets[:-1][has]
    end = positions[np.cumsum(per_user)[has] - 1] + 1 if has.any() else starts
    first = np.maximum(end - per_user[has], starts + spec.min_context)
    user = np.flatnonzero(has)[first < end]
    starts, first, end = (array[first < end] for array in (starts, first, end))
    if spec.k is None:
        pieces, sizes = np.ones_like(first), end - first
    else:
        pieces = -(-(end - first) // (spec.k_min or spec.k))
        sizes = np.full(pieces.sum(), spec.k)
        if spec.k_min is not None:
            assert rng is not None, "a mixture is drawn"
            sizes = draw_targets(spec.k_min, spec.k, len(sizes), rng.spawn(1)[0])  # the shuffle draws what it drew
    return _split(_Prompts(user, starts, first, end), pieces, sizes, starts, cut, spec.n)


def _split(
    prompts: _Prompts, pieces: np.ndarray, sizes: np.ndarray, user_start: np.ndarray, cut: np.ndarray, n: int
) -> _Prompts:
    """Cut each prompt's targets into at most `pieces` runs of the next `sizes`; its last run ends where they end."""
    parent = np.repeat(np.arange(len(pieces)), pieces)
    done = np.cumsum(sizes) - sizes
    first = prompts.first[parent] + done - np.repeat(done[np.cumsum(pieces) - pieces], pieces)
    end = np.minimum(first + sizes, prompts.end[parent])
    first, end, parent = (array[first < end] for array in (first, end, parent))
    start = np.maximum(cut[first] - n, user_start[parent]) if len(first) else first
    return _Prompts(prompts.user[parent], start, first, end)


def _cut_oversized(prompts: _Prompts, histories: _Histories, spec: PackSpec, prefix: int) -> _Prompts:
    """Halve what does not fit a row until everything does: k = all, or a first target late in a busy second."""
    capacity = spec.row_tokens - prefix
    while (too_big := (histories.sizes(prompts) > capacity) & (prompts.end - prompts.first > 1)).any():
        user_start, pieces = histories.user_start[prompts.first], np.where(too_big, 2, 1)
        sizes = np.repeat(-(-(prompts.end - prompts.first) // pieces), pieces)
        prompts = _split(prompts, pieces, sizes, user_start, histories.cut, spec.n)
    return prompts


def _rows(prompts: _Prompts, sizes: np.ndarray, capacity: int, rows: int | None) -> Iterator[slice]:
    """Close a row when it has its share of the targets, or when the next prompt would not fit."""
    targets = prompts.end - prompts.first
    share = int(targets.sum()) / rows if rows else float("inf")
    begin = done = used = 0
    closed = 0
    for i, (size, count) in enumerate(zip(sizes.tolist(), targets.tolist(), strict=True)):
        assert size <= capacity, f"a prompt of {size} tokens passed check_capacity({capacity})"
        if i > begin and (used + size > capacity or done >= share * (closed + 1)):
            yield slice(begin, i)
            closed += 1
            begin, used = i, 0
        used += size
        done += count
    if begin < len(sizes):
        yield slice(begin, len(sizes))


def _assemble(
    prompts: _Prompts,
    context_end: np.ndarray,
    mute: np.ndarray,
    histories: _Histories,
    sequences: UserSequences,
    table: TokenTable,
) -> PackedRow:
    """Gather the tokens of some prompts; from `mute` on, interactions go without their feedback."""
    starts = np.stack([prompts.start, prompts.first], axis=1)
    ends = np.stack([context_end, prompts.end], axis=1)
    spans = (ends - starts).sum(axis=1)
    prompt = np.repeat(np.arange(len(spans)), spans)
    interaction = _ranges(starts.ravel(), (ends - starts).ravel())
    is_mute = interaction >= mute[prompt]
    sizes = histories.content[interaction] - is_mute
    begin = np.cumsum(sizes) - sizes
    after = begin + sizes - 2 + is_mute
    cut = histories.cut[interaction]
    origin = histories.before[histories.cut[prompts.start]][prompt]
    position = histories.before[cut] - origin - begin  # of a token less its place in the row
    user_start = histories.user_start[interaction]
    is_target = interaction >= prompts.first[prompt]
    return PackedRow(
        tokens=_tokens(interaction, sizes, after, is_mute, histories, sequences, table),
        positions=_repeat(position, sizes) + np.arange(int(sizes.sum()), dtype=np.int32),
        prompt=_repeat(prompt + 1, sizes),
        interaction=_repeat(interaction - user_start, sizes),
        cut=_repeat(cut - user_start, sizes),
        after=after[is_target].astype(np.int32),
        labels=sequences.labels[interaction][is_target],
        users=prompts.user[prompt][is_target],
        prefix_tokens=len(table.prefix),
    )


def _tokens(
    interaction: np.ndarray,
    sizes: np.ndarray,
    after: np.ndarray,
    is_mute: np.ndarray,
    histories: _Histories,
    sequences: UserSequences,
    table: TokenTable,
) -> np.ndarray:
    """Gather as if a row were item texts only, then write feedback and phrases over what lies between them."""
    ends = table.offsets[sequences.items[interaction] + 1]
    source = np.repeat(ends - 1 - after, sizes)
    source += np.arange(len(source))
    tokens = np.take(table.tokens, source, mode="clip")
    is_heard = ~is_mute
    tokens[after[is_heard] + 1] = table.vocabulary + NO + sequences.labels[interaction[is_heard]].astype(np.int32)
    if table.tells_time:
        phrase = histories.phrase[interaction]
        gap = table.gap_lengths[phrase]
        begin = np.cumsum(sizes) - sizes
        tokens[_ranges(begin, gap)] = table.gap_tokens[_ranges(table.gap_offsets[phrase], gap)]
    return tokens


def _repeat(values: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    return np.repeat(values.astype(np.int32), sizes)


def _ranges(starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Concatenate `arange(start, start + size)` of all pairs."""
    ends = np.cumsum(sizes)
    return np.arange(int(ends[-1]) if len(ends) else 0) - np.repeat(ends - sizes - starts, sizes)
