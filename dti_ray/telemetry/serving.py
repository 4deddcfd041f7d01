"""What a server tells of itself while it serves: the series of `SERVING`.

Stage: beside serving. In: requests, batches, reloads. Out: values of counters, histograms and a gauge.
Invariant: knows no Ray; whoever runs on Ray hands in what Ray has for them. Tags take few values, whatever is asked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from dti_ray.telemetry.series import SERVING, Series
from dti_ray.telemetry.sinks import CounterLike, GaugeLike

TAGS = {"dti_serve_requests": ("run", "route", "status"), "dti_serve_latency_seconds": ("run", "route")}


class HistogramLike(Protocol):
    """As `ray.util.metrics.Histogram`."""

    def observe(self, value: float, tags: dict[str, str]) -> None:
        """Take a value."""
        ...


class ServingSeries:
    """Exports the series of a server.

    Args:
        counter: makes a counter of (name, description, keys of its tags).
        gauge: makes a gauge of the same.
        histogram: makes a histogram of (name, description, bounds of its buckets, keys of its tags).
        run: name of what is served; the tag of every value.
    """

    def __init__(
        self,
        counter: Callable[[str, str, tuple[str, ...]], CounterLike],
        gauge: Callable[[str, str, tuple[str, ...]], GaugeLike],
        histogram: Callable[[str, str, tuple[float, ...], tuple[str, ...]], HistogramLike],
        run: str,
    ) -> None:
        self.tags = {"run": run}
        self.waiting = 0
        self.counters = {one.name: counter(one.name, one.description, _keys(one)) for one in _of("counter")}
        self.gauges = {one.name: gauge(one.name, one.description, _keys(one)) for one in _of("gauge")}
        self.histograms = {
            one.name: histogram(one.name, one.description, one.bounds, _keys(one)) for one in _of("histogram")
        }

    def arrived(self) -> None:
        """Count a request that waits for its answer."""
        self._wait(1)

    def answered(self, route: str, status: int, seconds: float) -> None:
        """Count an answer.

        Args:
            route: one of the server's own.
            status: of the answer.
            seconds: since it arrived.
        """
        self._wait(-1)
        place = {**self.tags, "route": route}
        self.counters["dti_serve_requests"].inc(1, {**place, "status": str(status)})
        self.histograms["dti_serve_latency_seconds"].observe(seconds, place)

    def scored(self, requests: int) -> None:
        """Count a batch."""
        self.histograms["dti_serve_batch_requests"].observe(requests, self.tags)

    def reloaded(self, is_taken: bool) -> None:
        """Count a newer state."""
        self.counters["dti_serve_reloads" if is_taken else "dti_serve_failed_reloads"].inc(1, self.tags)

    def _wait(self, more: int) -> None:
        self.waiting += more
        self.gauges["dti_serve_waiting_requests"].set(self.waiting, self.tags)


def _of(kind: str) -> tuple[Series, ...]:
    return tuple(one for one in SERVING if one.kind == kind)


def _keys(series: Series) -> tuple[str, ...]:
    return TAGS.get(series.name, ("run",))
