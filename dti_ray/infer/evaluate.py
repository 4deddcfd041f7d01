"""How good a checkpoint is: every target of one split, under sliding and under streaming inference.

Stage: evaluate. In: a run's configuration and checkpoint, one split. Out: `Evaluation`, written as JSON beside the
predictions.
Invariant: rows in = rows scored, or an error; both protocols are the same packed forward pass over the same targets,
unit by unit, so that nothing depends on who scores a unit (`infer.workers` has many do it).

    sliding      each target in a stand-alone prompt with the n interactions before it, whatever split they are of:
                 what a request-time ranker does
    streaming    the prompts of training: up to k targets of the split behind such a context (k, too, of a mixture)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import pyarrow as pa
import torch
from scipy.special import expit
from torch import Tensor

from dti_ray.config import RunConfig
from dti_ray.data.interactions import SPLITS, Dataset, UserSequences, open_dataset
from dti_ray.data.packing import PackedRow, PackSpec, check_capacity, pack, pack_spec
from dti_ray.data.pipeline import tokens_per_target
from dti_ray.data.plan import derive_seed
from dti_ray.data.prompts import TokenTable
from dti_ray.errors import Fault, IncompleteError, InputError
from dti_ray.infer.outcome import Evaluation, conclude
from dti_ray.infer.units import TargetScores, Unit, collect, plan_units, read_unit, targets_of
from dti_ray.metrics import Predictions
from dti_ray.model.backbone import build_model
from dti_ray.model.batch import PackedBatch, collate_pass
from dti_ray.storage import Storage
from dti_ray.train.checkpoint import Checkpoint, find_best, read_weights
from dti_ray.train.engine import as_trained
from dti_ray.train.host import training_device

Forward = Callable[[PackedBatch], Tensor]
OnProgress = Callable[[int, int], None]


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
        return Predictions(self.user, self.label, expit(self.log_odds))


@dataclass(frozen=True)
class Plan:
    """An evaluation that has passed every check.

    Attributes:
        config: as stored with the run, but for what an evaluation may choose.
        split: valid or test.
        dataset: of the run.
        checkpoint: its best one.
        units: of the split.
    """

    config: RunConfig
    split: str
    dataset: Dataset
    checkpoint: Checkpoint
    units: tuple[Unit, ...]

    @property
    def is_short(self) -> bool:
        """Whether one process has scored it before a worker would have started."""
        return len(self.units) == 1 and self.config.cluster.gpus_per_worker == 0

    @property
    def without_units(self) -> Plan:
        """Return what somebody needs to know who is given the units one by one."""
        return replace(self, dataset=replace(self.dataset, segments=()), units=())


def sliding_spec(config: RunConfig, split: str) -> PackSpec:
    """Return the layout of stand-alone prompts with the context of inference."""
    changes = {"k": 1, "n": config.eval_n, "row_tokens": config.eval.row_tokens}
    return pack_spec(config.packing, config.prompt.context, SPLITS.index(split), **changes)


def streaming_spec(config: RunConfig, split: str) -> PackSpec:
    """Return the layout of training with the context of inference; a row holds whatever training's do."""
    changes = {"n": config.eval_n, "row_tokens": max(config.eval.row_tokens, config.packing.row_tokens)}
    return pack_spec(config.packing, config.prompt.context, SPLITS.index(split), **changes)


def protocol_specs(config: RunConfig, split: str) -> dict[str, PackSpec]:
    """Return the layout of each protocol that is asked for."""
    of = {"sliding": sliding_spec, "streaming": streaming_spec}
    return {protocol: of[protocol](config, split) for protocol in config.protocols}


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


def plan_evaluation(config: RunConfig, storage: Storage, table: TokenTable, split: str) -> Plan:
    """Check all that can be checked before a model is loaded.

    Args:
        config: as stored with the run, but for what an evaluation may choose.
        storage: the root.
        table: made by the run's own tokenizer.
        split: valid or test.

    Raises:
        ConfigError: `eval.row_tokens` is too small for one prompt.
        InputError: the run has no usable checkpoint, or its data set is gone or has no targets of that split.
    """
    dataset, specs = open_dataset(storage, config.data.name), protocol_specs(config, split)
    for spec in specs.values():
        check_capacity(spec, table, where="eval.row_tokens")
    number = SPLITS.index(split)
    if dataset.targets[number] == 0:
        raise InputError(Fault(f"data set {dataset.name}", f"has no {split} targets", hint="check data.split"))
    cost = sum(tokens_per_target(spec, table) for spec in specs.values())
    units = tuple(plan_units(dataset.segments, number, cost))
    return Plan(config, split, dataset, find_best(storage, f"runs/{config.train.run}"), units)


class Scorer:
    """A model on its device that scores units.

    Args:
        plan: its units are not needed.
        table: item texts as tokens.
        forward: the model's.
        device: of the model.
        attention: backend of the model.
    """

    def __init__(self, plan: Plan, table: TokenTable, forward: Forward, device: torch.device, attention: str) -> None:
        self.plan, self.table, self.forward = plan, table, forward
        self.device, self.attention = device, attention

    @classmethod
    def load(cls, plan: Plan, table: TokenTable, device: torch.device) -> Scorer:
        """Load the plan's checkpoint; it computes in the precision that it was trained in.

        Raises:
            DamagedError: the checkpoint is no longer what it was when it was chosen.
        """
        model = build_model(plan.config, table).eval()
        model.load_trained(read_weights(plan.dataset.storage, plan.checkpoint))
        model.attention = attention_on(plan.config.model.attention, device)
        forward = as_trained(model.to(device), plan.config)
        return cls(plan, table, forward, device, model.attention)

    def score(self, unit: Unit) -> TargetScores:
        """Read a unit's users and score their targets under each protocol.

        Raises:
            IncompleteError: targets scored are not the targets of these users.
            StorageError: the users cannot be read.
        """
        config = self.plan.config
        users = read_unit(self.plan.dataset, unit)
        user, position = targets_of(users, SPLITS.index(self.plan.split), config.packing.min_context)
        found, seconds = [], []
        for protocol, spec in protocol_specs(config, self.plan.split).items():
            started, rows = time.monotonic(), pack(users, self.table, spec)
            passes = config.train.rows_per_pass
            found.append(score_rows(self.forward, rows, self.table, self.device, passes, self.attention))
            seconds.append(time.monotonic() - started)
            _check_targets(f"unit {unit.number}, {protocol}", found[-1], user, position)
        return TargetScores(
            user=unit.users[user],
            user_id=pa.chunked_array([pa.array(users.user_ids[user].tolist(), pa.string())]),
            position=position,
            label=found[0].label,
            log_odds=np.stack([scores.log_odds for scores in found]),
            tokens=np.array([scores.tokens for scores in found]),
            seconds=np.array(seconds),
        )


def attention_on(wanted: str, device: torch.device) -> str:
    """Return the run's attention backend where the device has it, or the one that `auto` takes there."""
    has = ("dense", "flex") if device.type == "cuda" else ("dense", "banded")
    return wanted if wanted in has else "auto"


def evaluate_run(
    config: RunConfig, storage: Storage, table: TokenTable, split: str, on_progress: OnProgress
) -> Evaluation:
    """Plan an evaluation and carry it out in this process; see `plan_evaluation` and `evaluate_here`."""
    return evaluate_here(plan_evaluation(config, storage, table, split), table, on_progress)


def evaluate_here(plan: Plan, table: TokenTable, on_progress: OnProgress) -> Evaluation:
    """Score a plan's units in this process, and write the result below the run.

    Args:
        plan: whose checks are done.
        table: item texts as tokens.
        on_progress: called with (targets scored, targets in all).

    Raises:
        DamagedError: the checkpoint is no longer what it was when it was chosen.
        IncompleteError: rows scored are not rows asked for.
        StorageError: users cannot be read.
    """
    started = time.monotonic()
    scorer = Scorer.load(plan, table, training_device())
    found = ((unit.number, scorer.score(unit)) for unit in plan.units)
    scores = collect(plan.units, found, plan.config.packing.min_context, on_progress)
    return conclude(plan.config, plan.dataset, plan.split, plan.checkpoint.path, scores, time.monotonic() - started)


def _check_targets(where: str, scores: Scores, user: np.ndarray, position: np.ndarray) -> None:
    if not (np.array_equal(scores.user, user) and np.array_equal(scores.position, position)):
        raise IncompleteError(Fault(where, f"{len(scores.label)} targets scored", f"each of {len(user)}, in order"))


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
