"""Log records that say of which run, rank and step they are.

Stage: beside training. In: a format. Out: every record with `run`, `rank` and `step`, as text or as one JSON object.
Invariant: a record is written to a process's stderr once.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Literal

from dti_ray.telemetry.sinks import Line

Format = Literal["text", "json"]

PACKAGE = "dti_ray"
TEXT = "%(asctime)s %(levelname)s %(name)s [run=%(run)s rank=%(rank)s step=%(step)s] %(message)s"


class Context(logging.Filter):
    """Writes on each record that passes where this process stands.

    Args:
        run: name of the run.
        rank: of this worker; None on the driver.

    Attributes:
        step: newest optimizer step that this process has heard of; None before the first.
    """

    def __init__(self, run: str, rank: int | None) -> None:
        super().__init__()
        self.run, self.rank = run, rank
        self.step: int | None = None

    def filter(self, record: logging.LogRecord) -> bool:
        """Let every record pass, with its place on it."""
        record.run, record.rank, record.step = self.run, self.rank, self.step
        return True


class JsonFormatter(logging.Formatter):
    """One object a line: time, level, logger, run, rank, step, message, and the numbers of a line of metrics."""

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter`."""
        fields: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            **{name: getattr(record, name, None) for name in ("run", "rank", "step")},
            "message": record.getMessage(),
        }
        if (metrics := getattr(record, "metrics", None)) is not None:
            fields["metrics"] = metrics
        if record.exc_info:
            fields["trace"] = self.formatException(record.exc_info)
        return json.dumps(fields)


@contextmanager
def on_driver(form: Format, run: str) -> Iterator[Context]:
    """Have this package's records written to stderr: as text only warnings, as JSON all that there is to say."""
    log, before = logging.getLogger(PACKAGE), logging.getLogger(PACKAGE).level
    context = Context(run, None)
    handler = _attach(form, context, logging.INFO if form == "json" else logging.WARNING)
    try:
        yield context
    finally:
        log.removeHandler(handler)
        log.setLevel(before)


def in_worker(form: Format, run: str, rank: int) -> Context:
    """Have this package's records written to the worker's stderr, and with their place to Ray Train's log file.

    Ray Train's own console handler prints bare messages: it leaves these records to ours.
    """
    context = Context(run, rank)
    _attach(form, context, logging.INFO)
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.addFilter(lambda record: not record.name.startswith(PACKAGE))
    return context


def log_line(log: logging.Logger, kind: str, line: Line) -> None:
    """Log one line of metrics, as text and as numbers."""
    text = ", ".join(f"{name} {value:.6g}" for name, value in line.items())
    log.info("%s: %s", kind, text, extra={"metrics": line})


def _attach(form: Format, context: Context, level: int) -> logging.Handler:
    log, handler = logging.getLogger(PACKAGE), logging.StreamHandler()
    handler.setLevel(level)
    handler.setFormatter(JsonFormatter() if form == "json" else logging.Formatter(TEXT))
    handler.addFilter(context)
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    return handler
