"""A model behind Ray Serve: right answers, refusals, a full queue, a newer state, all of it over a real socket."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import aiohttp
import numpy as np
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error

from dti_ray import CtrModel, Text
from dti_ray.config import RunConfig, ServeConfig
from tests.scoring import write_run
from tests.serving import BODY, CANDIDATES, WRONG_BODIES, free_port, write_state

pytestmark = [pytest.mark.integration, pytest.mark.slow]

TOKEN = "a-secret-of-ours"
HEADERS = {"Authorization": f"Bearer {TOKEN}"}
PATIENCE_S = 30


@dataclass(frozen=True)
class Server:
    url: str
    config: RunConfig

    def post(self, path: str = "/v1/score", **rest: Any) -> requests.Response:
        return requests.post(self.url + path, timeout=PATIENCE_S, **({"headers": HEADERS} | rest))


@pytest.fixture(scope="module")
def server(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    from ray import serve

    from dti_ray.serve.local import start

    folder = tmp_path_factory.mktemp("served")
    config = write_run(folder)
    (folder / "token").write_text(TOKEN)
    limits = ServeConfig(
        port=free_port(), batch_requests=2, queue_requests=4, reload_s=0.5, max_text=200,
        token_file=str(folder / "token"), timeout_s=20, cpus_per_replica=1,
    )  # fmt: skip
    try:
        start(config.train.run, config.storage.root, limits)
        yield Server(f"http://127.0.0.1:{limits.port}", config)
    finally:
        serve.shutdown()


def test_answers_are_those_of_the_library(server: Server) -> None:
    model = CtrModel.load(server.config.train.run, "cpu", server.config.storage.root)
    expected = model.score([("03", 1), (Text("film 9"), 0), ("21", 1)], ["01", "02", Text("word05 of film 5"), "05"])
    assert requests.get(f"{server.url}/readyz", timeout=PATIENCE_S).json()["state"] == "step-00000001-test"
    assert np.allclose(server.post(json=BODY).json()["probabilities"], expected, atol=1e-6)
    best = server.post("/v1/rank", json={**BODY, "k": 1}).json()["ranking"]
    assert [one["item"] for one in best] == [CANDIDATES[int(expected.argmax())]]


def test_wrong_requests_are_refused_with_what_was_expected(server: Server) -> None:
    for name, (body, said) in WRONG_BODIES.items():
        answer = server.post(data=body)
        assert 400 <= answer.status_code < 500, name
        assert said in " ".join(answer.json()["errors"]), name
    assert server.post(json=BODY, headers={}).status_code == 401
    assert server.post(json=BODY, headers={"Authorization": "Bearer wrong"}).status_code == 401
    assert server.post(data=iter([b" " * 2**20] * 3)).status_code == 413
    assert requests.put(f"{server.url}/v1/score", timeout=PATIENCE_S).status_code == 405
    assert requests.get(f"{server.url}/nope", timeout=PATIENCE_S).status_code == 404


def test_up_to_the_limit_nobody_is_refused_and_above_it_somebody_is_told_to_come_later(server: Server) -> None:
    large = {**BODY, "candidates": ["01", "02", "05", "07"] * 100}

    async def flood(clients: int, each: int) -> list[tuple[int, str | None]]:
        async def ask(session: aiohttp.ClientSession) -> list[tuple[int, str | None]]:
            found = []
            for _ in range(each):
                async with session.post(f"{server.url}/v1/score", json=large, headers=HEADERS) as answer:
                    found.append((answer.status, answer.headers.get("Retry-After")))
                    await answer.read()
            return found

        async with aiohttp.ClientSession() as session:
            return [one for found in await asyncio.gather(*(ask(session) for _ in range(clients))) for one in found]

    below = Counter(status for status, _ in asyncio.run(flood(clients=4, each=5)))
    assert below == {200: 20}
    above = asyncio.run(flood(clients=48, each=2))
    assert {status for status, _ in above} == {200, 429}
    assert {later for status, later in above if status == 429} == {"1"}
    assert server.post(json=BODY).status_code == 200


def test_a_newer_state_is_taken_while_requests_come_and_none_fails(server: Server) -> None:
    before = server.post(json=BODY).json()
    answers: list[requests.Response] = []
    is_over = threading.Event()

    def ask() -> None:
        with requests.Session() as session:
            while not is_over.is_set():
                answers.append(session.post(f"{server.url}/v1/score", json=BODY, headers=HEADERS, timeout=PATIENCE_S))

    asking = threading.Thread(target=ask)
    asking.start()
    state = write_state(server.config, step=2, seed=5)
    for _ in range(10 * PATIENCE_S):
        if answers and answers[-1].json().get("state") == state:
            break
        is_over.wait(0.1)
    is_over.set()
    asking.join()
    after = server.post(json=BODY).json()
    assert (before["state"], after["state"]) == ("step-00000001-test", state)
    assert not np.allclose(before["probabilities"], after["probabilities"], atol=1e-3)
    assert {answer.status_code for answer in answers} == {200}
    for answer in answers:
        found = answer.json()
        whole = before if found["state"] == before["state"] else after
        assert np.allclose(found["probabilities"], whole["probabilities"], atol=1e-6)


def test_schemathesis_finds_no_server_error(server: Server) -> None:
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    for operation in schema.get_all_operations():

        @given(case=operation.ok().as_strategy())
        @settings(max_examples=40, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        def holds(case: schemathesis.Case) -> None:
            case.call_and_validate(checks=[not_a_server_error], headers=HEADERS)

        holds()
    assert requests.get(f"{server.url}/healthz", timeout=PATIENCE_S).json()["status"] == "alive"


def test_every_series_of_serving_is_at_the_nodes_endpoint(server: Server) -> None:
    """Ray's processes report every 10 s; a reload that fails is not made to happen here."""
    import time

    from dti_ray.telemetry.series import SERVING
    from tests.ray_nodes import samples

    write_state(server.config, step=3, seed=7)
    expected = {series.exported for series in SERVING} - {"ray_dti_serve_failed_reloads_total"}
    found: set[str] = set()
    end = time.monotonic() + 60
    while expected - found and time.monotonic() < end:
        server.post(json=BODY)
        time.sleep(1)
        found |= {sample.name for sample in samples() if sample.labels.get("run") == server.config.train.run}
    assert expected - found == set()
