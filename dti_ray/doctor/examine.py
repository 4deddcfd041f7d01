"""All checks of a configuration, in the order in which a run would meet what they look at.

Stage: between the checks and the command line. In: a `RunConfig`. Out: groups of `Check`s.
Invariant: each look has a time limit; slow ones run beside each other. A check that needs what another could not get is
a skip that says so: one cause is one failure.
"""

from __future__ import annotations

import os
import platform
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dti_ray.config import RunConfig, StorageConfig
from dti_ray.doctor import resources
from dti_ray.doctor.check import (
    Check,
    Group,
    Look,
    Status,
    answer,
    check,
    check_all,
    passed,
    result,
    skipped,
    warned,
)
from dti_ray.doctor.dataset import look_at_dataset
from dti_ray.doctor.devices import Seat, check_seats, seat, skip_all
from dti_ray.doctor.host import Demand, Host, check_disks, check_open_files, check_shared_memory
from dti_ray.doctor.joined import Cluster, Request, ask_cluster
from dti_ray.doctor.machine import Machine, Question, ask, disk_of
from dti_ray.doctor.packages import check_installation, check_python, check_same_versions, versions
from dti_ray.doctor.place import check_clock, check_reach, folder_of, marker, reach, with_endpoint
from dti_ray.storage import Storage, absolute

if TYPE_CHECKING:  # importing PyTorch is part of a look: it may fail
    from dti_ray.data.interactions import Dataset
    from dti_ray.doctor.model import Words

QUICK_S, STORAGE_S, DATASET_S, MODEL_S = 20.0, 15.0, 30.0, 60.0
MACHINE_S, NODE_S, CLUSTER_S, ESTIMATE_S = 120.0, 120.0, 180.0, 60.0
GROUP_S = 120.0
IMPORT_S, SLOW_IMPORT_S = 300.0, 60.0
NO_CLUSTER = "left out by --no-cluster"
NO_ROOT = "the storage root cannot be used"


@dataclass(frozen=True)
class Known:
    """What the checks of data and model found for those after them."""

    dataset: Dataset | None = None
    words: Words | None = None
    state_bytes: int | None = None


def examine(config: RunConfig, with_cluster: bool = True) -> list[Group]:
    """Look at everything that a run of this configuration needs.

    Args:
        config: of the run.
        with_cluster: join the cluster that the run would join, and ask its nodes.
    """
    config = config.model_copy(update={"storage": StorageConfig(root=absolute(config.storage.root))})
    address = resources.address_of(config.cluster, os.environ) if with_cluster else None
    knock = _knock(config, address) if with_cluster else skipped("ray address", NO_CLUSTER)
    asks_gpus = config.cluster.gpus_per_worker > 0 and address is None
    asking = Look(lambda: ask(Question(with_gpus=asks_gpus), MACHINE_S))
    importing = Look(_import)
    storage = _storage(config)
    is_usable = storage[0].status is not Status.FAIL
    joining = Look(lambda: _join(config, address, knock, is_usable))
    imports = result("imports", importing, IMPORT_S)
    data, known = _data(config, is_usable, imports.status is not Status.FAIL)
    here = result("machine", asking, MACHINE_S)
    cluster = result("cluster", joining, CLUSTER_S)
    return [
        Group("environment", (*_environment(config), imports)),
        Group("storage", tuple(storage)),
        Group("data and model", tuple(data)),
        Group("Ray", (knock, *(_sure("cluster", lambda: _ray(config, here, cluster)) if with_cluster else ()))),
        Group("machines", tuple(_sure("machine", lambda: _machines(config, here, cluster, known, with_cluster)))),
        Group("GPUs", tuple(_sure("gpus", lambda: _gpus(config, here, cluster, known, with_cluster)))),
    ]


def _sure(name: str, function: Callable[[], list[Check]]) -> list[Check]:
    """Return the checks of a group, or the one that says why there are none."""
    found = result(name, Look(function), GROUP_S)
    return [found] if isinstance(found, Check) else found


def _knock(config: RunConfig, address: str | None) -> Check:
    is_configured = config.cluster.address is not None
    return check("ray address", QUICK_S, lambda: resources.check_address(address, is_configured))


def _environment(config: RunConfig) -> list[Check]:
    functions: dict[str, Callable[[], Check]] = {
        "python": lambda: check_python(platform.python_version()),
        "packages": lambda: check_installation(config),
    }
    return check_all(QUICK_S, functions)


def _import() -> Check:
    """Import what the checks of the model need; from a fresh image or a slow disk that takes its time."""
    start = time.monotonic()
    from dti_ray.doctor import model

    seconds = time.monotonic() - start
    found = f"{', '.join(model.IMPORTED)} in {seconds:.0f} s"
    if seconds > SLOW_IMPORT_S:
        return warned(
            "imports", found, "every worker waits as long: put the packages on a faster disk, or free its CPUs"
        )
    return passed("imports", found)


def _storage(config: RunConfig) -> list[Check]:
    root = config.storage.root
    found = result("storage", Look(lambda: reach(root)), STORAGE_S)
    if isinstance(found, Check):
        return [
            with_endpoint(root, found, os.environ),
            skipped("clock", "no file could be written to compare clocks by"),
        ]
    return [check_reach(root, found), check_clock(found.skew_s)]


def _data(config: RunConfig, is_root_usable: bool, is_imported: bool) -> tuple[list[Check], Known]:
    """Look at data set, tokenizer, model and run, each with what those before it brought."""

    def tokenizer() -> tuple[Check, Words | None]:
        from dti_ray.doctor.model import look_at_tokenizer

        return look_at_tokenizer(config, dataset)

    def model(words: Words) -> tuple[Check, int | None]:
        from dti_ray.doctor.model import look_at_model

        return look_at_model(config, dataset, words)

    def run() -> Check:
        from dti_ray.doctor.model import look_at_run

        return look_at_run(config)

    dataset: Dataset | None = None
    state_bytes: int | None = None
    of_dataset, of_run = skipped("data set", NO_ROOT), skipped("run", NO_ROOT)
    if is_root_usable:
        of_dataset, dataset = answer("data set", Look(lambda: look_at_dataset(config)), DATASET_S)
    if not is_imported:
        rest = [skipped(name, "see imports") for name in ("tokenizer", "model", "run")]
        return [of_dataset, *rest], Known(dataset)
    of_tokenizer, words = answer("tokenizer", Look(tokenizer), MODEL_S)
    of_model = skipped("model", "its vocabulary comes from the tokenizer")
    if words is not None:
        of_model, state_bytes = answer("model", Look(lambda: model(words)), MODEL_S)
    if is_root_usable:
        of_run = check("run", STORAGE_S, run)
    return [of_dataset, of_tokenizer, of_model, of_run], Known(dataset, words, state_bytes)


def _join(config: RunConfig, address: str | None, knock: Check, is_root_usable: bool) -> Cluster | Check | None:
    """Join the cluster, if there is one to join, and ask each node for what the run needs there."""
    if address is None:
        return None
    if knock.status is Status.FAIL:
        return skipped("cluster", "its address cannot be used")
    root, name = config.storage.root, config.model.name_or_path
    folder = None if name is None else Path(name).expanduser().resolve()
    paths = [] if folder is None or not folder.is_dir() else [str(folder)]
    with ExitStack() as stack:
        is_shared = folder_of(root) is None
        if is_root_usable and not is_shared:
            paths.append(stack.enter_context(marker(Storage(root))))
        asked = root if is_root_usable and is_shared else None
        question = Question(config.cluster.gpus_per_worker > 0, asked, tuple(paths))
        try:
            return ask_cluster(Request(config.cluster.address, question, NODE_S), CLUSTER_S)
        except (RuntimeError, TimeoutError) as error:
            return resources.check_joined(address, error)


def _ray(config: RunConfig, here: Machine | Check, cluster: Cluster | Check | None) -> list[Check]:
    if isinstance(cluster, Check):
        return [cluster, skipped("resources", "no cluster was joined")]
    if cluster is None:
        if isinstance(here, Check):
            return [skipped("resources", "this machine did not answer")]
        return [check("resources", QUICK_S, lambda: resources.check_this_machine(config.cluster, here))]
    there = [node.machine for node in cluster.nodes if node.machine is not None]
    sizes, ours = [node.resources for node in cluster.nodes], versions(platform.python_version())
    functions: dict[str, Callable[[], Check]] = {
        "cluster": lambda: resources.check_nodes(cluster),
        "node versions": lambda: check_same_versions(ours, {one.host: one.versions for one in there}),
        "node storage": lambda: resources.check_reach(there),
        "resources": lambda: resources.check_resources(config.cluster, sizes, cluster.is_autoscaled),
    }
    return check_all(QUICK_S, functions)


def _hosts(
    config: RunConfig, here: Machine | Check, cluster: Cluster | Check | None, workers_here: int, kept: Demand | None
) -> list[Host]:
    """Return the machines that a run would use, as far as they answered."""
    if isinstance(cluster, Cluster):
        return [
            Host(
                node.machine, int(node.resources.get("object_store_memory", 0)), runs_ray=True,
                workers=min(config.cluster.workers, resources.places(config.cluster, node.resources)),
                kept=kept if node.machine.host == socket.gethostname() else None,
            )
            for node in cluster.nodes
            if node.machine is not None
        ]  # fmt: skip
    if isinstance(here, Check) or isinstance(cluster, Check):
        return []
    store_bytes = config.cluster.object_store_mb * 2**20
    return [Host(here, store_bytes, runs_ray=False, workers=workers_here, kept=kept)]


def _machines(
    config: RunConfig, here: Machine | Check, cluster: Cluster | Check | None, known: Known, with_cluster: bool
) -> list[Check]:
    # Without a cluster to look at, this machine need not be one that trains: it may be the head's pod.
    workers_here = config.cluster.workers if with_cluster else 0
    hosts = _hosts(config, here, cluster, workers_here, _kept(config, known))
    if not hosts:
        return [here if isinstance(here, Check) else skipped("machine", "no node of the cluster answered")]
    functions: dict[str, Callable[[], Check]] = {
        "shared memory": lambda: check_shared_memory(hosts, config.cluster.gpus_per_worker > 0),
        "open files": lambda: check_open_files(hosts),
        "disk": lambda: check_disks(hosts, known.state_bytes),
    }
    return check_all(QUICK_S, functions)


def _kept(config: RunConfig, known: Known) -> Demand | None:
    """Return what the run's states will take below a root that is a folder; one more than stay, while it is written."""
    folder = folder_of(config.storage.root)
    if known.state_bytes is None or folder is None:
        return None
    states = config.checkpoint.keep_last + config.checkpoint.keep_best + 1
    return Demand(disk_of(folder), states * known.state_bytes, f"{states} states that are kept")


def _gpus(
    config: RunConfig, here: Machine | Check, cluster: Cluster | Check | None, known: Known, with_cluster: bool
) -> list[Check]:
    wanted = config.cluster.workers * config.cluster.gpus_per_worker
    if not wanted:
        return [skipped("gpus", "the configuration asks for none (cluster.gpus_per_worker is 0)")]
    if isinstance(cluster, Check) or isinstance(here, Check):
        return skip_all("no machine with GPUs answered")
    if cluster is None:
        assert here.cuda is not None, "without a cluster, this machine is asked"
        if not with_cluster and not here.cuda.is_attached:
            return skip_all("this machine has none, and those of a cluster are left out by --no-cluster")
        # Here may be one node of several: only a Ray of this machine's own must find all GPUs on it.
        seats = [seat(here, wanted if with_cluster else 1)]
    else:
        nodes = resources.gpu_nodes(cluster.nodes)
        seats = [seat(node.machine, node.resources["GPU"]) for node in nodes if node.machine is not None]
    if not seats:
        return skip_all("no node with GPUs is there now")
    return check_seats(config, seats, *_memory(config, seats, known))


def _memory(config: RunConfig, seats: Sequence[Seat], known: Known) -> tuple[int | None, str]:
    """Return the bytes that a worker takes on its GPU, or why they are not known."""
    dataset, words = known.dataset, known.words
    if dataset is None or words is None:
        return None, "what a worker takes is measured on the data set, which is not there"
    if not any(one.cuda.devices for one in seats):
        return None, "there is none to compare with"

    def estimated() -> int:
        from dti_ray.doctor.model import memory_of_worker

        return memory_of_worker(config, dataset, words)

    found = result("gpu memory", Look(estimated), ESTIMATE_S)
    return (None, f"no estimate: {found.found}") if isinstance(found, Check) else (found, "")
