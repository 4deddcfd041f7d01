"""What an evaluation found, held against baselines and written below the run.

Stage: evaluate, last step. In: `TargetScores` of a split. Out: `Evaluation`, as `metrics/evaluation_<split>.json`, and
`metrics/predictions_<split>.parquet`.
Invariant: all protocols and baselines are measured on the same targets and the same bootstrap replicates; for the
baselines the interactions are read again, a few segments at a time, and never held as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import pyarrow as pa
from pyarrow import parquet as pq
from scipy.special import expit

from dti_ray.config import RunConfig
from dti_ray.data.interactions import SPLITS, VALID, Dataset
from dti_ray.data.plan import derive_seed
from dti_ray.data.stats import read_blocks
from dti_ray.infer.baselines import stream_baselines
from dti_ray.infer.units import TargetScores
from dti_ray.metrics import Estimate, Metrics, Predictions, evaluate, paired_difference
from dti_ray.telemetry import write_json


@dataclass(frozen=True)
class Result:
    """What the model reached under one protocol, and what that cost.

    Attributes:
        protocol: sliding or streaming.
        metrics: with intervals.
        tokens: that the model read.
        seconds: spent on it, summed over all workers.
    """

    protocol: str
    metrics: Metrics
    tokens: int
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        """Of one worker."""
        return self.tokens / self.seconds

    @property
    def targets_per_s(self) -> float:
        """Of one worker."""
        return self.metrics.targets / self.seconds


@dataclass(frozen=True)
class Evaluation:
    """A checkpoint on one split.

    Attributes:
        split: valid or test.
        checkpoint: folder of the state.
        n: context interactions of a prompt.
        results: of one protocol or of both, sliding first.
        difference: of the second protocol to the first, by metric; empty where there is one protocol.
        baselines: name -> metrics.
        seconds: from the first unit to the last one; workers start within it.
    """

    split: str
    checkpoint: str
    n: int
    results: tuple[Result, ...]
    difference: Mapping[str, Estimate]
    baselines: Mapping[str, Metrics]
    seconds: float

    @property
    def protocol(self) -> str:
        """The first one."""
        return self.results[0].protocol

    @property
    def metrics(self) -> Metrics:
        """Under the first protocol."""
        return self.results[0].metrics


def conclude(
    config: RunConfig, dataset: Dataset, split: str, checkpoint: str, scores: TargetScores, seconds: float
) -> Evaluation:
    """Measure a split's scores, write them and return what they say.

    Args:
        config: of the run, with the protocols of the scores.
        dataset: gives the baselines their interactions; the run lies on its root.
        split: valid or test.
        checkpoint: folder of the state.
        scores: of all targets.
        seconds: that scoring took.
    """
    seed, replicates = derive_seed(config.train.seed, "bootstrap"), config.eval.bootstrap
    number, min_context = SPLITS.index(split), config.packing.min_context
    has_valid = dataset.targets[VALID] > 0
    baselines = stream_baselines(lambda: read_blocks(dataset), dataset.items, number, has_valid, min_context)
    predictions = [Predictions(scores.user, scores.label, expit(row)) for row in scores.log_odds]
    costs = zip(config.protocols, predictions, scores.tokens.tolist(), scores.seconds.tolist(), strict=True)
    first, *others = predictions
    evaluation = Evaluation(
        split, checkpoint, config.eval_n,
        tuple(Result(name, evaluate(found, replicates, seed), *cost) for name, found, *cost in costs),
        paired_difference(others[0], first, replicates, seed) if others else {},
        {name: evaluate(found, replicates, seed) for name, found in baselines.items()},
        seconds,
    )  # fmt: skip
    _write(config, dataset, evaluation, scores, predictions)
    return evaluation


def _write(
    config: RunConfig, dataset: Dataset, evaluation: Evaluation, scores: TargetScores, predictions: list[Predictions]
) -> None:
    folder, storage = f"runs/{config.train.run}/metrics", dataset.storage
    names = ["probability", *(f"probability_{result.protocol}" for result in evaluation.results[1:])]
    table = pa.table(
        {
            "user_id": scores.user_id,
            "position": pa.array(scores.position, pa.int32()),
            "label": pa.array(scores.label, pa.int8()),
            **{name: pa.array(found.probability) for name, found in zip(names, predictions, strict=True)},
        }
    )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    storage.write(f"{folder}/predictions_{evaluation.split}.parquet", sink.getvalue().to_pybytes())
    write_json(storage, f"{folder}/evaluation_{evaluation.split}.json", _tree(evaluation))


def _tree(evaluation: Evaluation) -> dict[str, object]:
    """Return what the file holds: the first protocol at the top, as where there is only one, the other below it."""
    first, *others = map(_result, evaluation.results)
    difference = {name: _plain(estimate) for name, estimate in evaluation.difference.items()}
    return {
        "split": evaluation.split,
        "checkpoint": evaluation.checkpoint,
        "n": evaluation.n,
        **first,
        "baselines": {name: metrics.to_json() for name, metrics in evaluation.baselines.items()},
        "other": {**others[0], "difference": difference} if others else None,
    }


def _result(result: Result) -> dict[str, object]:
    return {
        "protocol": result.protocol,
        "metrics": result.metrics.to_json(),
        "tokens": result.tokens,
        "seconds": result.seconds,
    }


def _plain(estimate: Estimate) -> dict[str, float | None]:
    return {name: None if math.isnan(value) else value for name, value in asdict(estimate).items()}
