"""The model that answers, and the newer one that takes its place.

Stage: serving, in the process that holds the model. In: questions. Out: probabilities, or why there are none.
Invariant: a batch is answered by one state, and a state is whole before it answers: it is read, verified and tried
beside the one that still does, and then takes its place at once. What cannot be read changes nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dti_ray.errors import DamagedError, DtiRayError, Fault, InputError, StorageError
from dti_ray.infer.load import Origin, find_export, run_of
from dti_ray.infer.model import CtrModel, Request, Text
from dti_ray.serve.bodies import Question, Refused, Scored, Worded
from dti_ray.train.checkpoint import by_quality, list_checkpoints

AS_JSON = ("Text(...)", '{"text": ...}')  # what Python calls an item's text, and what a body does

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """Where a model lies.

    Attributes:
        uri: of a run or an export; see `CtrModel.load`.
        root: storage root of a run that is given by its name.
    """

    uri: str
    root: str | None = None

    @property
    def name(self) -> str:
        """Name of the run, or of the export's folder."""
        return self.uri.partition("?")[0].rstrip("/").rpartition("/")[2]

    def newest(self) -> str:
        """Return a name for what would be loaded now; anything else has another name.

        Raises:
            InputError: there is no such run or export, or it has no complete state.
            StorageError: storage cannot be reached.
        """
        exported = find_export(self.uri) if self.root is None else None
        if exported is not None:
            return exported[1].name
        storage, run = run_of(self.uri, self.root)
        states = by_quality(list_checkpoints(storage, f"runs/{run}"))
        if not states:
            problem = "is neither an export nor a run with a complete state"
            raise InputError(Fault(storage.display("runs", run), problem, hint="train it first: `dti-ray train`"))
        return Origin.of_state(states[0]).name

    def load(self, device: str | None) -> Loaded:
        """Load the best state that can be verified.

        Raises:
            InputError: there is none, or it gives numbers that are not finite.
            StorageError: a file is missing, or is not what was written.
        """
        newest = self.newest()
        return Loaded(newest, _tried(CtrModel.load(self.uri, device, self.root)))


@dataclass(frozen=True, eq=False)
class Loaded:
    """A model that answers.

    Attributes:
        newest: what was the newest before it was read.
        model: that was read: of the newest, a lesser one where that is damaged, or a newer one that came meanwhile.
    """

    newest: str
    model: CtrModel

    @property
    def state(self) -> str:
        """Name of what was read."""
        return self.model.origin.name


class Scorer:
    """Answers by the newest state that it has heard of.

    Args:
        source: where the model lies.
        device: None takes the GPU if there is one.

    Attributes:
        loaded: what answers; it is replaced, never changed.
    """

    def __init__(self, source: Source, device: str | None = None) -> None:
        self.source, self.device = source, device
        self.loaded = source.load(device)
        self.refused: str | None = None

    def score(self, questions: Sequence[Question]) -> list[Scored | Refused]:
        """Answer some questions, all by the same state."""
        loaded = self.loaded
        return _score(loaded, [_request(question) for question in questions])

    def refresh(self) -> bool | None:
        """Take the newest state.

        Returns:
            None: there was no newer one; False: there was, and it cannot be used, so the one before goes on.
        """
        state = None
        try:
            state = self.source.newest()
            if state in (self.loaded.newest, self.loaded.state, self.refused):
                return None
            loaded = self.source.load(self.device)
            if loaded.state == self.loaded.state:
                raise DamagedError(Fault(state, "is damaged", hint="nothing newer can be used"))
        except Exception as error:  # whatever reading raises, the state before goes on
            is_away = isinstance(error, StorageError) and not isinstance(error, DamagedError)
            self.refused = None if is_away else state  # a storage that is away is asked again
            is_known = isinstance(error, DtiRayError)
            log.warning("%s goes on: %s", self.loaded.state, error, exc_info=None if is_known else error)
            return False
        self.loaded, self.refused = loaded, None
        log.info("%s answers now", loaded.state)
        return True


def _score(loaded: Loaded, requests: Sequence[Request]) -> list[Scored | Refused]:
    """Score requests together; where one is refused, halves are tried, so that the others are not."""
    model = loaded.model
    try:
        if len(requests) == 1:  # whose faults are then told without its number
            found = [model.score(one.history, one.candidates, one.time) for one in requests]
        else:
            found = model.score_batch(requests)
    except InputError as error:
        if len(requests) == 1:
            return [Refused(tuple(str(fault).replace(*AS_JSON) for fault in error.faults))]
        middle = len(requests) // 2
        return [*_score(loaded, requests[:middle]), *_score(loaded, requests[middle:])]
    return [Scored(loaded.state, one.tolist()) for one in found]


def _request(question: Question) -> Request:
    history = [
        (_item(item), label) if time is None else (_item(item), label, time) for item, label, time in question.history
    ]
    return Request(history, [_item(item) for item in question.candidates], question.time)


def _item(item: str | Worded) -> str | Text:
    return Text(item.text) if isinstance(item, Worded) else item


def _tried(model: CtrModel) -> CtrModel:
    """Return a model that has answered once: its kernels are ready, and its numbers are numbers."""
    some = list(model.catalogue.numbers)[:2]
    with np.errstate(invalid="ignore"):  # which is what is looked for
        found = model.score([], some)
    if not np.isfinite(found).all():
        raise InputError(Fault(model.origin.name, "gives probabilities that are not finite", hint="take another state"))
    return model
