"""Commands around a run: train it, evaluate it, report on it, and the demo that does everything.

Stage: top. In: a configuration, or the name of a run. Out: a run's folder, tables, one line for a machine.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dti_ray.cli.data import ensure_dataset
from dti_ray.cli.options import AsJson, Files, Overrides, Root, end, load
from dti_ray.config import RunConfig, dotted_keys, load_config
from dti_ray.config.load import unknown_key
from dti_ray.display import Bar, TrainingView, console, show_evaluation
from dti_ray.errors import ConfigError, Fault
from dti_ray.storage import Storage

if TYPE_CHECKING:  # a wrong option must not wait for torch
    from dti_ray.data.prompts import TokenTable
    from dti_ray.infer.evaluate import OnProgress, Plan
    from dti_ray.infer.outcome import Evaluation

RunAndOverrides = Annotated[
    list[str],
    typer.Argument(help="name of the run, and overrides such as eval.n=20", default_factory=list, show_default=False),
]
Split = Annotated[str, typer.Option("--split", help="valid or test")]
Protocol = Annotated[
    str | None, typer.Option("--protocol", help="sliding, streaming or both: eval.protocol", show_default=False)
]

OF_AN_EVALUATION = ("eval", "storage", "cluster")


def train(overrides: Overrides, files: Files, root: Root = None, as_json: AsJson = False) -> None:
    """Train a run, or go on with it; ends with its validation metrics."""
    config = load(files, overrides, root)
    end(as_json, _train(config))


def evaluate(
    arguments: RunAndOverrides,
    files: Files,
    split: Split = "test",
    protocol: Protocol = None,
    root: Root = None,
    as_json: AsJson = False,
) -> None:
    """Score one split with a run's best checkpoint on many workers, beside simple baselines."""
    if split not in ("valid", "test"):
        raise ConfigError(Fault("--split", f"got {split!r}", "valid or test"))
    asked = [] if protocol is None else [f"eval.protocol={json.dumps(protocol)}"]
    config = _stored_config([*arguments, *asked], files, root)
    result = _evaluate(config, split)
    end(as_json, result)


def report(
    arguments: RunAndOverrides,
    files: Files,
    root: Root = None,
    as_json: AsJson = False,
) -> None:
    """Write a run's HTML page."""
    config = _stored_config(arguments, files, root)
    path = _report(config)
    end(as_json, {"run": config.train.run, "report": path})


def export(
    arguments: RunAndOverrides,
    files: Files,
    to: Annotated[str, typer.Option("--to", help="folder or URI that the model is written to")],
    calibrate: Annotated[bool, typer.Option(help="fit temperature and bias on the validation split")] = False,
    root: Root = None,
    as_json: AsJson = False,
) -> None:
    """Write a run's best state for Transformers and peft: a merged model, and the adapter if there is one."""
    config = _stored_config(arguments, files, root)
    from dti_ray.export import export_run

    done = export_run(config, Storage(config.storage.root), to, calibrate)
    if (fitted := done.calibration) is not None:
        console.print(f"calibration: temperature {fitted.temperature:.3f}, bias {fitted.bias:+.3f}")
    console.print(f"export: {', '.join(done.parts)} in {to}; log-odds differ by {done.largest_difference:.1g} at most")
    end(as_json, {"run": config.train.run, "to": to, **asdict(done)})


def demo(overrides: Overrides, files: Files, root: Root = None, as_json: AsJson = False) -> None:
    """Get MovieLens-100K, prepare, train, evaluate and report: everything, on this machine."""
    files = files or [_demo_file()]
    config = load(files, overrides, root)
    ensure_dataset(config, files, overrides)
    trained = _train(config)
    evaluated = _evaluate(config, "test")
    cost = {name: trained[name] for name in ("targets", "tokens", "targets_per_s", "seconds")}
    end(as_json, {**evaluated, **cost})


def _stored_config(arguments: list[str], files: list[Path], root: str | None) -> RunConfig:
    """Return a run's own configuration, changed only in what an evaluation may choose."""
    from dti_ray.train.identity import load_run

    overrides = [argument for argument in arguments if "=" in argument]
    names = [argument for argument in arguments if "=" not in argument]
    if len(names) > 1:
        raise ConfigError(Fault("RUN", f"got {len(names)} names: {names}", "one"))
    known = set(dotted_keys())
    if unknown := [key for o in overrides if (key := o.partition("=")[0]) not in known]:
        raise ConfigError(*map(unknown_key, unknown))  # what the run fixes is known once it is found
    where = [o for o in overrides if o.startswith(("train.run=", "storage"))]
    asked = load(files, [*where, *(f"train.run={json.dumps(name, ensure_ascii=False)}" for name in names)], root)
    stored = load_run(Storage(asked.storage.root), asked.train.run)
    fixed = [o for o in overrides if o.partition(".")[0] not in OF_AN_EVALUATION and not o.startswith("train.run=")]
    if fixed:
        raise ConfigError(
            *(Fault(o.partition("=")[0], "is fixed by the run", f"{'.*, '.join(OF_AN_EVALUATION)}.*") for o in fixed)
        )
    own = [o for o in overrides if o.partition(".")[0] in OF_AN_EVALUATION]
    return load_config([], [*own, f"storage.root={json.dumps(asked.storage.root, ensure_ascii=False)}"], base=stored)


def _train(config: RunConfig) -> dict[str, object]:
    from dti_ray.cluster import connect
    from dti_ray.train.launch import check_launch, launch

    job = check_launch(config)
    console.print(f"run {config.train.run}: {job.total_targets:,} targets, {config.cluster.workers} workers")
    connect(config.cluster)
    with TrainingView(job.total_targets) as view:
        progress = launch(job, view.show, view.say)
    cost = {
        "targets": progress.targets,
        "tokens": progress.tokens,
        "targets_per_s": progress.targets / progress.seconds,
        "seconds": progress.seconds,
    }
    return {**_evaluate(config, "valid"), **cost}


def _evaluate(config: RunConfig, split: str) -> dict[str, object]:
    from dti_ray.data.interactions import open_dataset
    from dti_ray.infer.evaluate import evaluate_here, plan_evaluation
    from dti_ray.train.inputs import anywhere
    from dti_ray.train.tokens import tokenizer_and_table

    placed = anywhere(config)
    storage = Storage(placed.storage.root)
    _, table = tokenizer_and_table(placed, storage, open_dataset(storage, config.data.name))
    plan = plan_evaluation(placed, storage, table, split)
    score = evaluate_here if plan.is_short else _on_workers(config)
    with Bar(f"scoring {split}", None) as bar:
        evaluation = score(plan, table, bar.update)
    show_evaluation(evaluation)
    return _figures(config, evaluation, _report(config))


def _on_workers(config: RunConfig) -> Callable[[Plan, TokenTable, OnProgress], Evaluation]:
    from dti_ray.cluster import connect
    from dti_ray.infer.workers import evaluate_on_workers

    connect(config.cluster)
    return evaluate_on_workers


def _figures(config: RunConfig, evaluation: Evaluation, report: str) -> dict[str, object]:
    """Return an evaluation's numbers, those of the first protocol without a prefix."""
    values = evaluation.metrics
    names = ("log_loss", "f1", "gauc", "ne", "calibration")
    return {
        "run": config.train.run,
        "checkpoint": Storage(config.storage.root).display(evaluation.checkpoint),
        "report": report,
        "protocol": evaluation.protocol,
        "split": evaluation.split,
        "auc": values.auc.value,
        "auc_low": values.auc.low,
        "auc_high": values.auc.high,
        **{name: getattr(values, name).value for name in names},
        "protocols": {
            result.protocol: {
                "auc": result.metrics.auc.value, "log_loss": result.metrics.log_loss.value, "tokens": result.tokens,
                "tokens_per_s": result.tokens_per_s, "targets_per_s": result.targets_per_s,
            }
            for result in evaluation.results
        },
        "difference": {name: asdict(estimate) for name, estimate in evaluation.difference.items()},
        "targets": values.targets,
        "tokens": evaluation.results[0].tokens,
        "targets_per_s": values.targets / evaluation.seconds,
        "seconds": evaluation.seconds,
    }  # fmt: skip


def _report(config: RunConfig) -> str:
    from dti_ray.data.interactions import open_dataset, read_segment
    from dti_ray.report import write_report
    from dti_ray.report.example import example_mask
    from dti_ray.train.tokens import tokenizer_and_table

    storage = Storage(config.storage.root)
    dataset = open_dataset(storage, config.data.name)
    tokenizer, table = tokenizer_and_table(config, storage, dataset)
    words = tokenizer.convert_ids_to_tokens(list(range(table.vocabulary)))
    assert isinstance(words, list)  # one word per id of the list
    mask = example_mask(config, read_segment(dataset, dataset.segments[0]), table, words)
    path = write_report(storage, config.train.run, mask)
    console.print(f"report: {path}")
    return path


def _demo_file() -> Path:
    for folder in (Path.cwd(), Path(__file__).parents[2]):
        if (file := folder / "configs" / "demo.yaml").exists():
            return file
    raise ConfigError(Fault("configs/demo.yaml", "is not here", "the project's folder", "or name a file with -c"))
