"""Commands that measure and foretell: bench, estimate.

Stage: top. In: options. Out: a table for a person, one line for a machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from dti_ray.cli.data import ensure_known_dataset
from dti_ray.cli.options import AsJson, Files, Overrides, Root, end, load
from dti_ray.cli.score import RunAndOverrides, run_score, score_config
from dti_ray.config import RunConfig, with_values
from dti_ray.display import Bar, show_bench, show_costs
from dti_ray.errors import ConfigError, Fault
from dti_ray.storage import Storage

if TYPE_CHECKING:  # a wrong option must not wait for torch
    from dti_ray.data.interactions import Dataset
    from dti_ray.data.prompts import TokenTable

bench_app = typer.Typer(help="Measure speed: every figure is a ratio within one process.", no_args_is_help=True)

Ks = Annotated[
    list[str],
    typer.Option(
        "--k", help="targets of a prompt, or all; may be given several times", default_factory=list, show_default=False
    ),
]
Repeats = Annotated[int, typer.Option("--repeats", min=1, help="interleaved repetitions; medians are shown")]
DEFAULT_KS = ("20", "50", "all")
IN_ONE_PROCESS = ("train.engine=torch", "cluster.workers=1")


@bench_app.command("train")
def bench_train_command(
    overrides: Overrides,
    files: Files,
    ks: Ks,
    window: Annotated[
        str | None, typer.Option(help="packing.window of DTI: interactions (default), tokens or off")
    ] = None,
    targets: Annotated[int, typer.Option(min=1, help="size of the sample, about (count)")] = 8192,
    targets_per_step: Annotated[
        int, typer.Option(min=1, help="targets of one optimizer step, at least one segment (count)")
    ] = 2048,
    repeats: Repeats = 3,
    root: Root = None,
    as_json: AsJson = False,
) -> None:
    """Train the sliding window, padded and packed, and DTI, in turns on the same targets."""
    chosen = _parse_ks(ks)
    stated = [f"packing.window={window}"] if window else []
    given = ["packing.window=interactions", *overrides, *IN_ONE_PROCESS, *stated]
    config, dataset, table = _inputs(files, given, root)
    import torch

    from dti_ray.bench.train import bench_train
    from dti_ray.model.decoder import decoder_name
    from dti_ray.train.host import settle, training_device

    device = training_device()
    settle(device)
    with Bar("training in turns", None) as bar:
        rows = bench_train(
            config, dataset, table, chosen,
            targets=targets, targets_per_step=targets_per_step, repeats=repeats, device=device, done=bar.update,
        )  # fmt: skip
    facts = {
        "window": str(config.packing.window), "n": config.packing.n, "model": decoder_name(config.model),
        "precision": config.train.precision, "attention": config.model.attention, "device": str(device),
        "threads": torch.get_num_threads(), "targets_per_step": targets_per_step, "repeats": repeats,
    }  # fmt: skip
    show_bench("training", [asdict(row) for row in rows], facts)
    end(as_json, {"rows": [asdict(row) for row in rows], **facts})


@bench_app.command("attention")
def bench_attention_command(
    overrides: Overrides,
    files: Files,
    row_tokens: Annotated[int, typer.Option(min=64, help="length of the row (tokens)")] = 4096,
    repeats: Repeats = 5,
    root: Root = None,
    as_json: AsJson = False,
) -> None:
    """Time one layer's attention, forward and backward, against PyTorch's under a dense mask."""
    config = load(files, ["packing.window=interactions", "packing.n=20", "train.precision=fp32", *overrides], root)
    from dti_ray.bench.attention import bench_attention
    from dti_ray.model.attention import choose_backend
    from dti_ray.train.host import settle, training_device

    device = training_device()
    settle(device)
    found = bench_attention(config, row_tokens, [choose_backend("auto", device.type)], repeats, device)
    facts = {"row_tokens": found.row_tokens, "window": str(config.packing.window), "n": config.packing.n}
    rows = [{"backend": name, "seconds": value, "speedup": found.speedup.get(name, 1.0)}
            for name, value in found.seconds.items()]  # fmt: skip
    show_bench("attention of one layer, forward + backward", rows, facts)
    ratios = {f"{name}_over_dense": ratio for name, ratio in found.speedup.items()}
    end(as_json, {**ratios, "seconds": found.seconds, **facts})


@bench_app.command("pack")
def bench_pack_command(
    overrides: Overrides, files: Files, ks: Ks, repeats: Repeats = 3, root: Root = None, as_json: AsJson = False
) -> None:
    """Time packing on one core."""
    chosen = _parse_ks(ks) if ks else []
    config, dataset, table = _inputs(files, overrides, root)
    from dti_ray.bench.pack import bench_pack

    rows = bench_pack(config, dataset, table, chosen or [config.packing.k], repeats)
    show_bench("packing", [asdict(row) for row in rows], {"row_tokens": config.packing.row_tokens})
    end(as_json, {"targets_per_s_per_core": rows[0].targets_per_s_per_core, "rows": [asdict(row) for row in rows]})


@bench_app.command("score")
def bench_score_command(
    overrides: Overrides,
    files: Files,
    candidates: Annotated[int, typer.Option(min=1, help="candidates of a slate (count)")] = 100,
    item_tokens: Annotated[int, typer.Option(min=1, help="length of every item's text (tokens)")] = 20,
    repeats: Repeats = 5,
    root: Root = None,
    as_json: AsJson = False,
) -> None:
    """Time a slate against a prompt per candidate, and an appended interaction against a fresh prompt."""
    config = load(files, ["packing.n=50", "train.precision=fp32", *overrides], root)
    import torch

    from dti_ray.bench.score import bench_score
    from dti_ray.model.decoder import decoder_name
    from dti_ray.train.host import settle, training_device

    device = training_device()
    settle(device)
    found = bench_score(config, candidates, item_tokens, repeats, device)
    facts = {
        "candidates": candidates, "n": config.eval_n, "item_tokens": item_tokens, "model": decoder_name(config.model),
        "window": str(config.packing.window), "device": str(device),
        "threads": torch.get_num_threads(), "repeats": repeats,
    }  # fmt: skip
    ratios = {"slate_speedup": found.slate_speedup, "append_speedup": found.append_speedup}
    show_bench("scoring", [{**ratios, **{f"{name}_ms": 1000 * value for name, value in found.seconds.items()}}], facts)
    end(as_json, {**ratios, "seconds": found.seconds, **facts})


@bench_app.command("batch")
def bench_batch_command(
    arguments: RunAndOverrides,
    files: Files,
    requests: Annotated[int, typer.Option(min=1, help="rows of the log (count)")] = 10_000,
    candidates: Annotated[int, typer.Option(min=1, help="candidates of each (count)")] = 100,
    root: Root = None,
    as_json: AsJson = False,
) -> None:
    """Make up requests of a run's own users and score them: pairs per second, memory of driver and workers."""
    config = score_config(arguments, files, root)
    storage = Storage(config.storage.root)
    from dti_ray.bench.requests import write_requests
    from dti_ray.data.interactions import open_dataset
    from dti_ray.score.model import choose

    dataset = open_dataset(storage, config.score.dataset or choose(config, storage).config.data.name)
    log = write_requests(dataset, requests, candidates, config.train.seed)
    asked = with_values(config, {"score.input": log, "score.name": "bench"})
    storage.delete("scores/bench")
    facts = {"requests": requests, "candidates": candidates, "users": min(requests, dataset.users)}
    end(as_json, {**run_score(asked), **facts})


def estimate(
    overrides: Overrides,
    files: Files,
    gpu: Annotated[str, typer.Option(help="device whose peak and memory count")] = "H100",
    mfu: Annotated[float, typer.Option(min=0.01, max=1.0, help="share of the peak that training reaches")] = 0.4,
    root: Root = None,
    as_json: AsJson = False,
) -> None:
    """Foretell tokens, FLOPs, GPU-hours and memory, for the sliding window and for this k; needs no GPU."""
    from dti_ray.gpus import GPUS

    if gpu not in GPUS:
        raise ConfigError(Fault("--gpu", f"got {gpu!r}", f"one of {', '.join(GPUS)}"))
    config, dataset, table = _inputs(files, overrides, root)
    from dti_ray.estimate import estimate as run_estimate

    device = GPUS[gpu]
    costs = run_estimate(config, dataset, table, device.peak_flops, mfu)
    rows = [
        {**asdict(cost), "memory": {**asdict(cost.memory), "total": cost.memory.total},
         "fits": cost.memory.total <= device.memory_gb * 1e9}
        for cost in costs
    ]  # fmt: skip
    show_costs(costs, gpu, device.memory_gb, mfu)
    end(as_json, {"gpu": gpu, "mfu": mfu, "rows": rows})


def _inputs(files: Files, overrides: Overrides, root: str | None) -> tuple[RunConfig, Dataset, TokenTable]:
    """Return what a bench reads; MovieLens-100K is fetched and prepared if it is not there."""
    config = load(files, overrides, root)
    storage = Storage(config.storage.root)
    from dti_ray.data.asked import open_asked
    from dti_ray.train.tokens import tokenizer_and_table

    if ensure_known_dataset(config, files, overrides):
        leave_cluster()
    dataset = open_asked(config.data, storage)
    _, table = tokenizer_and_table(config, storage, dataset)
    return config, dataset, table


def leave_cluster() -> None:
    """Give the cores that prepared the data back to what is measured."""
    import ray

    ray.shutdown()


def _parse_ks(ks: Sequence[str]) -> list[int | str]:
    faults = [Fault("--k", f"got {k!r}", "a positive integer, or all") for k in ks if k != "all" and not _is_count(k)]
    if faults:
        raise ConfigError(*faults)
    return list(dict.fromkeys(k if k == "all" else int(k) for k in ks or DEFAULT_KS))


def _is_count(text: str) -> bool:
    return text.isdecimal() and int(text) > 0
