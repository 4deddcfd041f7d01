"""A server on this machine, or on the cluster that is named, until it is told to end.

Stage: serving. In: a source and a configuration. Out: an address that answers; nothing is left when it ends.
Invariant: what can be known before is checked before Ray is started; SIGINT and SIGTERM end it alike: what
replicas have taken is answered first.
"""

from __future__ import annotations

import logging
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

import ray
from ray import serve
from ray.serve.exceptions import RayServeException
from ray.serve.schema import LoggingConfig

from dti_ray.cluster import connect
from dti_ray.config import RunConfig, ServeConfig
from dti_ray.errors import ConfigError, Fault, RunError
from dti_ray.serve.app import build
from dti_ray.serve.token import read_token

APPLICATION = "dti-ray"
SLACK_S = 5.0  # after which Serve's proxy gives up a request that a door still holds, as while its body comes
SIGNALS = (signal.SIGINT, signal.SIGTERM)


def check(limits: ServeConfig) -> None:
    """Refuse what would fail later.

    Raises:
        ConfigError: the address is taken or not of this machine, or the token cannot be used.
    """
    read_token(limits)
    try:
        found = socket.getaddrinfo(limits.host, limits.port, type=socket.SOCK_STREAM)
        with socket.socket(found[0][0], socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(found[0][4])
    except OSError as error:
        problem = f"{limits.host}:{limits.port} cannot be listened on ({error.strerror})"
        raise ConfigError(Fault("serve.port", problem, "a free port", "name another one by --port")) from None


def serve_until_told(uri: str, root: str | None, config: RunConfig, is_up: Callable[[str], None]) -> float:
    """Serve until SIGINT or SIGTERM.

    Args:
        uri: of a run or an export; see `CtrModel.load`.
        root: storage root of a run that is given by its name.
        config: its `serve` and `cluster` sections are read.
        is_up: hears the server's address once it answers.

    Returns:
        Seconds for which it answered.

    Raises:
        RunError: the application did not come up, or failed.
    """
    before = {number: signal.getsignal(number) for number in SIGNALS}
    limits, started, is_asked = config.serve, None, False
    asked = {"workers": limits.replicas, "cpus_per_worker": limits.cpus_per_replica, "data_cpus": limits.doors}
    try:
        _on_signals(_tell)
        connect(config.cluster.model_copy(update=asked))
        _on_signals(_tell)  # Ray has put its own there
        is_asked = True
        start(uri, root, limits)
        started = time.monotonic()
        is_up(f"http://{limits.host}:{limits.port}")
        while True:
            signal.pause()
    except _Told:
        return 0.0 if started is None else time.monotonic() - started
    except RuntimeError as error:
        problem = f"did not come up: {' '.join(str(error).split())[:300]}"
        raise RunError(Fault("serve", problem, hint="Ray Serve's logs below /tmp/ray say more")) from None
    finally:
        _on_signals(signal.SIG_IGN)  # it is ending
        if is_asked:
            with suppress(RayServeException, TimeoutError):  # it did not come up, or does not end in a minute
                serve.delete(APPLICATION)  # once replicas have answered what they took
        ray.shutdown()  # a cluster of our own ends as a whole
        for number, handler in before.items():
            signal.signal(number, handler)


def start(uri: str, root: str | None, limits: ServeConfig) -> None:
    """Start Serve on the cluster of this process, and the application; returns once it answers.

    Raises:
        RuntimeError: it does not come up.
    """
    quiet = LoggingConfig(enable_access_log=False)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # of this process
    serve.start(
        proxy_location="HeadOnly",
        http_options={"host": limits.host, "port": limits.port, "request_timeout_s": limits.timeout_s + SLACK_S},
        logging_config=quiet,
    )
    serve.run(build(uri, root, limits), name=APPLICATION, route_prefix="/", logging_config=quiet)


class _Told(BaseException):
    """The process was told to end."""


def _tell(_number: int, _frame: FrameType | None) -> None:
    raise _Told


def _on_signals(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> None:
    for number in SIGNALS:
        signal.signal(number, handler)
