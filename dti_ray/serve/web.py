"""The door: what may be asked over HTTP, who may ask, and how every refusal is told.

Stage: serving. In: requests. Out: answers as JSON, an OpenAPI page. Knows neither torch nor Ray.
Invariant: whatever a client sends, it is answered 2xx or 4xx within bounds of size and time, and a refusal names what
was expected; 5xx tells that the server is at fault: no model (503), no answer in time (504), or a defect (500).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any, Protocol

from fastapi import Depends, FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from dti_ray import __version__
from dti_ray.config import ServeConfig
from dti_ray.serve.bodies import (
    MalformedError,
    Problem,
    Question,
    RankAnswer,
    RankRequest,
    ScoreAnswer,
    ScoreRequest,
    Status,
    answer_rank,
    answer_score,
    make_bodies,
    openapi_schemas,
    parse,
)
from dti_ray.serve.bounds import ROUTES, Bounded, Counted, RefusalError, as_json, problem
from dti_ray.serve.token import is_right
from dti_ray.telemetry.serving import ServingSeries

REFUSALS = {
    400: "the body is not JSON",
    401: "the token is missing or wrong",
    413: "the request is too large",
    422: "the request asks for nothing that can be answered, or names unknown items",
    429: "more requests wait than may; ask again after Retry-After seconds",
    503: "no model is loaded",
    504: "the model did not answer in time",
}

log = logging.getLogger(__name__)


class Model(Protocol):
    """What answers; its methods raise a `RefusalError` where they cannot."""

    async def score(self, question: Question) -> tuple[str, list[float]]:
        """Return (state of the model, probability per candidate)."""
        ...

    async def state(self) -> str:
        """Return the state that answers now."""
        ...


def build_web(limits: ServeConfig, model: Model, token: bytes | None, series: ServingSeries) -> FastAPI:
    """Return the server's ASGI application.

    Args:
        limits: of requests.
        model: answers.
        token: that clients must show; None: they need none.
        series: counts.
    """
    app = FastAPI(title="dti_ray", version=__version__, redoc_url=None, openapi_url="/openapi.json")
    bodies, guard = make_bodies(limits), [] if token is None else [Depends(_guard(token))]

    @app.post("/v1/score", dependencies=guard, response_model=ScoreAnswer, **_documented("ScoreRequest"))
    async def score(request: Request) -> Response:
        """Return each candidate's probability of a click."""
        _, state, probabilities = await _ask(bodies.score, request, model, limits.timeout_s)
        return as_json(answer_score(state, probabilities))

    @app.post("/v1/rank", dependencies=guard, response_model=RankAnswer, **_documented("RankRequest"))
    async def rank(request: Request) -> Response:
        """Return the k likeliest candidates, likeliest first."""
        asked, state, probabilities = await _ask(bodies.rank, request, model, limits.timeout_s)
        assert isinstance(asked, RankRequest)
        return as_json(answer_rank(asked, state, probabilities))

    @app.get("/healthz", response_model=Status)
    async def healthz() -> Response:
        """Say that this process lives."""
        return as_json(Status(status="alive"))

    @app.get("/readyz", response_model=Status, responses=_refusals(503))
    async def readyz() -> Response:
        """Say which state answers, once there is one."""
        return as_json(Status(status="ready", state=await model.state()))

    _tell_refusals(app)
    app.openapi = lambda: _openapi(app, openapi_schemas(bodies))  # type: ignore[method-assign]
    app.add_middleware(Bounded, most_bytes=limits.max_body_bytes)
    app.add_middleware(Counted, series=series)
    return app


async def _ask(
    body: type[ScoreRequest], request: Request, model: Model, timeout_s: float
) -> tuple[ScoreRequest, str, list[float]]:
    """Return the request that a body holds, the state that answered, and its probabilities."""
    try:
        asked = parse(body, await request.body())
    except MalformedError as error:
        raise RefusalError(422 if error.is_json else 400, *error.lines) from None
    try:
        async with asyncio.timeout(timeout_s):
            state, probabilities = await model.score(asked.question())
    except TimeoutError:
        line = f"no answer within {timeout_s:g} s; ask for fewer candidates, or later"
        raise RefusalError(504, line) from None
    return asked, state, probabilities


def _guard(token: bytes) -> Any:
    """Return a dependency that refuses whoever does not show the token."""
    scheme = HTTPBearer(auto_error=False)

    async def check(given: HTTPAuthorizationCredentials | None = Depends(scheme)) -> None:  # noqa: B008 - FastAPI's way
        if given is None or not is_right(token, given.credentials):
            found = "is missing" if given is None else "is wrong"
            line = f"Authorization: the token {found}; expected `Authorization: Bearer TOKEN`"
            raise RefusalError(401, line, headers={"WWW-Authenticate": "Bearer"})

    return check


def _tell_refusals(app: FastAPI) -> None:
    """Tell every refusal in one form."""

    @app.exception_handler(RefusalError)
    async def refused(_request: Request, error: RefusalError) -> Response:
        return problem(error)

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        lines = {
            404: f"there is no such page; expected one of {', '.join(ROUTES)}",
            405: f"got {request.method}; expected {ROUTES.get(request.scope['path'], 'another method')}",
        }
        line = lines.get(error.status_code, str(error.detail))
        return problem(RefusalError(error.status_code, line, headers=error.headers))

    @app.exception_handler(ClientDisconnect)
    async def left(_request: Request, _error: ClientDisconnect) -> Response:
        return problem(RefusalError(400, "body: ended early; expected as many bytes as Content-Length says"))

    @app.exception_handler(Exception)
    async def failed(_request: Request, error: Exception) -> Response:
        log.error("a request failed", exc_info=error)
        return problem(RefusalError(500, "the server failed; its log says why"))


def _documented(body: str) -> dict[str, Any]:
    """Return what OpenAPI says of a route whose body is read by our own schema."""
    schema = {"$ref": f"#/components/schemas/{body}"}
    content = {"required": True, "content": {"application/json": {"schema": schema}}}
    return {"responses": _refusals(*REFUSALS), "openapi_extra": {"requestBody": content}}


def _refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": Problem, "description": REFUSALS[status]} for status in statuses}


def _openapi(app: FastAPI, requests: Mapping[str, Any]) -> dict[str, Any]:
    """Return the description of all routes, the requests' schemas with their limits included."""
    if app.openapi_schema is None:
        described = get_openapi(title=app.title, version=app.version, routes=app.routes)
        described["components"]["schemas"] |= requests
        app.openapi_schema = described
    return app.openapi_schema
