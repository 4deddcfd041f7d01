"""What holds for every request, whatever it asks for: it is counted, its size is bounded, a refusal has one form.

Stage: serving, around the routes. In: ASGI. Out: ASGI. Knows neither torch nor Ray.
Invariant: no more of a body is read than may be; each request is counted once, under one of few routes.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from pydantic import BaseModel
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dti_ray.serve.bodies import Problem, shortened
from dti_ray.telemetry.serving import ServingSeries

ROUTES = {
    "/v1/score": "POST", "/v1/rank": "POST", "/healthz": "GET", "/readyz": "GET", "/docs": "GET", "/openapi.json": "GET"
}  # fmt: skip
OTHER = "other"  # a path that there is not, for whoever counts


class RefusalError(Exception):
    """An answer that is none.

    Args:
        status: of HTTP.
        lines: why, and what was expected.
        headers: beside the usual ones.
    """

    def __init__(self, status: int, *lines: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(*lines)
        self.status, self.lines, self.headers = status, lines, dict(headers or {})


class Counted:
    """Counts requests and the time that they take, whatever becomes of them.

    Args:
        app: that answers.
        series: counts.
    """

    def __init__(self, app: ASGIApp, series: ServingSeries) -> None:
        self.app, self.series = app, series

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), 499  # as it stays where the client left

        async def observed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self.series.arrived()
        try:
            await self.app(scope, receive, observed)
        except Exception:
            status = 500
            raise
        finally:
            route = scope["path"] if scope["path"] in ROUTES else OTHER
            self.series.answered(route, status, time.perf_counter() - started)


class Bounded:
    """Refuses a body that is too large as soon as that is known, and reads no more of it.

    Args:
        app: that answers.
        most_bytes: of a body.
    """

    def __init__(self, app: ASGIApp, most_bytes: int) -> None:
        self.app, self.most_bytes = app, most_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        stated = dict(scope["headers"]).get(b"content-length", b"0")
        if stated.isdigit() and int(stated) > self.most_bytes:
            await problem(self._refusal(f"{int(stated):,}"))(scope, receive, send)
            return
        size = 0

        async def counted() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self.most_bytes:
                raise self._refusal(f"more than {self.most_bytes:,}")
            return message

        await self.app(scope, counted, send)

    def _refusal(self, got: str) -> RefusalError:
        return RefusalError(413, f"body: has {got} bytes; expected at most {self.most_bytes:,}")


def problem(error: RefusalError) -> Response:
    """Return a refusal as it is told."""
    return as_json(Problem(errors=shortened(error.lines)), error.status, error.headers)


def as_json(answer: BaseModel, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return an answer of HTTP."""
    return Response(answer.model_dump_json(), status, headers, "application/json")
