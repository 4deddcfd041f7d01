"""What trained models and classics say of each target, stored so that it is asked once.

Stage: study, between training and results. In: a run with its best state; a split; a context. Out: `Answer`s, below
`<root>/sweeps/<study>/answers/<run>/<split>-n<context>/`: `predictions.parquet` and, written last, `manifest.json`.
Invariant: what is stored and sound is never computed again, so that the test split is asked once; what is damaged
counts as not there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from pyarrow import parquet as pq
from scipy.special import expit

from dti_ray.config import with_values
from dti_ray.data.prompts import TokenTable
from dti_ray.errors import DamagedError
from dti_ray.infer.evaluate import Scorer, plan_evaluation
from dti_ray.infer.units import TargetScores, collect
from dti_ray.metrics import Predictions
from dti_ray.storage import FileEntry, Storage
from dti_ray.study.plan import PlannedRun
from dti_ray.study.results import Answer, Classic

PREDICTIONS = "predictions.parquet"
OnProgress = Callable[[int, int], None]

log = logging.getLogger(__name__)


def answers_folder(study: str, run: str) -> str:
    """Return where the answers of a run lie."""
    return f"sweeps/{study}/answers/{run}"


def asked(run: PlannedRun) -> list[tuple[str, int]]:
    """Return (split, context) of each evaluation of a run."""
    return [(split, n) for split in run.splits for n in run.contexts]


def find_answers(storage: Storage, study: str, run: PlannedRun) -> tuple[Answer, ...] | None:
    """Return all that a run was asked, or None where some of it is not there."""
    found = [read_answers(storage, study, run, split, n) for split, n in asked(run)]
    return None if any(one is None for one in found) else tuple(answer for one in found for answer in one or ())


def read_answers(storage: Storage, study: str, run: PlannedRun, split: str, n: int) -> tuple[Answer, ...] | None:
    """Return the answers of one evaluation, one for each protocol, or None where they are missing or damaged."""
    folder = _folder(study, run, split, n)
    stored = _read(storage, folder)
    if stored is None:
        return None
    body, tables = stored
    (table,) = tables.values()
    parts = {one["protocol"]: one for one in body["answers"]}
    if not set(run.config.protocols) <= parts.keys():
        return None
    return tuple(
        Answer(split, protocol, n, _predictions(table, protocol), one["seconds"], one["tokens"])
        for protocol, one in parts.items()
        if protocol in run.config.protocols
    )


def compute_answers(
    storage: Storage,
    study: str,
    run: PlannedRun,
    split: str,
    n: int,
    table: TokenTable,
    device: torch.device,
    on_progress: OnProgress,
) -> tuple[Answer, ...]:
    """Score one split with a run's best state under each protocol, and store what comes of it.

    Args:
        storage: the root.
        study: its name.
        run: it has a state.
        split: valid or test.
        n: context (interactions).
        table: item texts as tokens.
        device: where to score.
        on_progress: called with (targets scored, targets in all).

    Raises:
        ConfigError: `eval.row_tokens` is too small for one prompt.
        InputError: the run has no usable state, or the data set has no targets of that split.
        IncompleteError: rows scored are not rows asked for.
    """
    config = with_values(run.config, {"eval.n": n})
    plan = plan_evaluation(config, storage, table, split)
    scorer = Scorer.load(plan, table, device)
    found = ((unit.number, scorer.score(unit)) for unit in plan.units)
    scores = collect(plan.units, found, config.packing.min_context, on_progress)
    answers = _answers(scores, config.protocols, split, n)
    columns = {"position": pa.array(scores.position, pa.int32())}
    content = _table(answers[0].predictions, columns, {one.protocol: one.predictions for one in answers})
    body = {
        "run": run.name,
        "checkpoint": plan.checkpoint.path,
        "split": split,
        "n": n,
        "answers": [{"protocol": one.protocol, "seconds": one.seconds, "tokens": one.tokens} for one in answers],
    }
    _write(storage, _folder(study, run, split, n), {PREDICTIONS: content}, body)
    return answers


def store_classics(storage: Storage, study: str, classics: Sequence[Classic]) -> None:
    """Store the baselines of a study, all at once."""
    tables: dict[str, pa.Table] = {}
    for number, one in enumerate(classics):
        for split, predictions in one.answers.items():
            tables[f"{number}-{split}.parquet"] = _table(predictions, {}, {"probability": predictions})
    facts = [{"name": one.name, "seconds": one.seconds, "chosen": one.chosen} for one in classics]
    _write(storage, _classics_folder(study), tables, {"classics": facts})


def read_classics(storage: Storage, study: str, splits: Iterable[str]) -> tuple[Classic, ...] | None:
    """Return the stored baselines, or None where they are missing, damaged, or were not asked one of these splits."""
    stored = _read(storage, _classics_folder(study))
    if stored is None:
        return None
    body, tables = stored
    found = []
    for number, one in enumerate(body["classics"]):
        answers = {
            name.removeprefix(f"{number}-").removesuffix(".parquet"): _predictions(table, "probability")
            for name, table in tables.items()
            if name.startswith(f"{number}-")
        }
        if not set(splits) <= answers.keys():
            return None
        found.append(Classic(one["name"], answers, one["seconds"], one["chosen"]))
    return tuple(found)


def _folder(study: str, run: PlannedRun, split: str, n: int) -> str:
    return f"{answers_folder(study, run.name)}/{split}-n{n}"


def _classics_folder(study: str) -> str:
    return f"sweeps/{study}/classics"


def _answers(scores: TargetScores, protocols: Sequence[str], split: str, n: int) -> tuple[Answer, ...]:
    costs = zip(protocols, scores.log_odds, scores.seconds.tolist(), scores.tokens.tolist(), strict=True)
    return tuple(
        Answer(split, protocol, n, Predictions(scores.user, scores.label, expit(log_odds)), seconds, tokens)
        for protocol, log_odds, seconds, tokens in costs
    )


def _table(targets: Predictions, columns: dict[str, pa.Array], by_name: dict[str, Predictions]) -> pa.Table:
    return pa.table(
        {
            "user": pa.array(targets.user, pa.int64()),
            **columns,
            "label": pa.array(targets.label, pa.int8()),
            **{name: pa.array(one.probability, pa.float64()) for name, one in by_name.items()},
        }
    )


def _predictions(table: pa.Table, column: str) -> Predictions:
    user, label, probability = (np.asarray(table[name]) for name in ("user", "label", column))
    return Predictions(user, label, probability)


def _write(storage: Storage, folder: str, tables: dict[str, pa.Table], body: dict[str, object]) -> None:
    entries: list[FileEntry] = []
    for name, table in tables.items():
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)
        written = storage.write(f"{folder}/{name}", sink.getvalue().to_pybytes())
        entries.append(FileEntry(name, written.size_bytes, written.sha256))
    storage.write_manifest(folder, entries, body)


def _read(storage: Storage, folder: str) -> tuple[dict[str, Any], dict[str, pa.Table]] | None:
    """Return (facts, tables by file) of a complete and sound folder."""
    try:
        manifest = storage.read_manifest(folder)
        if manifest is None:
            return None
        files, body = manifest
        storage.verify(folder, files)
    except DamagedError as error:
        log.warning("%s counts as not there: %s", storage.display(folder), error)
        return None
    return body, {file.path: pq.read_table(pa.BufferReader(storage.read(f"{folder}/{file.path}"))) for file in files}
