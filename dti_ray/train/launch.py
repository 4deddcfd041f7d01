"""From a configuration to a finished run: everything is checked on the driver, then Ray Train runs the loop.

Stage: launch. In: a `RunConfig`. Out: the finished run's `Progress`, its folder filled.
Invariant: a bad run dies here, before a worker is asked for. A run's name and configuration belong together:
the same command again goes on from the newest checkpoint, or finds the run finished; another configuration
under the same name is refused.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass

import ray
import ray.train
from ray.train import FailureConfig, ScalingConfig
from ray.train import RunConfig as RayRunConfig
from ray.train.torch import TorchTrainer
from ray.util.metrics import Counter, Gauge
from transformers import PreTrainedTokenizerBase

from dti_ray.cluster import this_node
from dti_ray.config import RunConfig
from dti_ray.data.interactions import Dataset
from dti_ray.data.pipeline import TrainingRows
from dti_ray.data.prompts import TokenTable
from dti_ray.errors import DamagedError, DtiRayError, Fault, RunError, StoppedError
from dti_ray.storage import Storage
from dti_ray.telemetry import Line, Sinks, read_lines
from dti_ray.telemetry.logs import log_line, on_driver
from dti_ray.telemetry.series import RUN
from dti_ray.telemetry.sinks import LINES, SeriesSink, series_tags
from dti_ray.telemetry.trackers import check_trackers, open_trackers
from dti_ray.train.board import Board, OnLine, OnText, Relay, WorkerParts
from dti_ray.train.checkpoint import list_checkpoints
from dti_ray.train.entry import ListeningTorchConfig, enter
from dti_ray.train.failures import Failure, as_error, first_cause
from dti_ray.train.identity import check_same_run, write_identity
from dti_ray.train.inputs import Inputs, anywhere, check_fits, open_inputs
from dti_ray.train.state import Progress

GO_ON = "the same command goes on from what was saved"

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


def check_launch(config: RunConfig, inputs: Inputs | None = None) -> Launch:
    """Check all that can be checked without a worker.

    Args:
        config: of the run.
        inputs: of a run with the same data, prompt and tokenizer; None opens them here.

    Raises:
        ConfigError: tokenizer, template or capacity do not fit, or a tracker's package is missing.
        InputError: the data set is not prepared, has no training targets, or the run's name is taken.
        StorageError: the root cannot be reached or written.
    """
    config = anywhere(config)
    check_trackers(config.telemetry)
    storage = Storage(config.storage.root)
    storage.check_writable()
    check_same_run(config, storage)
    inputs = inputs or open_inputs(config, storage)
    check_fits(config, inputs)
    return Launch(config, storage, inputs.dataset, inputs.table, inputs.tokenizer)


def launch(
    job: Launch, on_line: OnLine, on_text: OnText | None = None, table: ray.ObjectRef[TokenTable] | None = None
) -> Progress:
    """Run the training and return where it ended.

    Args:
        job: from `check_launch`; Ray must be running. A run that is finished is not trained again.
        on_line: called in this process with each line of metrics, as (kind, line); True ends the run, its state saved.
        on_text: called with what there is to say besides: what was restored, refused, left out. It is logged, too.
        table: the job's token table, where it lies in the object store already.

    Raises:
        RunError: workers failed more often than `train.max_failures`; what was saved is kept.
        StoppedError: SIGTERM or `on_line` ended the run; its state is kept.
    """
    if (progress := finished(job)) is not None:
        with _followed(job, on_line, on_text):  # a tracker that was away when it ended hears of it now
            return progress
    write_identity(job.config, job.storage, job.tokenizer)
    board = ray.remote(num_cpus=0)(Board).options(scheduling_strategy=this_node()).remote()
    lost: Exception | None = None
    with _followed(job, on_line, on_text) as (hear, listen), Relay(board, hear, listen):
        try:
            _trainer(job, WorkerParts(job.config, table or ray.put(job.table), board)).fit()
        except ray.train.TrainingFailedError as error:
            lost = error
    failures = ray.get(board.all_failures.remote())
    if failures or lost is not None:
        _keep_traces(job, failures, lost)
    found = list_checkpoints(job.storage, job.folder)
    progress = found[-1].progress if found else Progress()
    if progress.targets >= job.total_targets:
        return progress
    if lost is None and ray.get(board.is_stop_wanted.remote()):
        raise StoppedError(Fault(f"run {job.config.train.run}", f"stopped at step {progress.step}", hint=GO_ON))
    raise _run_error(job, failures, lost)


@contextmanager
def _followed(job: Launch, on_line: OnLine, on_text: OnText | None) -> Iterator[tuple[OnLine, OnText]]:
    """Let a run be followed on the driver: by the caller, the log, Ray's metrics, the trackers that are asked for."""
    config, storage, telemetry = job.config, job.storage, job.config.telemetry
    earlier = {kind: read_lines(storage, job.folder, kind) for kind in LINES}
    identity = storage.read(f"{job.folder}/meta.json")
    tags = series_tags(config.train.run, telemetry.group, config.data.name)
    trackers = open_trackers(config, identity, job.total_targets, earlier)
    sinks = Sinks(SeriesSink(Gauge, Counter, tags), *trackers)
    with on_driver(telemetry.log_format, config.train.run) as context, closing(sinks):
        quarantined = sum(job.dataset.quarantined.values())
        sinks.add(RUN, {"targets_planned": job.total_targets, "quarantined_rows": quarantined, "restarts": 0})

        def hear(kind: str, line: Line) -> bool | None:
            sinks.add(kind, line)
            if kind == RUN:
                return None
            context.step = int(line["step"])
            log_line(log, kind, line)
            return on_line(kind, line)

        def listen(text: str) -> None:
            log.info("%s", text)
            if on_text is not None:
                on_text(text)

        yield hear, listen


def finished(job: Launch) -> Progress | None:
    """Return where the run ended, if it did and its last state is sound."""
    found = list_checkpoints(job.storage, job.folder)
    if not found or found[-1].progress.targets < job.total_targets:
        return None
    try:
        job.storage.verify(found[-1].path, found[-1].files)
    except DamagedError as error:
        log.warning("the last state is damaged, training goes on from the one before: %s", error)
        return None
    return found[-1].progress


def _trainer(job: Launch, parts: WorkerParts) -> TorchTrainer:
    cluster = job.config.cluster
    for name in ("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", "RAY_TRAIN_COLLECTIVE_TIMEOUT_S"):
        os.environ.setdefault(name, str(cluster.collective_timeout_s))  # Ray hands them on to its controller
    return TorchTrainer(
        enter,
        train_loop_config={"parts": parts},
        scaling_config=ScalingConfig(
            num_workers=cluster.workers,
            use_gpu=cluster.gpus_per_worker > 0,
            resources_per_worker=_resources(job.config),
        ),
        torch_config=ListeningTorchConfig(
            backend="nccl" if cluster.gpus_per_worker > 0 else "gloo", timeout_s=cluster.collective_timeout_s
        ),
        run_config=RayRunConfig(
            name=job.config.train.run,
            storage_path=job.storage.path("runs"),
            storage_filesystem=job.storage.filesystem,
            failure_config=FailureConfig(max_failures=job.config.train.max_failures),
        ),
    )


def _resources(config: RunConfig) -> dict[str, float]:
    cluster = config.cluster
    gpus = {"GPU": cluster.gpus_per_worker} if cluster.gpus_per_worker > 0 else {}
    return {"CPU": cluster.cpus_per_worker, **gpus}


def _failure_file(job: Launch) -> str:
    return f"{job.folder}/failure.txt"


def _keep_traces(job: Launch, failures: Sequence[Failure], lost: Exception | None) -> None:
    """Write how workers ended, also of a run that went on: whoever wonders about a restart finds the reason there."""
    traces = [f"rank {one.rank}, attempt {one.attempt}, step {one.step}\n{one.trace}" for one in failures]
    job.storage.write(_failure_file(job), "\n".join([*traces, str(lost or "")]).encode())


def _run_error(job: Launch, failures: Sequence[Failure], lost: Exception | None) -> DtiRayError:
    """Name the first failing rank's own error, where its traceback lies, and how to go on."""
    where = job.storage.display(_failure_file(job))
    cause = first_cause(failures)
    if cause is not None:
        return as_error(cause, where)
    reason = str(lost or "its workers ended early").strip().splitlines()[-1]
    hint = GO_ON if lost is None else f"see {where}; {GO_ON}"
    return RunError(Fault(f"run {job.config.train.run}", reason, hint=hint))
