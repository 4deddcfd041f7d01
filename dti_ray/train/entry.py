"""How a worker begins: what its process does before anything of ours is imported there.

Stage: between launch and worker. In: `WorkerParts` from the driver. Out: a call of `worker.train_worker`.
Invariant: Ray's controller unpickles all of this and runs none of it, so nothing but Ray's own part of torch is
imported here; the model's libraries, which take seconds, are left to the workers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ray.train.torch import TorchConfig

from dti_ray.train.host import hear_sigterm

if TYPE_CHECKING:
    from dti_ray.train.board import WorkerParts


def enter(job: dict[str, WorkerParts]) -> None:
    """Train in this process; what Ray Train runs in every worker."""
    from dti_ray.train.worker import train_worker

    train_worker(job["parts"])


class _ListeningBackend(TorchConfig().backend_cls):
    """Sets up torch's process group, and hears SIGTERM, which only a process's main thread can."""

    def on_start(self, worker_group, backend_config) -> None:
        """Set up the workers before they train."""
        super().on_start(worker_group, backend_config)
        worker_group.execute(hear_sigterm)


class ListeningTorchConfig(TorchConfig):
    """Torch under Ray Train, with workers that take SIGTERM as notice."""

    @property
    def backend_cls(self) -> type[_ListeningBackend]:
        """What sets the workers up."""
        return _ListeningBackend
