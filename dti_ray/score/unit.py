"""One unit of work: some requests, the histories of their users, a model; and the rows that come out.

Stage: batch scoring, inside actors. In: requests as `Rules.schema`. Out: as many rows with scores, and counts of what
the policies did.
Invariant: a candidate's score is that of `CtrModel.score` with the user's history before the moment, to rounding; rows
of one user and moment share a slate, which changes nothing else (law 7). What comes out depends on the unit alone.

    user u, moment 7, ["a", "b"]          [0.61, 0.34]
    user u, moment 7, ["c", "new"]   →    [0.52, null]         one slate of a, b and c; `new` is unknown
"""

# pyarrow.compute makes its functions at run time, where no type checker sees them.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dti_ray.config import ScoreConfig
from dti_ray.data.sources.values import ROW
from dti_ray.errors import Fault, InputError, RunError
from dti_ray.infer.model import Request, Text
from dti_ray.infer.requests import Interaction, Item
from dti_ray.score.histories import Past
from dti_ray.score.log import CANDIDATES, HISTORY, KEEP, TEXT, TIME, USER, RequestLog
from dti_ray.score.scatter import FILE, NAMED, relisted

CHUNK_PAIRS = 20_000  # that the model is given at once, if a slate has no more
COUNTS = (
    "pairs_scored", "pairs_null", "pairs_of_unknown_items", "pairs_read_by_text", "rows_without_history",
    "rows_of_unknown_users", "interactions_left_out",
)  # fmt: skip

ScoreBatch = Callable[[Sequence[Request]], Sequence[np.ndarray]]


@dataclass(frozen=True)
class Judge:
    """What decides how requests are scored.

    Attributes:
        asked: the `score` section.
        log: names the files.
        item_ids: of the data set that the histories are from.
        known: ids that the model knows.
        size: interactions of a history that matter: n, and the one before them, which time gaps start from.
        per_second: what the log's times are divided by.
    """

    asked: ScoreConfig
    log: RequestLog
    item_ids: Sequence[str]
    known: frozenset[str]
    size: int
    per_second: int


@dataclass(frozen=True)
class _Slate:
    """Rows of one user and moment: what is asked, and where the answers go."""

    request: Request
    places: list[int]


def score_requests(
    requests: pa.Table, pasts: Mapping[str, Past], judge: Judge, score_batch: ScoreBatch
) -> tuple[pa.Table, Counter[str]]:
    """Score requests.

    Args:
        requests: as `Rules.schema`.
        pasts: histories by user.
        judge: the rules.
        score_batch: as `CtrModel.score_batch`.

    Returns:
        (as many rows in the same order, with scores; counts by `COUNTS`).

    Raises:
        InputError: a policy says fail; names file and row, or the items.
        RunError: a score is not finite.
    """
    lists = requests[CANDIDATES].combine_chunks()
    asked = _Asked(requests, pasts, judge)
    values = np.full(len(asked.items), np.nan, np.float32)
    for slates in _chunks(asked.slates()):
        found = score_batch([slate.request for slate in slates])
        for slate, scores in zip(slates, found, strict=True):
            if not np.isfinite(scores).all():
                raise RunError(Fault("scores", "are not finite", hint="the model is broken: look at its training"))
            values[slate.places] = scores
    is_null = np.isnan(values)
    asked.counts.update(pairs_scored=int((~is_null).sum()), pairs_null=int(is_null.sum()))
    return _output(requests, relisted(lists, pa.array(values, mask=is_null)), judge), asked.counts


class _Asked:
    """The requests of a unit, taken apart."""

    def __init__(self, requests: pa.Table, pasts: Mapping[str, Past], judge: Judge) -> None:
        self.requests, self.pasts, self.judge = requests, pasts, judge
        lists = requests[CANDIDATES].combine_chunks()
        self.items: list[str | None] = lists.flatten().to_pylist()
        self.ends = np.cumsum(pc.fill_null(pc.list_value_length(lists), 0).to_numpy())
        has_text = TEXT in requests.column_names
        self.texts = requests[TEXT].combine_chunks().flatten().to_pylist() if has_text else [None] * len(self.items)
        self.users: list[str | None] = requests[USER].to_pylist()
        self.times: list[int | None] = [None] * len(requests)
        if TIME in requests.column_names:
            self.times = [None if time is None else time // judge.per_second for time in requests[TIME].to_pylist()]
        self.is_known = np.array([item in judge.known for item in judge.item_ids], dtype=bool)
        self.counts: Counter[str] = Counter(dict.fromkeys(COUNTS, 0))

    def slates(self) -> Iterator[_Slate]:
        """Yield what the model is asked, in the order of the rows that ask first."""
        for rows in self._rows_together():
            history = self._history(rows[0])
            if not history:
                self._count_empty(rows)
                if self.judge.asked.no_history == "null":
                    continue
            items, places = self._candidates(rows)
            has_times = not history or len(history[0]) == 3
            if items:
                yield _Slate(Request(history, items, self.times[rows[0]] if has_times else None), places)

    def _rows_together(self) -> list[list[int]]:
        """Group rows of one user and moment; a row that brings its own history stays alone."""
        groups: dict[tuple[object, ...], list[int]] = {}
        brings = np.zeros(len(self.requests), dtype=bool)
        if HISTORY in self.requests.column_names:
            brings = pc.is_valid(self.requests[HISTORY]).to_numpy()
        for row, (user, time) in enumerate(zip(self.users, self.times, strict=True)):
            key = (row,) if brings[row] else (user, time)
            groups.setdefault(key, []).append(row)
        return list(groups.values())

    def _history(self, row: int) -> list[Interaction]:
        given = self.requests[HISTORY][row].as_py() if HISTORY in self.requests.column_names else None
        if given is not None:
            return self._given_history(given, self.times[row])
        past = self.pasts.get(self.users[row] or "")
        if past is None:
            return []
        last = past.before(self.times[row])
        known = self.is_known[last.items]
        if not known.all():
            self._leave_out([self._id(item) for item in last.items[~known].tolist()])
        last = last.only(np.flatnonzero(known)[-self.judge.size :])
        columns = (values.tolist() for values in (last.items, last.labels, last.times))
        return [(self._id(item), label, time) for item, label, time in zip(*columns, strict=True)]

    def _id(self, item: int) -> str:
        return self.judge.item_ids[item]

    def _given_history(self, given: Sequence[Mapping[str, object]], time: int | None) -> list[Interaction]:
        has_times = bool(given) and "time" in given[0]
        before = [one for one in given if not has_times or time is None or int(str(one["time"])) < time]
        unknown = [str(one["item_id"]) for one in before if one["item_id"] not in self.judge.known]
        if unknown:
            self._leave_out(unknown)
            before = [one for one in before if one["item_id"] in self.judge.known]
        names = ("item_id", "label", "time") if has_times else ("item_id", "label")
        return [tuple(one[name] for name in names) for one in before[-self.judge.size :]]  # type: ignore[misc]

    def _candidates(self, rows: Sequence[int]) -> tuple[list[Item], list[int]]:
        """Return what the model can read of the candidates, and where their scores go."""
        items: list[Item] = []
        places: list[int] = []
        for row in rows:
            for place in range(int(self.ends[row - 1]) if row else 0, int(self.ends[row])):
                item, text = self.items[place], self.texts[place]
                if item is not None and item in self.judge.known:
                    items.append(item)
                elif text is not None and text.strip():
                    items.append(Text(text))
                    self.counts["pairs_read_by_text"] += 1
                else:
                    self.counts["pairs_of_unknown_items"] += 1
                    continue
                places.append(place)
        return items, places

    def _count_empty(self, rows: Sequence[int]) -> None:
        """Count rows of a user without history, or stop there."""
        user = self.users[rows[0]]
        if self.judge.asked.no_history == "fail":
            where = f"{self.judge.log.name(self.requests[FILE][rows[0]].as_py())} row {self.requests[ROW][rows[0]]}"
            hint = "score.no_history=score reads an empty context, null gives null scores"
            raise InputError(Fault(where, f"user {user!r} has no history before the moment", hint=hint))
        self.counts["rows_without_history"] += len(rows)
        self.counts["rows_of_unknown_users"] += 0 if user in self.pasts else len(rows)

    def _leave_out(self, items: Sequence[str]) -> None:
        if self.judge.asked.unknown_in_history == "fail":
            named = ", ".join(map(repr, list(dict.fromkeys(items))[:NAMED]))
            hint = "score.unknown_in_history=skip leaves such interactions out"
            raise InputError(Fault("histories", f"have items that the model does not know, such as {named}", hint=hint))
        self.counts["interactions_left_out"] += len(items)


def _chunks(slates: Iterator[_Slate]) -> Iterator[list[_Slate]]:
    held: list[_Slate] = []
    pairs = 0
    for slate in slates:
        if held and pairs + len(slate.places) > CHUNK_PAIRS:
            yield held
            held, pairs = [], 0
        held.append(slate)
        pairs += len(slate.places)
    if held:
        yield held


def _output(requests: pa.Table, scores: pa.Array, judge: Judge) -> pa.Table:
    """Return the rows that are written: what was asked, the scores, where it stood, and what is to be kept."""
    log = judge.log
    columns: dict[str, pa.Array | pa.ChunkedArray] = {USER: requests[USER]}
    if TIME in log.columns:
        columns[TIME] = _seconds(requests, judge)
    if log.has_slates:
        columns |= {CANDIDATES: requests[CANDIDATES], "scores": scores}
    else:
        columns |= {"item_id": requests[CANDIDATES].combine_chunks().flatten(), "score": scores.flatten()}
    names = pa.array([log.name(file) for file in range(len(log.files))], pa.string())
    columns[FILE] = names.take(requests[FILE].combine_chunks())
    columns[ROW] = requests[ROW]
    kept = {name.removeprefix(KEEP): requests[name] for name in requests.column_names if name.startswith(KEEP)}
    return pa.table(columns | kept)


def _seconds(requests: pa.Table, judge: Judge) -> pa.Array:
    times = requests[TIME].combine_chunks()
    seconds = pc.fill_null(times, 0).to_numpy() // judge.per_second
    return pa.array(seconds, mask=pc.is_null(times).to_numpy(zero_copy_only=False))
