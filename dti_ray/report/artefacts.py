"""Read what a run has left behind.

Stage: report, first step. In: JSON, JSON Lines, Parquet and YAML files below `runs/<run>/`. Out: `Artefacts`.
Invariant: a file that is absent is None, a file that is present but unreadable is an `InputError` that names
it; a number that is null in a file is NaN here, and nothing is made up.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float, Int

from dti_ray.errors import Fault, InputError
from dti_ray.metrics import COUNTS, Estimate, Metrics
from dti_ray.storage import Storage

SPLITS = ("test", "valid", "train")  # in the order in which the page prefers them

Built = TypeVar("Built")


@dataclass(frozen=True)
class Cost:
    """What scoring a split cost: tokens read, and seconds summed over all workers."""

    tokens: int
    seconds: float


@dataclass(frozen=True)
class OtherProtocol:
    """The same targets under a second protocol.

    Attributes:
        difference: to the first protocol, by metric, paired.
    """

    protocol: str
    model: Metrics
    cost: Cost
    difference: Mapping[str, Estimate]


@dataclass(frozen=True)
class Evaluation:
    """One split, scored by the model and by baselines that need no model.

    Attributes:
        protocol: how prompts were laid out at inference (`sliding` or `streaming`).
        n: interactions of context.
        cost: None where an earlier version did not write it.
        other: None where one protocol was asked for.
    """

    protocol: str
    split: str
    checkpoint: str
    n: int
    model: Metrics
    baselines: Mapping[str, Metrics]
    cost: Cost | None
    other: OtherProtocol | None


@dataclass(frozen=True)
class TrainLog:
    """Columns of `metrics/train.jsonl`, one value a line, ordered by step."""

    targets: Float[np.ndarray, " lines"]
    tokens: Float[np.ndarray, " lines"]
    loss: Float[np.ndarray, " lines"]
    targets_per_s: Float[np.ndarray, " lines"]
    tokens_per_s: Float[np.ndarray, " lines"]
    padding: Float[np.ndarray, " lines"]
    data_wait: Float[np.ndarray, " lines"]
    seconds: Float[np.ndarray, " lines"]


@dataclass(frozen=True)
class ValidLog:
    """Columns of `metrics/valid.jsonl`, one value a line, ordered by step."""

    targets: Float[np.ndarray, " lines"]
    auc: Float[np.ndarray, " lines"]
    log_loss: Float[np.ndarray, " lines"]


@dataclass(frozen=True)
class Predictions:
    """Probability and label of each target of one split."""

    split: str
    label: Int[np.ndarray, " targets"]
    probability: Float[np.ndarray, " targets"]


@dataclass(frozen=True)
class Meta:
    """What the run ran on."""

    config_hash: str
    versions: Mapping[str, str]
    git_commit: str | None
    cpus: int
    cpu: str
    gpus: tuple[str, ...]
    started_at: str


@dataclass(frozen=True)
class Artefacts:
    """All that a run has left behind; None or empty where it has not."""

    run: str
    config: str | None
    meta: Meta | None
    train: TrainLog | None
    valid: ValidLog | None
    evaluations: tuple[Evaluation, ...]
    predictions: Predictions | None


def read_artefacts(storage: Storage, run: str) -> Artefacts:
    """Read everything that the page shows.

    Raises:
        InputError: there is no such run, or one of its files cannot be understood.
    """
    folder = f"runs/{run}"
    known = [path.rpartition("/")[2] for path in storage.list("runs")]
    if run not in known or not storage.list(folder):
        names = ", ".join(known) or "none yet"
        raise InputError(Fault(storage.display("runs", run), "no such run", hint=f"runs that exist: {names}"))
    splits = _evaluated_splits(storage, folder)
    read = [_read(storage, f"{folder}/metrics/evaluation_{split}.json", _evaluation) for split in splits]
    scored = [split for split in splits if storage.exists(_predictions_path(folder, split))]
    return Artefacts(
        run=run,
        config=_read(storage, f"{folder}/config.yaml", lambda content: content.decode()),
        meta=_read(storage, f"{folder}/meta.json", _meta),
        train=_read(storage, f"{folder}/metrics/train.jsonl", lambda content: _log(content, TrainLog)),
        valid=_read(storage, f"{folder}/metrics/valid.jsonl", lambda content: _log(content, ValidLog)),
        evaluations=tuple(evaluation for evaluation in read if evaluation is not None),
        predictions=_read_predictions(storage, folder, scored[0]) if scored else None,
    )


def _evaluated_splits(storage: Storage, folder: str) -> list[str]:
    """Return the splits that have an evaluation or predictions, the preferred one first."""
    names = [path.rpartition("/")[2].partition(".")[0] for path in storage.list(f"{folder}/metrics")]
    kinds = [name.partition("_") for name in names]
    found = {split for kind, _, split in kinds if split and kind in ("evaluation", "predictions")}
    return sorted(found, key=lambda split: (SPLITS.index(split) if split in SPLITS else len(SPLITS), split))


def _read(storage: Storage, path: str, build: Callable[[bytes], Built]) -> Built | None:
    if not storage.exists(path):
        return None
    content = storage.read(path)
    try:
        return build(content)
    except (KeyError, TypeError, ValueError, AttributeError, InputError) as error:
        raise InputError(
            Fault(
                storage.display(path),
                f"cannot be understood ({type(error).__name__}: {error})",
                "the format that this version writes",
                "write it again, or make the report with the version that wrote it",
            )
        ) from error


def _predictions_path(folder: str, split: str) -> str:
    return f"{folder}/metrics/predictions_{split}.parquet"


def _read_predictions(storage: Storage, folder: str, split: str) -> Predictions | None:
    def build(content: bytes) -> Predictions | None:
        table = pq.read_table(pa.BufferReader(content), columns=["label", "probability"])
        if not table.num_rows:
            return None
        label, probability = table["label"].to_numpy(), table["probability"].to_numpy()
        if not np.isin(label, (0, 1)).all() or not ((probability >= 0) & (probability <= 1)).all():
            raise ValueError("labels must be 0 or 1, probabilities between 0 and 1")
        return Predictions(split, label, probability)

    return _read(storage, _predictions_path(folder, split), build)


def _evaluation(content: bytes) -> Evaluation:
    tree = json.loads(content)
    return Evaluation(
        protocol=tree["protocol"],
        split=tree["split"],
        checkpoint=tree["checkpoint"],
        n=int(tree["n"]),
        model=_metrics(tree["metrics"]),
        baselines={name: _metrics(scores) for name, scores in tree["baselines"].items()},
        cost=_cost(tree) if "tokens" in tree else None,
        other=_other(tree["other"]) if tree.get("other") is not None else None,
    )


def _other(tree: Mapping[str, Any]) -> OtherProtocol:
    difference = {name: Estimate(**{end: _number(value) for end, value in estimate.items()})
                  for name, estimate in tree["difference"].items()}  # fmt: skip
    return OtherProtocol(tree["protocol"], _metrics(tree["metrics"]), _cost(tree), difference)


def _cost(tree: Mapping[str, Any]) -> Cost:
    return Cost(int(tree["tokens"]), _number(tree["seconds"]))


def _metrics(tree: Mapping[str, object]) -> Metrics:
    """Read metrics; one that comes as a plain number has no interval."""
    return Metrics.from_json(
        {
            name: value if isinstance(value, Mapping) or name in COUNTS else {"value": value, "low": None, "high": None}
            for name, value in tree.items()
        }
    )


def _number(value: object) -> float:
    if value is None:
        return float("nan")
    if not isinstance(value, int | float):
        raise TypeError(f"{value!r} is no number")
    return float(value)


def _log(content: bytes, kind: type[Built]) -> Built | None:
    """Read JSON Lines; of lines with the same step the last counts (a resumed run logs some steps twice)."""
    lines = [json.loads(line) for line in content.splitlines() if line.strip()]
    if not lines:
        return None
    by_step = {line["step"]: line for line in lines}
    ordered = [by_step[step] for step in sorted(by_step)]
    names = [field.name for field in fields(kind)]  # pyright: ignore[reportArgumentType]
    return kind(**{name: np.array([_number(line[name]) for line in ordered]) for name in names})


def _meta(content: bytes) -> Meta:
    tree = json.loads(content)
    machine = tree["machine"]
    return Meta(
        config_hash=str(tree["config_hash"]),
        versions={name: str(version or "not installed") for name, version in tree["versions"].items()},
        git_commit=tree["git_commit"],
        cpus=int(machine["cpus"]),
        cpu=str(machine["cpu"]),
        gpus=tuple(str(gpu) for gpu in machine["gpus"]),
        started_at=str(tree["started_at"]),
    )
