"""Training speed: the sliding window, padded and packed, against DTI, on the same targets.

Stage: bench. In: a configuration, a prepared data set, a list of k. Out: one `Row` per paradigm.
Invariant: every paradigm trains the same targets in the same optimizer steps with the same model, backend and
precision, and its prompts are those that training would pack. The bounds are counted on these very rows.

    efficiency = (speed-up over the packed sliding window) / (its FLOPs / DTI's FLOPs)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dti_ray.bench.timing import Timing, interleave
from dti_ray.config import RunConfig
from dti_ray.data.interactions import TRAIN, Dataset, UserSequences, read_segment
from dti_ray.data.packing import PackedRow, PackSpec, check_capacity, end_to_end, pack, pack_spec
from dti_ray.data.pipeline import concatenate
from dti_ray.data.plan import derive_seed
from dti_ray.data.prompts import TokenTable
from dti_ray.errors import Fault, InputError
from dti_ray.model.backbone import ClickModel, build_model
from dti_ray.model.batch import collate
from dti_ray.model.flops import Work, count_flops, count_work
from dti_ray.model.loss import loss_sum
from dti_ray.train.engine import Engine, build_engine

Passes = list[list[PackedRow]]


@dataclass(frozen=True)
class Row:
    """One paradigm.

    Attributes:
        paradigm: sliding_padded, sliding_packed or dti.
        k: targets of a prompt, or "all".
        targets_per_s: trained.
        tokens_per_target: of the rows, padding left out.
        padding: share of the computed tokens.
        speedup_padded: over the padded sliding window.
        speedup_packed: over the packed sliding window.
        token_ratio: the packed sliding window's tokens over this one's.
        flop_ratio: the packed sliding window's FLOPs over this one's: the bound of `speedup_packed`.
        efficiency: speedup_packed / flop_ratio.
        spread: (slowest - fastest repetition) / median repetition.
    """

    paradigm: str
    k: int | str
    targets_per_s: float
    tokens_per_target: float
    padding: float
    speedup_padded: float
    speedup_packed: float
    token_ratio: float
    flop_ratio: float
    efficiency: float
    spread: float


@dataclass(frozen=True)
class Paradigm:
    """What is timed: a way of packing, and its steps."""

    name: str
    k: int | str
    steps: list[Passes]


def bench_train(
    config: RunConfig,
    dataset: Dataset,
    table: TokenTable,
    ks: Sequence[int | str],
    *,
    targets: int,
    targets_per_step: int,
    repeats: int,
    device: torch.device,
    done: Callable[[int, int], None] = lambda _done, _total: None,
) -> list[Row]:
    """Time training steps of all paradigms in turns.

    Args:
        config: model, rules, precision, and the rows' capacity.
        dataset: prepared.
        table: its item texts as tokens.
        ks: values of `packing.k` to try.
        targets: size of the sample, about.
        targets_per_step: targets of one optimizer step, about, the same for all.
        repeats: rounds.
        device: where to train.
        done: called with the steps done, and their number.

    Raises:
        ConfigError: a row cannot hold one prompt.
        InputError: the data set has no training targets.
    """
    for k in (1, *ks):
        check_capacity(_spec(config, k), table)
    groups = _sample(dataset, targets, targets_per_step, config.train.seed)
    paradigms = [
        Paradigm("sliding_padded", 1, [_padded(group, table, config) for group in groups]),
        *(_packed(name, k, groups, table, config) for name, k in [("sliding_packed", 1), *(("dti", k) for k in ks)]),
    ]
    model = build_model(config, table)
    engine = build_engine(model, config, 1, device)
    engine.set_training(True)
    cases = {
        f"{p.name} {p.k}": [_step(engine, passes, table, config.optim.lr) for passes in p.steps] for p in paradigms
    }
    total = repeats * len(groups)
    timings = interleave(cases, repeats, device, lambda count: done(count, total))
    works = [_work(paradigm, table, model) for paradigm in paradigms]
    flops = [count_flops(model, work).train for work in works]
    return [
        _row(paradigm, timing, work, flop, references=(list(timings.values()), works[1], flops[1]), table=table)
        for paradigm, timing, work, flop in zip(paradigms, timings.values(), works, flops, strict=True)
    ]


def _sample(dataset: Dataset, targets: int, targets_per_step: int, seed: int) -> list[UserSequences]:
    """Draw whole segments until there are enough targets; each group is one optimizer step."""
    order = np.random.default_rng(derive_seed(seed, "bench")).permutation(len(dataset.segments))
    groups: list[list[UserSequences]] = [[]]
    drawn = inside = 0
    for number in order:
        segment = dataset.segments[int(number)]
        if not segment.targets[TRAIN]:
            continue
        if inside >= targets_per_step:
            groups.append([])
            inside = 0
        if drawn >= targets and not inside:
            break
        groups[-1].append(read_segment(dataset, segment))
        inside += segment.targets[TRAIN]
        drawn += segment.targets[TRAIN]
    full = [concatenate(group) for group in groups if group]
    if not full:
        raise InputError(Fault(f"data set {dataset.name}", "has no train targets", hint="check data.split"))
    return full


def _packed(name: str, k: int | str, groups: Sequence[UserSequences], table: TokenTable, config: RunConfig) -> Paradigm:
    """Pack every group into rows and these into passes, as training does."""
    spec = _spec(config, k)
    steps = []
    for number, group in enumerate(groups):
        rng = np.random.default_rng(derive_seed(config.train.seed, "bench rows", number))
        rows = list(pack(group, table, spec, rng=rng))
        steps.append([[end_to_end(some)] for some in _passes(rows, config)])
    return Paradigm(name, k, steps)


def _padded(group: UserSequences, table: TokenTable, config: RunConfig) -> Passes:
    """One prompt a row, padded to the longest of its pass: what published baselines train on."""
    spec = _spec(config, 1)
    rng = np.random.default_rng(derive_seed(config.train.seed, "bench rows"))
    prompts = int((group.splits == TRAIN).sum())
    return _passes(list(pack(group, table, spec, prompts, rng)), config)


def _spec(config: RunConfig, k: int | str) -> PackSpec:
    return pack_spec(config.packing, config.prompt.context, TRAIN, k=None if k == "all" else int(k))


def _passes(rows: list[PackedRow], config: RunConfig) -> Passes:
    """Deal rows to passes of equal size, none with more tokens than training allows."""
    limit = config.train.rows_per_pass * config.packing.row_tokens
    size = len(rows) * max((row.size_tokens for row in rows), default=1)
    parts = np.array_split(np.arange(len(rows)), max(1, math.ceil(size / limit)))
    return [[rows[i] for i in part] for part in parts]


def _step(engine: Engine, passes: Passes, table: TokenTable, lr: float) -> Callable[[], None]:
    targets = sum(row.targets for rows in passes for row in rows)

    def step() -> None:
        for rows in passes:
            batch = collate(rows, table).to(engine.device)
            log_odds, text_loss = engine.forward_training(batch)
            engine.backward((loss_sum(log_odds, batch.labels, batch.is_target) + text_loss) / targets)
        engine.step(lr)

    return step


def _work(paradigm: Paradigm, table: TokenTable, model: ClickModel) -> Work:
    batches = (collate([row], table) for passes in paradigm.steps for rows in passes for row in rows)
    return sum((count_work(batch, model.rules) for batch in batches), Work())


def _row(
    paradigm: Paradigm,
    timing: Timing,
    work: Work,
    flops: int,
    references: tuple[list[Timing], Work, int],
    table: TokenTable,
) -> Row:
    (padded, packed, *_), packed_work, packed_flops = references
    computed = sum(collate(rows, table).tokens.numel() for passes in paradigm.steps for rows in passes)
    speedup, flop_ratio = packed.seconds / timing.seconds, packed_flops / flops
    return Row(
        paradigm=paradigm.name,
        k=paradigm.k,
        targets_per_s=work.sums / timing.seconds,
        tokens_per_target=work.tokens / work.sums,
        padding=1.0 - work.tokens / computed,
        speedup_padded=padded.seconds / timing.seconds,
        speedup_packed=speedup,
        token_ratio=packed_work.tokens / work.tokens,
        flop_ratio=flop_ratio,
        efficiency=speedup / flop_ratio,
        spread=timing.spread,
    )
