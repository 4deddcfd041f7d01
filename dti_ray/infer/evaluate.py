"""How good a checkpoint is: sliding inference on one split, beside simple baselines.

Stage: evaluate. In: a run's configuration and checkpoint, one split. Out: `Evaluation`, written as JSON
beside the predictions.
Protocol `sliding`: every target in a stand-alone prompt with the n interactions before it, whatever split they
are of: what a request-time ranker does. Invariant: rows in = rows scored, or an error.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import pyarrow as pa
import torch
from pyarrow import parquet as pq
from torch import Tensor

from dti_ray.config import RunConfig
from dti_ray.data.interactions import SPLITS, UserSequences, open_dataset, read_all
from dti_ray.data.packing import PackedRow, PackSpec, check_capacity, pack, pack_spec
from dti_ray.data.plan import derive_seed
from dti_ray.data.prompts import TokenTable
from dti_ray.errors import Fault, IncompleteError
from dti_ray.infer.baselines import predict_baselines
from dti_ray.metrics import Metrics, Predictions, evaluate
from dti_ray.model.backbone import build_model
from dti_ray.model.batch import PackedBatch, collate_pass
from dti_ray.storage import Storage
from dti_ray.telemetry import write_json
from dti_ray.train.checkpoint import read_best
from dti_ray.train.engine import as_trained

PROTOCOL = "sliding"
Forward = Callable[[PackedBatch], Tensor]


@dataclass(frozen=True)
class Scores:
    """One entry per target scored.

    Attributes:
        user: int64, number of the user in the data set.
        position: int64, number of the interaction in the user's history.
        label: int8.
        log_odds: float64.
        tokens: tokens that the model read for all of them.
    """

    user: np.ndarray
    position: np.ndarray
    label: np.ndarray
    log_odds: np.ndarray
    tokens: int

    @property
    def predictions(self) -> Predictions:
        """The same as probabilities, for the metrics."""
        return Predictions(self.user, self.label, 1.0 / (1.0 + np.exp(-self.log_odds)))


@dataclass(frozen=True)
class Evaluation:
    """What `evaluation_<split>.json` holds, and what it cost."""

    split: str
    checkpoint: str
    n: int
    metrics: Metrics
    baselines: dict[str, Metrics]
    tokens: int
    seconds: float
    protocol: str = PROTOCOL


def sliding_spec(config: RunConfig, split: str) -> PackSpec:
    """Return the layout of stand-alone prompts with the context of inference."""
    changes = {"k": 1, "n": config.eval_n, "row_tokens": config.eval.row_tokens}
    return pack_spec(config.packing, config.prompt.context, SPLITS.index(split), **changes)


def sliding_rows(
    sequences: UserSequences, table: TokenTable, config: RunConfig, split: str, max_targets: int | None = None
) -> list[PackedRow]:
    """Pack the targets of a split as stand-alone prompts.

    Args:
        sequences: all users.
        table: item texts as tokens.
        config: of the run.
        split: train, valid or test.
        max_targets: take a fixed random sample of users with about so many targets at most; None takes all.

    Raises:
        ConfigError: `eval.row_tokens` is too small for one prompt.
    """
    spec = sliding_spec(config, split)
    check_capacity(spec, table, where="eval.row_tokens")
    if max_targets is not None:
        sequences = _sample_users(sequences, spec.split, max_targets, config.train.seed)
    return list(pack(sequences, table, spec))


@torch.no_grad()
def score_rows(
    forward: Forward,
    rows: Iterable[PackedRow],
    table: TokenTable,
    device: torch.device,
    rows_per_pass: int,
    attention: str = "auto",
) -> Scores:
    """Score packed rows; targets come out in the order in which they were packed."""
    parts: list[Scores] = []
    for some in _batched(rows, rows_per_pass):
        batch = collate_pass(some, table, attention)
        tokens, batch = batch.size_tokens, batch.to(device)
        log_odds = forward(batch)[batch.is_target].double().cpu().numpy()
        interaction = batch.interaction.gather(1, batch.after)[batch.is_target].cpu().numpy()
        users, labels = (np.concatenate([getattr(row, name) for row in some]) for name in ("users", "labels"))
        parts.append(Scores(users, interaction, labels, log_odds, tokens))
    return join(parts)


def join(parts: Sequence[Scores]) -> Scores:
    """Lay several scores one after the other."""
    if not parts:
        return Scores(*(np.zeros(0, dtype=kind) for kind in (np.int64, np.int64, np.int8, np.float64)), tokens=0)
    arrays = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("user", "position", "label", "log_odds")
    )
    return Scores(*arrays, tokens=sum(part.tokens for part in parts))


def check_complete(scores: Scores, wanted: int) -> None:
    """Hold rows scored against rows asked for.

    Raises:
        IncompleteError: they differ, or a target was scored twice.
    """
    distinct = len(np.unique(np.stack([scores.user, scores.position]), axis=1).T)
    if not len(scores.label) == wanted == distinct:
        raise IncompleteError(
            Fault("evaluation", f"{len(scores.label)} targets scored, {distinct} of them distinct", f"{wanted}")
        )


def evaluate_run(
    config: RunConfig,
    storage: Storage,
    table: TokenTable,
    split: str,
    on_progress: Callable[[int, int], None],
) -> Evaluation:
    """Score one split with a run's best checkpoint and write the result below the run.

    Args:
        config: as stored with the run.
        storage: the root.
        table: made by the run's own tokenizer.
        split: valid or test.
        on_progress: called with (targets scored, targets in all).

    Raises:
        InputError: the run has no checkpoint, or its data set is gone.
        IncompleteError: rows scored are not rows asked for.
    """
    dataset = open_dataset(storage, config.data.name)
    sequences = read_all(dataset)
    checkpoint, weights = read_best(storage, f"runs/{config.train.run}")
    model = build_model(config, table).eval()
    model.load_trained(weights)
    model.attention = "auto"  # of this CPU, whatever device trained
    forward = as_trained(model, config)
    started = time.monotonic()
    rows = sliding_rows(sequences, table, config, split)
    wanted = sum(row.targets for row in rows)
    done: list[Scores] = []
    for some in _batched(rows, config.train.rows_per_pass):
        done.append(score_rows(forward, some, table, torch.device("cpu"), len(some)))
        on_progress(sum(len(part.label) for part in done), wanted)
    scores = join(done)
    check_complete(scores, _targets_of(dataset.targets[SPLITS.index(split)], rows, config))
    seconds = time.monotonic() - started
    seed, replicates = derive_seed(config.train.seed, "bootstrap"), config.eval.bootstrap
    baselines = predict_baselines(sequences, SPLITS.index(split))
    evaluation = Evaluation(
        split, checkpoint.path, config.eval_n, evaluate(scores.predictions, replicates, seed),
        {name: evaluate(predictions, replicates, seed) for name, predictions in baselines.items()},
        scores.tokens, seconds,
    )  # fmt: skip
    _write(storage, config, evaluation, scores, sequences)
    return evaluation


def _targets_of(in_manifest: int, rows: Sequence[PackedRow], config: RunConfig) -> int:
    """Targets that must come out: the manifest's, unless cold targets are left out by configuration."""
    return in_manifest if config.packing.min_context == 0 else sum(row.targets for row in rows)


def _write(
    storage: Storage, config: RunConfig, evaluation: Evaluation, scores: Scores, sequences: UserSequences
) -> None:
    folder = f"runs/{config.train.run}/metrics"
    table = pa.table(
        {
            "user_id": pa.array(sequences.user_ids[scores.user].tolist(), pa.string()),
            "position": pa.array(scores.position, pa.int32()),
            "label": pa.array(scores.label, pa.int8()),
            "probability": pa.array(scores.predictions.probability, pa.float64()),
        }
    )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    storage.write(f"{folder}/predictions_{evaluation.split}.parquet", sink.getvalue().to_pybytes())
    tree = {
        "protocol": evaluation.protocol,
        "split": evaluation.split,
        "checkpoint": evaluation.checkpoint,
        "n": evaluation.n,
        "metrics": evaluation.metrics.to_json(),
        "baselines": {name: metrics.to_json() for name, metrics in evaluation.baselines.items()},
    }
    write_json(storage, f"{folder}/evaluation_{evaluation.split}.json", tree)


def _sample_users(sequences: UserSequences, split: int, max_targets: int, seed: int) -> UserSequences:
    """Hide the targets of all users but a random sample of them."""
    user = np.repeat(np.arange(len(sequences.user_ids)), np.diff(sequences.offsets))
    targets = np.bincount(user[sequences.splits == split], minlength=len(sequences.user_ids))
    order = np.random.default_rng(derive_seed(seed, "validation sample")).permutation(len(targets))
    chosen = np.zeros(len(targets), dtype=bool)
    chosen[order[np.cumsum(targets[order]) <= max_targets]] = True
    hidden = np.where((sequences.splits == split) & ~chosen[user], len(SPLITS), sequences.splits)
    return UserSequences(
        sequences.user_ids, sequences.offsets, sequences.items, sequences.labels, sequences.times, hidden
    )


def _batched(rows: Iterable[PackedRow], size: int) -> Iterator[list[PackedRow]]:
    iterator = iter(rows)
    while some := list(islice(iterator, size)):
        yield some
