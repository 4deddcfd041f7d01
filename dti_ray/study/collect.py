"""All that a study has found so far, from where it is stored.

Stage: study, before its report. In: a `Study`. Out: `StudyResults`.
Invariant: nothing is computed here but means and sums; what a reader is told of machine, versions and commit is what
the sessions wrote down that did the work.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime

from dti_ray.data.interactions import SPLITS
from dti_ray.model.decoder import decoder_name
from dti_ray.model.shape import build_shape
from dti_ray.study.answers import find_answers, read_classics
from dti_ray.study.check import Study
from dti_ray.study.once import padded_over_packed
from dti_ray.study.results import StudyResults, TrainedRun
from dti_ray.study.run import records
from dti_ray.tune.ledger import Event, Ledger

SHOWN_VERSIONS = ("dti-ray", "torch", "transformers", "numpy")


def collect_results(study: Study, command: str) -> StudyResults:
    """Return what a study has found so far.

    Args:
        study: from `check_study`.
        command: that runs it, as a reader would type it.
    """
    events = Ledger(study.storage, study.name).events
    classics = read_classics(study.storage, study.name, study.splits) if study.base.study.classical else None
    return StudyResults(
        study=study.base.study,
        facts=facts(study, events),
        command=command,
        runs=tuple(_trained_runs(study, events)),
        classics=classics or (),
        padded_over_packed=padded_over_packed(study),
        is_against_window=study.of_row(study.reference)[0].config.packing.k == 1,
    )


def facts(study: Study, events: Sequence[Event]) -> dict[str, str]:
    """Return what a reader needs to know of a study, in the order in which it is read."""
    config, inputs = study.base, study.inputs[study.reference]
    dataset, train, optim = inputs.dataset, config.train, config.optim
    targets = ", ".join(f"{count:,} {split}" for count, split in zip(dataset.targets, SPLITS, strict=True))
    sessions = [event for event in events if event["event"] == "session"]
    done = [event for event in events if event["event"] == "done"]
    found = records(events).values()
    hours = sum(one.loop_seconds for one in found) / 3600
    return {
        "data set": f"{dataset.name}: {dataset.interactions:,} interactions of {dataset.users:,} users with "
        f"{dataset.items:,} items, {dataset.label_rate:.1%} clicks",
        "split": f"{dataset.data_config.get('split', 'unknown')}: {targets} targets",
        "model": _model(study),
        "training": f"{optim.epochs} epochs, {optim.targets_per_step:,} targets a step, learning rate {optim.lr:g}, "
        f"{train.precision}, n = {config.packing.n}, window {config.packing.window}, texts predicted with weight "
        f"{optim.text_weight:g}; a row says what it changes",
        "hardware": _each(_hardware(event["machine"], event.get("threads")) for event in sessions),
        "versions": _each(_versions(event["versions"]) for event in sessions),
        "commit": _each(str(event["commit"] or "unknown") for event in sessions),
        "dates": _dates([event["at"] for event in [*sessions, *done]]),
        "hours": f"{hours:.2f} of training and validation, {len(found)} runs",
    }


def _trained_runs(study: Study, events: Sequence[Event]) -> Iterable[TrainedRun]:
    found = records(events)
    for row in study.base.study.rows:
        for run in sorted(study.of_row(row), key=lambda run: run.seed):
            answers = find_answers(study.storage, study.name, run) if run.name in found else None
            if answers is None:
                continue
            one, packing = found[run.name], run.config.packing
            yield TrainedRun(
                row, run.seed, packing.k, packing.n, one.seconds, one.elapsed_seconds, one.targets,
                one.tokens, one.flops, one.best_targets, one.valid_auc, answers,
            )  # fmt: skip


def _model(study: Study) -> str:
    config = study.base
    shape = build_shape(config, study.inputs[study.reference].table)
    trained = sum(weight.numel() for weight in shape.parameters() if weight.requires_grad)
    adapters = "" if config.lora.rank is None else f"adapters of rank {config.lora.rank}, "
    return f"{decoder_name(config.model)}, {adapters}{trained / 1e6:.3g} M weights trained"


def _hardware(machine: dict[str, object], threads: int | None) -> str:
    gpus = machine["gpus"]
    assert isinstance(gpus, list), "as identity writes it"
    used = "" if threads is None else f", {threads} of them used"  # older ledgers do not say it
    return ", ".join([*gpus, f"{machine['cpu']} with {machine['cpus']} CPUs{used}"])


def _versions(found: dict[str, str | None]) -> str:
    return ", ".join(f"{name} {found[name]}" for name in SHOWN_VERSIONS if found.get(name))


def _each(values: Iterable[str]) -> str:
    """Return what is distinct, in the order in which it came."""
    return "; ".join(dict.fromkeys(values)) or "unknown"


def _dates(seconds: Sequence[float]) -> str:
    if not seconds:
        return "not begun"
    days = [datetime.fromtimestamp(at, UTC).date().isoformat() for at in (min(seconds), max(seconds))]
    return " to ".join(dict.fromkeys(days))
