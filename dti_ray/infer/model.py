"""The library's face: a trained model that says how likely clicks are.

Stage: scoring. In: what users did, and what they might be shown. Out: probabilities. Needs neither Ray nor DeepSpeed.

    from dti_ray import CtrModel

    model = CtrModel.load("outputs/runs/demo")
    model.score([("242", 1), ("302", 0)], ["51", "346"])      # array([0.61, 0.34])
    user = model.remember([("242", 1), ("302", 0)])           # read once
    user = model.append(user, [("51", 1)])                    # reads three tokens
    model.score(user, ["346"])
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
import torch

from dti_ray.errors import ConfigError, Fault, InputError
from dti_ray.infer.cache import Protocol, User, append, remember, score_stream, score_user
from dti_ray.infer.calibration import IDENTITY, Calibration
from dti_ray.infer.load import Origin, load_trained
from dti_ray.infer.requests import NOTHING, Catalogue, Interaction, Item, Text
from dti_ray.infer.slate import Reader, Slate, score_slates
from dti_ray.train.engine import as_trained
from dti_ray.train.host import training_device

__all__ = ["CtrModel", "Request", "Text"]


@dataclass(frozen=True)
class Request:
    """One question: how likely are these clicks, after this?

    Attributes:
        history: (item, label) or (item, label, time), oldest first; or what `remember` returned.
        candidates: ids of the catalogue, or `Text`s.
        time: of the moment, in seconds; None: later than the history.
    """

    history: Sequence[Interaction] | User
    candidates: Sequence[Item]
    time: int | None = None


class CtrModel:
    """A trained click model; scoring changes nothing in it, so threads may share it.

    Args:
        reader: the model on its device.
        catalogue: its items.
        origin: what it was read from.
        calibration: what turns its log-odds into probabilities.
    """

    def __init__(
        self, reader: Reader, catalogue: Catalogue, origin: Origin, calibration: Calibration = IDENTITY
    ) -> None:
        self.reader, self.catalogue, self.origin, self.calibration = reader, catalogue, origin, calibration

    @classmethod
    def load(cls, uri: str, device: str | None = None, root: str | None = None, calibrated: bool = True) -> CtrModel:
        """Load a run's best state, or an export; it computes in the precision that it was trained in.

        Args:
            uri: `<root>/runs/<name>`, the name of a run, or a folder that `dti-ray export` wrote; local or in a bucket.
            device: such as cpu or cuda:0; None takes the GPU if there is one.
            root: storage root of a run that is given by its name; None: `outputs`.
            calibrated: apply the temperature and bias that are stored with an export; a run has none.

        Raises:
            InputError: there is no such run or export, or it has no usable state.
            StorageError: a file is missing, or is not what was written.
            ConfigError: there is no such device.
        """
        place = _device(device)
        trained = load_trained(uri, root)
        as_trained(trained.model, trained.config)  # DeepSpeed trains weights in bf16; they are brought there in place
        reader = Reader(trained.model, trained.config, trained.catalogue.table, place)
        calibration = trained.calibration if calibrated else IDENTITY
        return cls(reader, trained.catalogue, trained.origin, calibration)

    def score(
        self, history: Sequence[Interaction] | User, candidates: Sequence[Item], time: int | None = None
    ) -> np.ndarray:
        """Return each candidate's probability of a click, float64 [C]; see `Request`.

        Of a history, the last n interactions count (`eval.n`), as in sliding inference; of a `User`, what the protocol
        says that it was remembered under.

        Raises:
            InputError: an item is unknown, or something is malformed.
        """
        request = Request(history, candidates, time)
        return self._score([request], [self._slate(request, "")])[0]

    def score_batch(self, requests: Sequence[Request]) -> list[np.ndarray]:
        """Score many requests, as many in a pass as fit; each gets what `score` returns.

        Raises:
            InputError: in any request an item is unknown, or something is malformed; all of it is told at once.
        """
        slates: list[Slate] = []
        faults: list[Fault] = []
        for number, request in enumerate(requests):
            try:
                slates.append(self._slate(request, f"requests[{number}]."))
            except InputError as error:
                faults += error.faults
        if faults:
            raise InputError(*faults)
        return self._score(requests, slates)

    def score_stream(self, interactions: Sequence[Interaction]) -> np.ndarray:
        """Return the probability of each of a user's interactions under streaming inference, float64 [N].

        Each is predicted from those before it, in the layout of training; each is read once.

        Raises:
            InputError: an item is unknown, or something is malformed.
        """
        log_odds = score_stream(self.reader, self.catalogue.history(interactions, "interactions"))
        return self.calibration.probabilities(log_odds)

    def remember(self, history: Sequence[Interaction], protocol: Protocol = "streaming") -> User:
        """Read a user's history once, for many requests.

        Args:
            history: as in `score`; may be empty.
            protocol: streaming: appending reads only what is new, and scores are those of `score_stream`; sliding:
                scores are those of `score` with the whole history, and a full window is read anew at every append.

        Raises:
            InputError: an item is unknown, or something is malformed.
        """
        if protocol not in get_args(Protocol):
            raise InputError(Fault("protocol", f"got {protocol!r}", " or ".join(get_args(Protocol))))
        return remember(self.reader, self.catalogue.history(history, "history"), protocol)

    def append(self, user: User, interactions: Sequence[Interaction]) -> User:
        """Return the user after some more interactions; the one that is given stays as it is.

        Raises:
            InputError: an item is unknown, or something is malformed.
        """
        return append(self.reader, user, self.catalogue.history(interactions, "interactions", user.history.latest))

    def _slate(self, request: Request, where: str) -> Slate:
        """Return what is asked, as tokens; what is wrong in the history and in the candidates is told at once."""
        given, faults = request.history, ()
        try:
            history = given.history if isinstance(given, User) else self.catalogue.history(given, f"{where}history")
        except InputError as error:
            history, faults = NOTHING, error.faults
        try:
            candidates = self.catalogue.candidates(request.candidates, request.time, history.latest, where)
        except InputError as error:
            raise InputError(*faults, *error.faults) from None
        if faults:
            raise InputError(*faults)
        return Slate(history, candidates)

    def _score(self, requests: Sequence[Request], slates: Sequence[Slate]) -> list[np.ndarray]:
        users = {i: one.history for i, one in enumerate(requests) if isinstance(one.history, User)}
        found = {i: score_user(self.reader, user, slates[i].candidates) for i, user in users.items()}
        others = [i for i in range(len(slates)) if i not in users]
        found |= zip(others, score_slates(self.reader, [slates[i] for i in others]), strict=True)
        return [self.calibration.probabilities(found[i]) for i in range(len(slates))]


def _device(name: str | None) -> torch.device:
    if name is None:
        return training_device()
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):  # torch built for CPUs asserts that it is not
        raise ConfigError(Fault("device", f"got {name!r}", "cpu, or a GPU of this machine such as cuda:0")) from None
    return device
