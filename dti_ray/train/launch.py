"""From a configuration to a finished run: everything is checked on the driver, then Ray Train runs the loop.

Stage: launch. In: a `RunConfig`. Out: the finished run's `Progress`, its folder filled.
Invariant: a bad run dies here, before a worker is asked for. A run's name and configuration belong together:
the same command again goes on from the newest checkpoint, or finds the run finished; another configuration
under the same name is refused.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass

import ray
import ray.train
from ray.actor import ActorProxy
from ray.train import FailureConfig, ScalingConfig
from ray.train import RunConfig as RayRunConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from transformers import PreTrainedTokenizerBase

from dti_ray.config import RunConfig, StorageConfig
from dti_ray.data.interactions import TRAIN, VALID, Dataset, open_dataset
from dti_ray.data.packing import check_capacity, pack_spec
from dti_ray.data.pipeline import TrainingRows
from dti_ray.data.prompts import TokenTable
from dti_ray.errors import ConfigError, DtiRayError, Fault, InputError, RunError
from dti_ray.infer.evaluate import sliding_spec
from dti_ray.model.attention import choose_backend
from dti_ray.model.backbone import build_model
from dti_ray.model.decoder import absolute_name
from dti_ray.model.shape import build_shape
from dti_ray.storage import Storage, absolute
from dti_ray.telemetry import Line
from dti_ray.train.checkpoint import list_checkpoints
from dti_ray.train.engine import build_engine
from dti_ray.train.host import settle
from dti_ray.train.identity import check_same_run, write_identity
from dti_ray.train.loop import Trainer, passes_per_step
from dti_ray.train.state import Progress
from dti_ray.train.tokens import tokenizer_and_table
from dti_ray.train.world import World

OnLine = Callable[[str, Line], None]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Launch:
    """A run that has passed every check."""

    config: RunConfig
    storage: Storage
    dataset: Dataset
    table: TokenTable
    tokenizer: PreTrainedTokenizerBase

    @property
    def folder(self) -> str:
        """Path of the run below the root."""
        return f"runs/{self.config.train.run}"

    @property
    def total_targets(self) -> int:
        """Targets that the run trains in all."""
        return TrainingRows(self.dataset, self.table, self.config, through_ray=True).total_targets


def check_launch(config: RunConfig) -> Launch:
    """Check all that can be checked without a worker.

    Raises:
        ConfigError: tokenizer, template or capacity do not fit.
        InputError: the data set is not prepared, has no training targets, or the run's name is taken.
        StorageError: the root cannot be reached or written.
    """
    model = config.model.model_copy(update={"name_or_path": absolute_name(config.model.name_or_path)})
    config = config.model_copy(update={"storage": StorageConfig(root=absolute(config.storage.root)), "model": model})
    storage = Storage(config.storage.root)
    storage.check_writable()
    check_same_run(config, storage)
    dataset = open_dataset(storage, config.data.name)
    for split, number in (("train", TRAIN), ("valid", VALID)):
        if dataset.targets[number] == 0:
            raise InputError(Fault(f"data set {dataset.name}", f"has no {split} targets", hint="check data.split"))
    tokenizer, table = tokenizer_and_table(config, storage, dataset)
    check_capacity(pack_spec(config.packing, config.prompt.context, TRAIN), table)
    check_capacity(sliding_spec(config, "valid"), table, where="eval.row_tokens")
    _check_model(config, table)
    return Launch(config, storage, dataset, table, tokenizer)


def _check_model(config: RunConfig, table: TokenTable) -> None:
    """Refuse here what would fail in a worker: the architecture, adapters, kernels that the devices lack."""
    build_shape(config, table)
    has_gpus = config.cluster.gpus_per_worker > 0
    choose_backend(config.model.attention, "cuda" if has_gpus else "cpu")
    needs_gpu = {"model.attention": config.model.attention == "flex", "model.liger": config.model.liger}
    faults = [
        Fault(name, "trains on GPUs only, and cluster.gpus_per_worker is 0", "auto or false, or GPUs")
        for name, asked in needs_gpu.items()
        if asked and not has_gpus
    ]
    if faults:
        raise ConfigError(*faults)


def launch(job: Launch, on_line: OnLine) -> Progress:
    """Run the training and return where it ended.

    Args:
        job: from `check_launch`; Ray must be running. A run that is finished is not trained again.
        on_line: called in this process with each line of metrics, as (kind, line).

    Raises:
        RunError: a worker failed; what was saved is kept.
    """
    found = list_checkpoints(job.storage, job.folder)
    if found and found[-1].progress.targets >= job.total_targets:
        return found[-1].progress
    write_identity(job.config, job.storage, job.tokenizer)
    board = ray.remote(num_cpus=0)(Board).remote()
    parts = WorkerParts(job.config, ray.put(job.table), board)
    cluster = job.config.cluster
    trainer = TorchTrainer(
        _train_worker,
        train_loop_config={"parts": parts},
        scaling_config=ScalingConfig(
            num_workers=cluster.workers,
            use_gpu=cluster.gpus_per_worker > 0,
            resources_per_worker=_resources(job.config),
        ),
        torch_config=TorchConfig(backend="nccl" if cluster.gpus_per_worker > 0 else "gloo"),
        run_config=RayRunConfig(
            name=job.config.train.run,
            storage_path=job.storage.path("runs"),
            storage_filesystem=job.storage.filesystem,
            failure_config=FailureConfig(max_failures=0),
        ),
    )
    with _relaying(board, on_line):
        try:
            trainer.fit()
        except ray.train.TrainingFailedError as error:
            raise _run_error(job, error) from error
    return list_checkpoints(job.storage, job.folder)[-1].progress


class Board:
    """A Ray actor: workers put lines on it, the driver takes them off."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, Line]] = []

    @ray.method
    def put(self, kind: str, line: Line) -> None:
        """Add one line."""
        self.lines.append((kind, line))

    @ray.method
    def take(self) -> list[tuple[str, Line]]:
        """Return all lines since the last call."""
        taken, self.lines = self.lines, []
        return taken


@dataclass(frozen=True)
class WorkerParts:
    """What the driver hands to every worker, as it travels."""

    config: RunConfig
    table: ray.ObjectRef[TokenTable]
    board: ActorProxy[Board]


class _relaying:  # noqa: N801 - reads as a statement
    """Hand the board's lines to the driver's callback while the block runs, and the rest when it ends."""

    def __init__(self, board: ActorProxy[Board], on_line: OnLine) -> None:
        self.board, self.on_line = board, on_line
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()
        self._take()

    def _run(self) -> None:
        while not self.ended.wait(0.5):
            self._take()

    def _take(self) -> None:
        for kind, line in ray.get(self.board.take.remote()):
            self.on_line(kind, line)


def _train_worker(job: dict[str, WorkerParts]) -> None:
    """What every Ray Train worker runs: gather the parts, then the loop."""
    parts = job["parts"]
    config, table = parts.config, ray.get(parts.table)
    device = get_device()
    settle(device, threads=max(1, int(config.cluster.cpus_per_worker)))
    storage = Storage(config.storage.root)
    dataset = open_dataset(storage, config.data.name)
    rows = TrainingRows(dataset, table, config, through_ray=True)
    world = World(device)
    engine = build_engine(build_model(config, table), config, passes_per_step(config, rows, world.size), device)

    def report(kind: str, line: Line, progress: Progress) -> None:
        if world.rank == 0:
            parts.board.put.remote(kind, line)
        if kind == "valid":
            ray.train.report(_metrics(line, progress))

    Trainer(config, storage, rows, engine, world, report).run()


def _metrics(line: Line, progress: Progress) -> dict[str, object]:
    return {**line, "tokens": progress.tokens}


def _resources(config: RunConfig) -> dict[str, float]:
    cluster = config.cluster
    gpus = {"GPU": cluster.gpus_per_worker} if cluster.gpus_per_worker > 0 else {}
    return {"CPU": cluster.cpus_per_worker, **gpus}


def _run_error(job: Launch, error: Exception) -> DtiRayError:
    """Name the first failing rank's own error, where its traceback lies, and how to go on."""
    trace = f"{job.folder}/failure.txt"
    job.storage.write(trace, str(error).encode())
    failures = getattr(error, "worker_failures", {})
    for rank, cause in sorted(failures.items()):
        inner = getattr(cause, "cause", cause)
        if isinstance(inner, DtiRayError):
            return inner
        reason = "; ".join(str(inner).strip().splitlines()[-1:])
        return RunError(
            Fault(
                f"rank {rank}",
                f"{type(inner).__name__}: {reason}",
                hint=f"traceback in {job.storage.display(trace)}; the same command goes on from what was saved",
            )
        )
    return RunError(Fault(f"run {job.config.train.run}", str(error).strip().splitlines()[-1]))
