"""The command line: parse, check, one call, one exit code.

Stage: top. In: arguments. Out: text for a person on stderr, with `--json` one line for a machine on stdout.
Exit codes: 0 done, 2 bad configuration or input (nothing was started), 3 the run failed (state is kept).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.markup import escape

from dti_ray.config import RunConfig, load_config, to_yaml
from dti_ray.display import Bar, TrainingView, console, show_dataset, show_evaluation
from dti_ray.errors import ConfigError, DtiRayError, Fault
from dti_ray.storage import Storage

app = typer.Typer(
    help="Train LLM click models by Dynamic Target Isolation.",
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
)  # fmt: skip
data_app = typer.Typer(help="Fetch and look at logs.", no_args_is_help=True)
config_app = typer.Typer(help="Look at the configuration.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(config_app, name="config")

Files = Annotated[
    list[Path],
    typer.Option(
        "--config", "-c", help="YAML file; may be given several times", default_factory=list, show_default=False
    ),
]
Root = Annotated[str | None, typer.Option("--root", help="storage root: folder, file://, s3:// or gs:// URI")]
AsJson = Annotated[bool, typer.Option("--json", help="end with one machine-readable line on stdout")]
Overrides = Annotated[
    list[str],
    typer.Argument(help="overrides such as optim.lr=3e-4 packing.k=50", default_factory=list, show_default=False),
]
RunAndOverrides = Annotated[
    list[str],
    typer.Argument(help="name of the run, and overrides such as eval.n=20", default_factory=list, show_default=False),
]
Split = Annotated[str, typer.Option("--split", help="valid or test")]

OF_AN_EVALUATION = ("eval", "storage", "cluster")


@data_app.command("get")
def data_get(name: Annotated[str, typer.Argument(help="ml-100k")], root: Root = None, as_json: AsJson = False) -> None:
    """Fetch a public log below the storage root."""
    from dti_ray.data.sources import movielens

    config = _load([], [], root)
    with Bar(f"fetching {name}", None) as bar:
        path = movielens.fetch(Storage(config.storage.root), name, bar.update)
    console.print(f"raw files: {path}")
    _end(as_json, {"name": name, "path": path})


@app.command()
def prepare(overrides: Overrides, files: Files, root: Root = None, as_json: AsJson = False) -> None:
    """Turn a raw log into time-ordered, split users."""
    from dti_ray.cluster import connect
    from dti_ray.data.prepare import prepare as run_prepare

    config = _load(files, overrides, root)
    storage = Storage(config.storage.root)
    storage.check_writable()
    connect(config.cluster)
    with console.status("preparing"):
        dataset = run_prepare(config, storage)
    show_dataset(dataset)
    manifest = storage.display(dataset.folder, "manifest.json")
    quarantined = sum(dataset.quarantined.values())
    _end(as_json, {"interactions": dataset.interactions, "quarantined": quarantined, "manifest": manifest})


@app.command()
def train(overrides: Overrides, files: Files, root: Root = None, as_json: AsJson = False) -> None:
    """Train a run, or go on with it; ends with its validation metrics."""
    config = _load(files, overrides, root)
    _end(as_json, _train(config))


@app.command()
def evaluate(
    arguments: RunAndOverrides,
    files: Files,
    split: Split = "test",
    root: Root = None,
    as_json: AsJson = False,
) -> None:
    """Score one split with a run's best checkpoint, beside simple baselines."""
    if split not in ("valid", "test"):
        raise ConfigError(Fault("--split", f"got {split!r}", "valid or test"))
    config = _stored_config(arguments, files, root)
    result = _evaluate(config, split)
    _end(as_json, result)


@app.command()
def report(
    arguments: RunAndOverrides,
    files: Files,
    root: Root = None,
    as_json: AsJson = False,
) -> None:
    """Write a run's HTML page."""
    config = _stored_config(arguments, files, root)
    path = _report(config)
    _end(as_json, {"run": config.train.run, "report": path})


@app.command()
def demo(overrides: Overrides, files: Files, root: Root = None, as_json: AsJson = False) -> None:
    """Get MovieLens-100K, prepare, train, evaluate and report: everything, on this machine."""
    files = files or [_demo_file()]
    config = _load(files, overrides, root)
    data_get(config.data.name, config.storage.root)
    prepare(overrides, files, config.storage.root)
    trained = _train(config)
    evaluated = _evaluate(config, "test")
    cost = {name: trained[name] for name in ("targets", "tokens", "targets_per_s", "seconds")}
    _end(as_json, {**evaluated, **cost})


@config_app.command("show")
def config_show(overrides: Overrides, files: Files, root: Root = None) -> None:
    """Print the effective configuration as YAML."""
    sys.stdout.write(to_yaml(_load(files, overrides, root)))


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line; every expected error is one line per fault, without a traceback.

    Args:
        arguments: command first; None takes the process's own.
    """
    try:
        app(arguments, prog_name="dti-ray")
    except DtiRayError as error:
        for fault in error.faults:
            console.print(f"[red]error[/] {escape(str(fault))}", soft_wrap=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        console.print("interrupted; the same command goes on from the last checkpoint")
        sys.exit(DtiRayError.exit_code)
    sys.exit(0)


def _load(files: list[Path], overrides: list[str], root: str | None) -> RunConfig:
    given = [] if root is None else [f"storage.root={json.dumps(root, ensure_ascii=False)}"]
    return load_config(files, [*overrides, *given])


def _stored_config(arguments: list[str], files: list[Path], root: str | None) -> RunConfig:
    """Return a run's own configuration, changed only in what an evaluation may choose."""
    from dti_ray.train.identity import load_run

    overrides = [argument for argument in arguments if "=" in argument]
    names = [argument for argument in arguments if "=" not in argument]
    if len(names) > 1:
        raise ConfigError(Fault("RUN", f"got {len(names)} names: {names}", "one"))
    asked = _load(files, [*overrides, *(f"train.run={json.dumps(name, ensure_ascii=False)}" for name in names)], root)
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
        progress = launch(job, view.show)
    cost = {
        "targets": progress.targets,
        "tokens": progress.tokens,
        "targets_per_s": progress.targets / progress.seconds,
        "seconds": progress.seconds,
    }
    return {**_evaluate(config, "valid"), **cost}


def _evaluate(config: RunConfig, split: str) -> dict[str, object]:
    from dti_ray.data.interactions import open_dataset
    from dti_ray.infer.evaluate import evaluate_run
    from dti_ray.train.launch import tokenizer_and_table

    storage = Storage(config.storage.root)
    _, table = tokenizer_and_table(config, storage, open_dataset(storage, config.data.name))
    with Bar(f"scoring {split}", None) as bar:
        evaluation = evaluate_run(config, storage, table, split, bar.update)
    show_evaluation(evaluation)
    path = _report(config)
    values = evaluation.metrics
    names = ("log_loss", "f1", "gauc", "ne", "calibration")
    return {
        "run": config.train.run,
        "checkpoint": storage.display(evaluation.checkpoint),
        "report": path,
        "protocol": evaluation.protocol,
        "split": split,
        "auc": values.auc.value,
        "auc_low": values.auc.low,
        "auc_high": values.auc.high,
        **{name: getattr(values, name).value for name in names},
        "targets": values.targets,
        "tokens": evaluation.tokens,
        "targets_per_s": values.targets / evaluation.seconds,
        "seconds": evaluation.seconds,
    }


def _report(config: RunConfig) -> str:
    from dti_ray.data.interactions import open_dataset, read_segment
    from dti_ray.report import write_report
    from dti_ray.report.example import example_mask
    from dti_ray.train.launch import tokenizer_and_table

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
    for folder in (Path.cwd(), Path(__file__).parent.parent):
        if (file := folder / "configs" / "demo.yaml").exists():
            return file
    raise ConfigError(Fault("configs/demo.yaml", "is not here", "the project's folder", "or name a file with -c"))


def _end(as_json: bool, result: dict[str, object]) -> None:
    if as_json:
        sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
