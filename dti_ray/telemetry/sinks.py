"""Where lines of metrics go: one small protocol, and the sinks that need no other package.

Stage: beside training. In: lines, as (kind, numbers by name). Out: whatever hears them.
Invariant: a sink never raises and never makes its caller wait: no run ends, and no step is longer, because of who
listens.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from dti_ray.telemetry.series import SERIES, Series

Line = dict[str, float]
LINES = ("train", "valid")  # kinds that are kept in files
REFRESH_S = 1.0  # no more than the shortest time between two reports of Ray


class Sink(Protocol):
    """Hears the lines of one run."""

    def add(self, kind: str, line: Line) -> None:
        """Hear one line."""
        ...

    def close(self) -> None:
        """Hear that there will be no more."""
        ...


class Sinks:
    """Several sinks as one.

    Args:
        sinks: hear each line in this order.
    """

    def __init__(self, *sinks: Sink) -> None:
        self.sinks = sinks

    def add(self, kind: str, line: Line) -> None:
        """See `Sink`."""
        for sink in self.sinks:
            sink.add(kind, line)

    def close(self) -> None:
        """See `Sink`."""
        for sink in self.sinks:
            sink.close()


class GaugeLike(Protocol):
    """As `ray.util.metrics.Gauge`."""

    def set(self, value: float, tags: dict[str, str]) -> None:
        """Take a new value."""
        ...


class CounterLike(Protocol):
    """As `ray.util.metrics.Counter`."""

    def inc(self, value: float, tags: dict[str, str]) -> None:
        """Add to the value."""
        ...


class SeriesSink:
    """Exports the series of a table; knows no Ray, so that whoever runs on Ray hands in what Ray has for it.

    Ray forgets a gauge that is not set again within two of its reports: until it is closed, a thread does that.

    Args:
        gauge: makes a gauge of (name, description, keys of its tags).
        counter: makes a counter of the same.
        tags: of every value, such as the run's name.
        declared: the table.
        refresh_s: between two settings.
    """

    def __init__(
        self,
        gauge: Callable[[str, str, tuple[str, ...]], GaugeLike],
        counter: Callable[[str, str, tuple[str, ...]], CounterLike],
        tags: Mapping[str, str],
        declared: Sequence[Series] = SERIES,
        refresh_s: float = REFRESH_S,
    ) -> None:
        self.tags, self.declared, self.refresh_s, keys = dict(tags), declared, refresh_s, tuple(tags)
        self.gauges = {one: gauge(one.name, one.description, keys) for one in declared if one.kind == "gauge"}
        self.counters = {one: counter(one.name, one.description, keys) for one in declared if one.kind == "counter"}
        self.newest: dict[Series, float] = {}
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._refresh, daemon=True, name="refresh gauges")
        self.thread.start()

    def add(self, kind: str, line: Line) -> None:
        """See `Sink`."""
        values = {one: line[one.key] for one in self.declared if one.line == kind and one.key in line}
        for series, value in values.items():
            if series in self.gauges:
                self.newest[series] = value
                self.gauges[series].set(value, self.tags)
            elif value > 0:  # Ray refuses to add nothing
                self.counters[series].inc(value, self.tags)

    def close(self) -> None:
        """Let the gauges be forgotten."""
        self.ended.set()
        self.thread.join()

    def _refresh(self) -> None:
        while not self.ended.wait(self.refresh_s):
            for series, value in list(self.newest.items()):
                self.gauges[series].set(value, self.tags)


def series_tags(run: str, group: str | None, dataset: str) -> dict[str, str]:
    """Return the tags of every series; Prometheus knows no difference between an empty one and none."""
    return {"run": run, "group": group or "", "dataset": dataset}
