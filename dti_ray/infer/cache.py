"""A user whom the model remembers: context is read once, and what happens next is appended.

Stage: scoring. In: interactions as they come. Out: a new `User` each time, and log-odds.
Invariant: `past` holds every token of the prompt that the protocol wants for the next interaction, and nothing else. A
`User` never changes, so whoever scores with one sees it before or after an append, never in between.

    sliding     stand-alone prompts of the last n interactions: what a request without a cache gets
    streaming   the training layout over all that was appended:
                window interactions, tokens   one stream; what no later token can see is dropped
                window off (anchored)         prompts of n context and k more interactions, one after another

A deep layer's states have seen interactions that were dropped since. In a stream they should; in a stand-alone prompt
they must not. So where a prompt begins anew its context is read anew, unless states see nothing but their own
interaction: in a model of one layer, or with `reset: constant` at alpha 1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from dti_ray.config import Window
from dti_ray.data.packing import PackedRow
from dti_ray.errors import ConfigError, Fault
from dti_ray.infer.requests import History
from dti_ray.infer.slate import Reader, Slate, read_context, score_candidates
from dti_ray.model.attention import Past

Protocol = Literal["streaming", "sliding"]


@dataclass(frozen=True, eq=False)
class User:
    """What is remembered of a user.

    Attributes:
        protocol: which prompts the answers equal.
        history: the interactions that a later prompt may need.
        start: the first of them that the prompt holds.
        targets: interactions since the prompt's first target.
        past: keys and values of all interactions from `start` on.
    """

    protocol: Protocol
    history: History
    start: int
    targets: int
    past: Past


def remember(reader: Reader, history: History, protocol: Protocol) -> User:
    """Read a user's history: as if all of it had been appended, but what would be dropped again is not read."""
    run = _run(reader, protocol)
    if run is None:
        begin = _horizon(reader, history) if reader.rules.window is Window.INTERACTIONS else 0
        return append(reader, User(protocol, history[:begin], begin, 0, reader.nothing), history[begin:])
    first = len(history) // run * run
    start = max(reader.cut(history, first) - reader.n, 0)
    user = User(protocol, history[:first], start, 0, read_context(reader, history[:first], start))
    return append(reader, user, history[first:])


def append(reader: Reader, user: User, arrivals: History) -> User:
    """Read what happened next, and only that, unless a prompt begins anew."""
    if user.protocol == "sliding" and len(arrivals) > 1:
        return remember(reader, user.history + arrivals, user.protocol)
    return advance(reader, user, arrivals, is_asked=False)[0]


def score_user(reader: Reader, user: User, candidates: History) -> np.ndarray:
    """Return the log-odds of candidates after all that is remembered."""
    user = _ready(reader, user, reader.cut(user.history, len(user.history), candidates.latest))
    return score_candidates(reader, Slate(user.history, candidates), user.start, user.past)


def advance(reader: Reader, user: User, arrivals: History, is_asked: bool) -> tuple[User, np.ndarray]:
    """Append interactions, at most n at a time.

    Args:
        reader: of the model.
        user: before them.
        arrivals: what happened next.
        is_asked: whether each is also predicted, as a target of the prompt.

    Returns:
        (the user after them; their log-odds, of none where they are not asked for).
    """
    run, found = _run(reader, user.protocol), [np.zeros(0)]
    while len(arrivals):
        count = reader.n if run is None else min(reader.n, run - user.targets % run)
        user, log_odds = _advance(reader, user, arrivals[:count], is_asked)
        found.append(log_odds)
        arrivals = arrivals[count:]
    return _trimmed(reader, user), np.concatenate(found)


def score_stream(reader: Reader, history: History) -> np.ndarray:
    """Return the log-odds [N] of each interaction of a user under streaming inference, each read once."""
    return advance(reader, User("streaming", history[:0], 0, 0, reader.nothing), history, is_asked=True)[1]


def _advance(reader: Reader, user: User, arrivals: History, is_asked: bool) -> tuple[User, np.ndarray]:
    user = _ready(reader, user, reader.cut(user.history, len(user.history), int(arrivals.times[0])))
    history = user.history + arrivals
    row = reader.lay(history, user.start, len(user.history) if is_asked else len(history), len(history))
    log_odds, past = reader.read(row, user.past)
    user = replace(user, history=history, past=past, targets=user.targets + len(arrivals))
    if user.protocol == "streaming" and reader.rules.window is not Window.OFF:
        return _without(user, row, _first_seen(reader, user, row)), log_odds
    return _ready(reader, user, len(history)), log_odds


def _ready(reader: Reader, user: User, cut: int) -> User:
    """Return the user with the prompt that the next interaction wants, given its cut."""
    run = _run(reader, user.protocol)
    if run is None or user.targets % run:
        return user
    user, start = replace(user, targets=0), max(cut - reader.n, 0)
    if start == user.start:
        return user
    if start > user.start and reader.forgets:
        size = len(user.history)
        return _without(user, reader.lay(user.history, user.start, size, size), start)
    return replace(user, start=start, past=read_context(reader, user.history, start))


def _run(reader: Reader, protocol: Protocol) -> int | None:
    """Return the targets of one prompt; None where the next one goes on with it.

    Raises:
        ConfigError: a stream without end would leave the prefix behind, which is not pinned.
    """
    if protocol == "sliding":
        return 1
    if reader.rules.window is Window.OFF:
        return reader.k
    if reader.nothing.prefix and not reader.model.is_pinned:
        expected = "a run with a pinned or no prefix, or with packing.window=off; or the protocol sliding"
        raise ConfigError(
            Fault("prompt.prefix_position", "got first, which streams leave ever further behind", expected)
        )
    return None


def _first_seen(reader: Reader, user: User, row: PackedRow) -> int:
    """Return the first interaction of a stream that a later one may see."""
    rules, size = reader.rules, len(user.history)
    cut = reader.cut(user.history, size, user.history.latest)
    if rules.window is Window.INTERACTIONS:
        return max(user.start, cut - rules.n)
    is_hidden = row.interaction >= cut
    position = row.positions[is_hidden][0] if is_hidden.any() else row.positions[-1] + 1
    seen = row.interaction[position - row.positions < rules.window_tokens]
    return int(seen[0]) if len(seen) else size


def _without(user: User, row: PackedRow, start: int) -> User:
    """Drop what was read of interactions before `start`; the row is the prompt, whole."""
    tokens = int((row.interaction < start).sum())
    position = int(row.positions[tokens]) if tokens < len(row.positions) else 0
    return replace(user, start=start, past=user.past.without(tokens, position)) if tokens else user


def _horizon(reader: Reader, history: History) -> int:
    """Return from which interaction on the stream must be read: n back for every layer."""
    first = reader.cut(history, len(history), history.latest)
    for _ in range(reader.layers):
        first = reader.cut(history, max(first - reader.rules.n, 0))
    return first


def _trimmed(reader: Reader, user: User) -> User:
    """Forget interactions that no later prompt holds; the last second before one tells its time gap."""
    times, size = user.history.times, len(user.history)
    needed = min(user.start, max(reader.cut(user.history, size, user.history.latest) - reader.n, 0))
    if needed == size:
        return user
    first = max(int(np.searchsorted(times, times[needed])) - 1, 0)
    return replace(user, history=user.history[first:], start=user.start - first)
