"""What tests of serving share: runs with several states, a model without Ray, wrong requests, free ports."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Mapping
from pathlib import Path

import torch

from dti_ray.config import RunConfig, ServeConfig, config_hash
from dti_ray.data.interactions import open_dataset
from dti_ray.model.backbone import build_model
from dti_ray.serve.batches import Batches
from dti_ray.serve.bodies import Question, Refused
from dti_ray.serve.bounds import RefusalError
from dti_ray.serve.scorer import Scorer
from dti_ray.serve.web import build_web
from dti_ray.storage import Storage
from dti_ray.telemetry.serving import ServingSeries
from dti_ray.train.checkpoint import TrainState, complete, folder_of, write_share
from dti_ray.train.engine import TorchEngine
from dti_ray.train.state import Progress
from dti_ray.train.tokens import tokenizer_and_table
from tests.builders import LARGE_STD

HISTORY = [{"item": "03", "label": 1}, {"item": {"text": "film 9"}, "label": 0}, {"item": "21", "label": 1}]
CANDIDATES = ["01", "02", {"text": "word05 of film 5"}, "05"]
BODY = {"history": HISTORY, "candidates": CANDIDATES}
LIMITS = ServeConfig(max_candidates=1000, max_text=200, max_history=50)
# Name of a wrong request -> (its body, what an answer must say).
WRONG_BODIES: dict[str, tuple[bytes, str]] = {
    "no history": (json.dumps({**BODY, "history": []}).encode(), "history: has 0 entries; expected at least 1"),
    "no candidates": (json.dumps({**BODY, "candidates": []}).encode(), "candidates: has 0 entries; expected at least"),
    "10,000 candidates": (
        json.dumps({**BODY, "candidates": ["01"] * 10_000}).encode(), "candidates: has 10,000 entries; expected at most"
    ),
    "an item that is a number": (json.dumps({**BODY, "candidates": [1]}).encode(), "candidates[0]: got 1; expected an"),
    "a label as text": (
        json.dumps({**BODY, "history": [{"item": "03", "label": "1"}]}).encode(), "label: got '1'; expected 0 or 1"
    ),
    "a label that is a truth value": (
        json.dumps({**BODY, "history": [{"item": "03", "label": True}]}).encode(), "label: got True; expected 0 or 1"
    ),
    "NaN": (b'{"history": [{"item": "03", "label": NaN}], "candidates": ["01"]}', "label: got nan; expected 0 or 1"),
    "a time without end": (b'{"history": [{"item": "03", "label": 1}], "candidates": ["01"], "time": 1e999}', "time:"),
    "a huge time": (json.dumps({**BODY, "time": 10**30}).encode(), "time: got 1000"),
    "a huge text": (
        json.dumps({**BODY, "candidates": [{"text": "x" * 201}]}).encode(), "candidates[0].text: has 201 characters"
    ),
    "an empty text": (json.dumps({**BODY, "candidates": [{"text": ""}]}).encode(), "expected at least 1"),
    "unknown ids": (json.dumps({**BODY, "candidates": ["nope", "01"]}).encode(), "unknown item: 'nope'; expected ids"),
    "time goes back": (
        json.dumps(
            {**BODY, "history": [{"item": "03", "label": 1, "time": 5}, {"item": "03", "label": 1, "time": 4}]}
        ).encode(),
        "time 4 comes after 5; expected oldest first",
    ),
    "a time for some": (
        json.dumps({**BODY, "history": [{"item": "03", "label": 1, "time": 5}, {"item": "03", "label": 1}]}).encode(),
        "1 of 2 have no time; expected",
    ),
    "an unknown key": (json.dumps({**BODY, "histroy": []}).encode(), "histroy: is no known key; expected history"),
    "a missing key": (json.dumps({"history": HISTORY}).encode(), "candidates: is missing"),
    "a list": (b"[]", "body: got []; expected an object"),
    "null": (b"null", "body: got None; expected an object"),
    "no body": (b"", "body: is not JSON"),
    "half a body": (b'{"history": [', "body: is not JSON"),
    "deep nesting": (b"[" * 50_000, "body: is not JSON (recursion limit"),
    "no UTF-8": (b'{"history": "\xff\xfe"}', "body: is not JSON"),
    "half a character": (b'{"history": [], "candidates": ["\\ud800"]}', "body: is not JSON"),
    "a number of 5,000 digits": (b'{"time": ' + b"1" * 5000 + b"}", "body: is not JSON (number out of range"),
    "too many bytes": (b" " * (2**20 + 1), "body: has 1,048,577 bytes; expected at most 1,048,576"),
}  # fmt: skip


def write_state(config: RunConfig, step: int, seed: int) -> str:
    """Write one more state of a run, which is the best one if its step is the last; return its name."""
    storage = Storage(config.storage.root)
    _, table = tokenizer_and_table(config, storage, open_dataset(storage, config.data.name))
    model = build_model(config, table)
    generator = torch.Generator().manual_seed(seed)
    for weight in model.trained().values():
        if weight.ndim >= 2:
            torch.nn.init.normal_(weight, std=LARGE_STD, generator=generator)
    path = folder_of(f"runs/{config.train.run}", step, "test")
    files = write_share(storage, path, 0, TorchEngine(model, config, torch.device("cpu")).state())
    complete(storage, path, files, TrainState(Progress(step=step), (), config_hash(config)))
    return path.rpartition("/")[2]


def damage_state(config: RunConfig, state: str) -> None:
    """Change a byte of a state's weights."""
    (file,) = (Path(config.storage.root) / "runs" / config.train.run / "checkpoints" / state).glob("weights-*")
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


class Here:
    """A model in this process, behind the same batches as on Ray."""

    def __init__(self, scorer: Scorer, most: int = 8) -> None:
        self.scorer, self.batches = scorer, Batches(scorer.score, most)

    async def score(self, question: Question) -> tuple[str, list[float]]:
        found = await self.batches.ask(question)
        if isinstance(found, Refused):
            raise RefusalError(422, *found.lines)
        return found.state, found.probabilities

    async def state(self) -> str:
        return self.scorer.loaded.state


class Slow(Here):
    """One that takes its time."""

    async def score(self, question: Question) -> tuple[str, list[float]]:
        await asyncio.sleep(5)
        return await super().score(question)


class Kept:
    """Keeps what a counter, gauge or histogram is told."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.values: list[tuple[float, Mapping[str, str]]] = []

    def inc(self, value: float, tags: dict[str, str]) -> None:
        self.values.append((value, tags))

    set = observe = inc


def kept_series() -> ServingSeries:
    """Return series that are exported nowhere."""
    return ServingSeries(
        lambda name, _text, _keys: Kept(name), lambda name, _text, _keys: Kept(name),
        lambda name, _text, _bounds, _keys: Kept(name), "run",
    )  # fmt: skip


def make_web(
    model: Here, limits: ServeConfig = LIMITS, token: bytes | None = None, series: ServingSeries | None = None
):
    return build_web(limits, model, token, series or kept_series())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
