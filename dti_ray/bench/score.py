"""Scoring speed: a slate against a prompt per candidate, an appended interaction against a fresh prompt.

Stage: bench. In: a configuration, the number of candidates, the length of item texts. Out: seconds and ratios.
Invariant: both sides start from the same interactions as tokens and end with log-odds, packing and layout included.
Model and texts are random: speed depends on shapes alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from dti_ray.bench.timing import interleave
from dti_ray.config import RunConfig
from dti_ray.data.interactions import TEST, TRAIN, UserSequences
from dti_ray.data.packing import check_capacity, pack
from dti_ray.data.prompts import TokenTable
from dti_ray.infer.cache import append, remember
from dti_ray.infer.evaluate import Forward, score_rows
from dti_ray.infer.requests import History
from dti_ray.infer.slate import Reader, Slate, score_slates
from dti_ray.model.backbone import build_model
from dti_ray.train.engine import as_trained

WORDS = 1000  # of the random texts
SHORT = 10  # repetitions of what takes milliseconds, for each of what takes seconds

Cases = dict[str, list[Callable[[], object]]]


@dataclass(frozen=True)
class ScoreBench:
    """Medians.

    Attributes:
        seconds: of C prompts, a slate of C, one prompt, and one append.
        slate_speedup: C prompts over the slate.
        append_speedup: one prompt over the append.
    """

    seconds: dict[str, float]
    slate_speedup: float
    append_speedup: float


def bench_score(config: RunConfig, candidates: int, item_tokens: int, repeats: int, device: torch.device) -> ScoreBench:
    """Time scoring in turns.

    Args:
        config: of a model from scratch; `eval.n`, or else `packing.n`, is the length of the history.
        candidates: C.
        item_tokens: of every text.
        repeats: of the slow cases; the fast ones get ten times as many.
        device: where to run.

    Raises:
        ConfigError: a row cannot hold one prompt.
    """
    nothing = np.zeros(0, dtype=np.int32)
    table = TokenTable(nothing, np.zeros(1, dtype=np.int64), nothing, WORDS, (None, 0, 1))
    model = build_model(config, table)
    forward = as_trained(model, config)
    reader = Reader(model, config, table, device)
    texts = _texts(reader.n + candidates + 1, item_tokens, config.train.seed)
    history, arrival = texts[: reader.n], texts[reader.n : reader.n + 1]
    asked = texts[reader.n + 1 :]
    slate = Slate(history, replace(asked, times=np.full(candidates, reader.n)))
    user = remember(reader, history, "streaming")
    first = replace(slate, candidates=slate.candidates[:1])
    slow: Cases = {"prompts": [_prompts(reader, forward, slate)], "slate": [lambda: score_slates(reader, [slate])]}
    fast: Cases = {"prompt": [_prompts(reader, forward, first)], "append": [lambda: append(reader, user, arrival)]}
    timings = interleave(slow, repeats, device) | interleave(fast, repeats * SHORT, device)
    seconds = {name: timing.seconds for name, timing in timings.items()}
    return ScoreBench(
        seconds, seconds["prompts"] / seconds["slate"], seconds["prompt"] / seconds["append"]
    )  # fmt: skip


def _prompts(reader: Reader, forward: Forward, slate: Slate) -> Callable[[], object]:
    """Return what scores each candidate in a stand-alone prompt of its own, as an evaluation does."""
    users, size = len(slate.candidates), len(slate.history) + 1
    wholes = [slate.history + slate.candidates[i : i + 1] for i in range(users)]
    names = ("tokens", "labels", "times")
    tokens, labels, times = (np.concatenate([getattr(one, name) for one in wholes]) for name in names)
    offsets = np.arange(0, users * size + 1, size)
    splits = np.where(np.arange(users * size) % size == size - 1, TEST, TRAIN).astype(np.int8)
    items = np.arange(users * size, dtype=np.int32)
    sequences = UserSequences(np.arange(users).astype(str), offsets, items, labels, times, splits)
    table = replace(reader.table, tokens=tokens, offsets=np.arange(0, len(tokens) + 1, len(tokens) // len(items)))
    spec = replace(reader.spec.sliding(), row_tokens=reader.pass_tokens)
    check_capacity(spec, table, where="eval.row_tokens")
    rows_per_pass = reader.config.train.rows_per_pass
    return lambda: score_rows(forward, pack(sequences, table, spec), table, reader.device, rows_per_pass)


def _texts(size: int, item_tokens: int, seed: int) -> History:
    rng = np.random.default_rng(seed)
    return History(
        tokens=rng.integers(0, WORDS, size * item_tokens).astype(np.int32),
        lengths=np.full(size, item_tokens),
        labels=rng.integers(0, 2, size).astype(np.int8),
        times=np.arange(size),
    )
