"""The Ray Serve application: doors that check requests, replicas that hold the model, a bounded queue between them.

Stage: serving; the one module that imports Ray Serve, beside `local`. In: a source and limits. Out: an `Application`.
Invariant: a request that finds the queue full is answered 429 at once; a health check never waits behind requests.
Importing this, and building the application, reads no model.

    client → Serve's proxy → Door (checks, OpenAPI, timeouts) → at most queue_requests wait → Replica (batches, model)
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import BackpressureConfig
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from ray.util.metrics import Counter, Gauge, Histogram

from dti_ray.config import ServeConfig, load_config
from dti_ray.errors import ConfigError, Fault
from dti_ray.serve.batches import Batches
from dti_ray.serve.bodies import Question, Refused, Scored
from dti_ray.serve.bounds import RefusalError
from dti_ray.serve.token import read_token
from dti_ray.serve.web import build_web
from dti_ray.telemetry.serving import ServingSeries

ARGUMENTS = {"model", "config", "overrides"}
DOOR_CPUS = 0.1  # it waits, most of the time
FRESH_S = 5.0  # a replica that answered so recently is ready
PROBE_S = 2.0  # one that did not is asked, for so long
START_ATTEMPTS = 3  # of a replica; what it cannot read then it will not read later
CONTROL_REQUESTS = 64  # of a door beside those that wait for the model: health checks, refusals

log = logging.getLogger(__name__)


@serve.deployment(name="replica")
class Replica:
    """Holds the model.

    Args:
        uri: see `Source`.
        root: see `Source`.
        limits: of the server.
    """

    def __init__(self, uri: str, root: str | None, limits: ServeConfig) -> None:
        from dti_ray.serve.scorer import Scorer, Source  # a door needs no torch
        from dti_ray.train.host import settle, training_device

        settle(training_device(), max(1, int(limits.cpus_per_replica)))
        source = Source(uri, root)
        self.series = _series(source.name)
        self.scorer = Scorer(source)
        self.batches = Batches(self._score, limits.batch_requests)
        if limits.reload_s is not None:
            threading.Thread(target=self._watch, args=(limits.reload_s,), daemon=True, name="watch for states").start()

    async def score(self, question: Question) -> Scored | Refused:
        """Answer one question, together with those that wait beside it."""
        return await self.batches.ask(question)

    async def state(self) -> str:
        """Return the state that answers now."""
        return self.scorer.loaded.state

    def _score(self, questions: Sequence[Question]) -> list[Scored | Refused]:
        self.series.scored(len(questions))
        return self.scorer.score(questions)

    def _watch(self, pause_s: float) -> None:
        while True:
            time.sleep(pause_s)
            is_taken = self.scorer.refresh()
            if is_taken is not None:
                self.series.reloaded(is_taken)


class Away:
    """The replicas, as a door sees them; see `Model`.

    Args:
        handle: of their deployment.
        limits: of the server.
    """

    def __init__(self, handle: DeploymentHandle, limits: ServeConfig) -> None:
        self.handle, self.limits = handle, limits
        self.newest, self.answered_s = "", -FRESH_S

    async def score(self, question: Question) -> tuple[str, list[float]]:
        """See `Model`."""
        found: Scored | Refused = await self._call("score", question)
        if isinstance(found, Refused):
            raise RefusalError(422, *found.lines)
        self._heard(found.state)
        return found.state, found.probabilities

    async def state(self) -> str:
        """See `Model`; where requests are answered all the time, no replica is asked."""
        if time.monotonic() - self.answered_s > FRESH_S:
            try:
                async with asyncio.timeout(PROBE_S):
                    self._heard(await self._call("state"))
            except TimeoutError:
                raise self._missing(f"did not answer within {PROBE_S:g} s") from None
        return self.newest

    def _heard(self, state: str) -> None:
        self.newest, self.answered_s = state, time.monotonic()

    async def _call(self, method: str, *arguments: Question) -> Any:
        response = getattr(self.handle, method).remote(*arguments)
        try:
            return await response
        except asyncio.CancelledError:  # timed out, or the client has left
            response.cancel()
            raise
        except BackPressureError:
            line = f"{self.limits.queue_requests} requests wait already; ask again in {self.limits.retry_after_s} s"
            raise RefusalError(429, line, headers=self._later()) from None
        except (DeploymentUnavailableError, RayActorError) as error:
            log.warning("no replica: %s", error)
            raise self._missing("is away") from None

    def _missing(self, problem: str) -> RefusalError:
        line = f"the model {problem}; ask again in {self.limits.retry_after_s} s"
        return RefusalError(503, line, headers=self._later())

    def _later(self) -> dict[str, str]:
        return {"Retry-After": str(self.limits.retry_after_s)}


@serve.deployment(name="door")
@serve.ingress()
class Door:
    """Checks requests and writes answers.

    Args:
        name: of what is served.
        limits: of the server.
        replicas: handle of their deployment.
    """

    def __init__(self, name: str, limits: ServeConfig, replicas: DeploymentHandle) -> None:
        self.name, self.limits, self.replicas = name, limits, replicas

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Return what answers; Serve calls this once, behind the constructor."""
        token = read_token(self.limits)
        return build_web(self.limits, Away(self.replicas, self.limits), token, _series(self.name))


def build(uri: str, root: str | None, limits: ServeConfig) -> serve.Application:
    """Return the application.

    Args:
        uri: of a run or an export; see `CtrModel.load`.
        root: storage root of a run that is given by its name.
        limits: of the server.
    """
    full = BackpressureConfig(status_code=429, retry_after_s=limits.retry_after_s)
    replicas = Replica.options(
        num_replicas=limits.replicas,
        ray_actor_options={"num_cpus": limits.cpus_per_replica, "num_gpus": limits.gpus_per_replica},
        max_ongoing_requests=2 * limits.batch_requests,  # one batch is computed, the next one comes together
        max_queued_requests=limits.queue_requests,
        graceful_shutdown_timeout_s=limits.timeout_s,
        max_constructor_retry_count=START_ATTEMPTS,
    ).bind(uri, root, limits)
    held = limits.queue_requests + 2 * limits.batch_requests * limits.replicas
    name = uri.partition("?")[0].rstrip("/").rpartition("/")[2]
    return Door.options(
        num_replicas=limits.doors,
        ray_actor_options={"num_cpus": DOOR_CPUS},
        max_ongoing_requests=held + CONTROL_REQUESTS,
        max_queued_requests=held + CONTROL_REQUESTS,
        backpressure_config=full,
        graceful_shutdown_timeout_s=limits.timeout_s,
    ).bind(name, limits, replicas)


def app(arguments: Mapping[str, Any]) -> serve.Application:
    """Build the application as a Serve configuration names it: `import_path: dti_ray.serve.app:app`.

    Args:
        arguments: `model` (a run's name below storage.root, or a URI), `config` (YAML files), `overrides`.

    Raises:
        ConfigError: the arguments or the configuration cannot be used.
    """
    unknown = sorted(arguments.keys() - ARGUMENTS)
    if unknown or not isinstance(arguments.get("model"), str):
        problem = f"got {unknown[0]!r}" if unknown else "`model` is missing"
        raise ConfigError(Fault("args", problem, f"{', '.join(sorted(ARGUMENTS))}; model is a text"))
    config = load_config(arguments.get("config", ()), arguments.get("overrides", ()))
    return build(*place_of(arguments["model"], config.storage.root), config.serve)


def place_of(model: str, root: str) -> tuple[str, str | None]:
    """Return (uri, root): a bare name is a run below the root, anything else says itself where it lies."""
    return (model, None) if "/" in model else (model, root)


def _series(run: str) -> ServingSeries:
    return ServingSeries(
        lambda name, text, keys: Counter(name, text, keys),
        lambda name, text, keys: Gauge(name, text, keys),
        lambda name, text, bounds, keys: Histogram(name, text, list(bounds), keys),
        run,
    )
