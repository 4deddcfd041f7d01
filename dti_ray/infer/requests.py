"""What a caller gives, checked and as tokens: interactions, candidates, the moment.

Stage: scoring. In: item ids and texts, labels, times. Out: `History`, the same for interactions and for candidates.
Invariant: whatever is wrong is told in one error that names every unknown item; nothing is skipped or guessed.

    [("i7", 1), (Text("Alien (1979)"), 0)]   without times: each is later than the one before
    [("i7", 1, 878542960), ...]              seconds; what shares one is of the same moment
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from numbers import Real

import numpy as np
from transformers import PreTrainedTokenizerBase

from dti_ray.config import PromptConfig
from dti_ray.data.interactions import UserSequences
from dti_ray.data.prompts import TokenTable
from dti_ray.errors import Fault, InputError

LATEST = 2**53  # seconds; beyond it whole numbers are no longer exact as floats


@dataclass(frozen=True)
class Text:
    """An item by its text, whether the catalogue has it or not."""

    text: str


Item = str | Text  # the id of an item of the catalogue, or a text
Interaction = tuple[Item, int] | tuple[Item, int, int]  # item, label 0 or 1, time in seconds


@dataclass(frozen=True, eq=False)
class History:
    """Some interactions of one user in order; of candidates, labels mean nothing.

    Attributes:
        tokens: int32, text after text.
        lengths: int64 [N], tokens of each text.
        labels: int8 [N], 0 or 1.
        times: int64 [N], seconds, never falling.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    labels: np.ndarray
    times: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, part: slice) -> History:
        start, stop, _ = part.indices(len(self))
        begin, size = int(self.lengths[:start].sum()), int(self.lengths[start:stop].sum())
        return History(self.tokens[begin : begin + size], self.lengths[part], self.labels[part], self.times[part])

    def __add__(self, later: History) -> History:
        pairs = ((getattr(self, name), getattr(later, name)) for name in ("tokens", "lengths", "labels", "times"))
        return History(*(np.concatenate(pair) for pair in pairs))

    @property
    def latest(self) -> int | None:
        """Time of the last interaction; None where there is none."""
        return int(self.times[-1]) if len(self) else None

    def sequences(self) -> UserSequences:
        """Return them as packing reads them; items are numbered as they come."""
        size = len(self)
        return UserSequences(
            user_ids=np.array([""]),
            offsets=np.array([0, size]),
            items=np.arange(size, dtype=np.int32),
            labels=self.labels,
            times=self.times,
            splits=np.zeros(size, dtype=np.int8),
        )


NOTHING = History(*(np.zeros(0, dtype=kind) for kind in (np.int32, np.int64, np.int8, np.int64)))


@dataclass(frozen=True)
class Catalogue:
    """The items that a model knows by their ids, and how it reads others.

    Attributes:
        numbers: item id → index in the table.
        table: item texts as tokens.
        tokenizer: of the model.
        prompt: how texts are cut, and whether they tell the time.
    """

    numbers: Mapping[str, int]
    table: TokenTable
    tokenizer: PreTrainedTokenizerBase
    prompt: PromptConfig

    def history(self, interactions: Sequence[Interaction], where: str, after: int | None = None) -> History:
        """Return interactions as tokens.

        Args:
            interactions: oldest first; times for all or for none.
            where: what they are called in an error.
            after: time of the interaction before the first one.

        Raises:
            InputError: with one fault per malformed interaction and one that names all unknown items; or times fall.
        """
        _check_list(interactions, where)
        found = [_faults(one, f"{where}[{i}]") for i, one in enumerate(interactions)]
        sound = [one[0] for one, faults in zip(interactions, found, strict=True) if not faults]
        if faults := [*chain(*found), *self._unknown(sound, where)]:
            raise InputError(*faults)
        times = self._times([one[2] if len(one) == 3 else None for one in interactions], where, after)
        tokens, lengths = self._texts(sound, where)
        return History(tokens, lengths, np.array([one[1] for one in interactions], dtype=np.int8), times)

    def candidates(self, items: Sequence[Item], time: int | None, after: int | None, where: str = "") -> History:
        """Return candidates as tokens, all of one moment.

        Args:
            items: ids and texts.
            time: of the moment (s); None: later than everything before.
            after: time of the interaction before it.
            where: what stands before `candidates` and `time` in an error.

        Raises:
            InputError: an item is unknown or malformed, or the time is missing or too early.
        """
        _check_list(items, f"{where}candidates")
        found = [_item_faults(item, f"{where}candidates[{i}]") for i, item in enumerate(items)]
        sound = [item for item, faults in zip(items, found, strict=True) if not faults]
        of_time = [] if time is None else _time_faults(time, f"{where}time")
        if faults := [*chain(*found), *self._unknown(sound, f"{where}candidates"), *of_time]:
            raise InputError(*faults)
        moment = self._moment(time, after, f"{where}time")
        tokens, lengths = self._texts(sound, f"{where}candidates")
        return History(tokens, lengths, np.zeros(len(items), dtype=np.int8), np.full(len(items), moment))

    def _moment(self, time: int | None, after: int | None, where: str) -> int:
        if time is not None:
            return int(self._times([time], where, after)[0])
        if self.table.tells_time and after is not None:
            problem = "is missing; this model reads how long ago things happened"
            raise InputError(Fault(where, problem, hint="give the time of the request in seconds"))
        return 0 if after is None else after + 1

    def _times(self, times: Sequence[int | None], where: str, after: int | None) -> np.ndarray:
        given = [time for time in times if time is not None]
        if not given and not self.table.tells_time:
            return np.arange(len(times), dtype=np.int64) + (0 if after is None else after + 1)
        if len(given) < len(times):
            expected = "a time in seconds for each" + ("" if self.table.tells_time else ", or for none")
            raise InputError(Fault(where, f"{len(times) - len(given)} of {len(times)} have no time", expected))
        seconds = np.array([math.floor(time) for time in given], dtype=np.int64)
        falls = np.flatnonzero(np.diff(seconds, prepend=seconds[:1] if after is None else after) < 0)
        if len(falls):
            before = after if falls[0] == 0 else int(seconds[falls[0] - 1])
            raise InputError(Fault(where, f"time {seconds[falls[0]]} comes after {before}", "oldest first"))
        return seconds

    def _unknown(self, items: Sequence[Item], where: str) -> list[Fault]:
        unknown = list(dict.fromkeys(item for item in items if isinstance(item, str) and item not in self.numbers))
        if not unknown:
            return []
        problem = "an unknown item: " if len(unknown) == 1 else f"{len(unknown)} unknown items: "
        expected = f"ids of the catalogue's {len(self.numbers):,} items, or Text(...)"
        return [Fault(where, problem + ", ".join(map(repr, unknown)), expected)]

    def _texts(self, items: Sequence[Item], where: str) -> tuple[np.ndarray, np.ndarray]:
        """Return (tokens, lengths) of ids and texts."""
        parts = [self._encoded(item, where) if isinstance(item, Text) else self._known(item) for item in items]
        lengths = np.array([len(part) for part in parts], dtype=np.int64)
        return np.concatenate([np.zeros(0, dtype=np.int32), *parts]), lengths

    def _known(self, item: str) -> np.ndarray:
        number = self.numbers[item]
        return self.table.tokens[self.table.offsets[number] : self.table.offsets[number + 1]]

    def _encoded(self, item: Text, where: str) -> np.ndarray:
        ids = self.tokenizer(item.text, add_special_tokens=False, verbose=False)["input_ids"]
        if not ids:
            raise InputError(Fault(where, f"the text {item.text!r} has no token", "at least one token an item"))
        return np.array(ids[: self.prompt.max_item_tokens], dtype=np.int32)


def _check_list(values: object, where: str) -> None:
    if isinstance(values, str) or not isinstance(values, Sequence | np.ndarray):
        raise InputError(Fault(where, f"got {values!r}", "a list"))


def _faults(interaction: object, where: str) -> list[Fault]:
    if not isinstance(interaction, Sequence) or isinstance(interaction, str) or len(interaction) not in (2, 3):
        return [Fault(where, f"got {interaction!r}", "(item, label) or (item, label, time)")]
    faults = _item_faults(interaction[0], where)
    label = interaction[1]
    if not isinstance(label, Real | np.bool_) or label not in (0, 1):
        faults.append(Fault(where, f"label {label!r}", "0 or 1"))
    return faults + (_time_faults(interaction[2], where) if len(interaction) == 3 else [])


def _time_faults(time: object, where: str) -> list[Fault]:
    is_time = isinstance(time, int | float | np.integer | np.floating) and -LATEST <= time <= LATEST
    return [] if is_time else [Fault(where, f"time {time!r}", "seconds")]


def _item_faults(item: object, where: str) -> list[Fault]:
    if isinstance(item, str) or (isinstance(item, Text) and isinstance(item.text, str)):
        return []
    return [Fault(where, f"item {item!r}", "the id of an item as text, or Text(...)")]
