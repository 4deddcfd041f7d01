"""Whatever is sent to the door gets an answer that says what was expected, and never a 5xx."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import numpy as np
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from starlette.testclient import TestClient

from dti_ray import CtrModel, Text
from dti_ray.config import ServeConfig
from dti_ray.serve.scorer import Scorer, Source
from tests.scoring import write_run
from tests.serving import BODY, CANDIDATES, LIMITS, WRONG_BODIES, Here, Kept, Slow, kept_series, make_web

TOKEN = "a-secret-of-ours"
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from([*BODY, "item", "label", "text", "k"]), inner),
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    config = write_run(tmp_path_factory.mktemp("served"))
    return Source(config.train.run, config.storage.root)


@pytest.fixture(scope="module")
def scorer(source: Source) -> Scorer:
    return Scorer(source, "cpu")


@pytest.fixture
def client(scorer: Scorer) -> Iterator[TestClient]:
    with TestClient(make_web(Here(scorer))) as client:
        yield client


def test_scores_are_those_of_the_library(client: TestClient, source: Source) -> None:
    model = CtrModel.load(source.uri, "cpu", source.root)
    history = [("03", 1), (Text("film 9"), 0), ("21", 1)]
    expected = model.score(history, ["01", "02", Text("word05 of film 5"), "05"])
    answer = client.post("/v1/score", json=BODY)
    assert answer.status_code == 200
    assert answer.json() == {"state": "step-00000001-test", "probabilities": expected.tolist()}


def test_a_ranking_is_the_scores_in_order(client: TestClient) -> None:
    scores = np.array(client.post("/v1/score", json=BODY).json()["probabilities"])
    found = client.post("/v1/rank", json={**BODY, "k": 3}).json()["ranking"]
    order = np.argsort(-scores, kind="stable")[:3].tolist()
    assert [one["index"] for one in found] == order
    assert [one["item"] for one in found] == [CANDIDATES[index] for index in order]
    assert [one["probability"] for one in found] == scores[order].tolist()
    assert len(client.post("/v1/rank", json=BODY).json()["ranking"]) == len(CANDIDATES)


@pytest.mark.parametrize("path", ["/v1/score", "/v1/rank"])
@pytest.mark.parametrize("name", WRONG_BODIES)
def test_a_wrong_body_is_refused_with_what_was_expected(client: TestClient, path: str, name: str) -> None:
    body, said = WRONG_BODIES[name]
    answer = client.post(path, content=body)
    assert 400 <= answer.status_code < 500
    assert answer.headers["content-type"] == "application/json"
    assert said in " ".join(answer.json()["errors"])


def test_a_body_without_a_stated_size_is_read_no_further_than_it_may(client: TestClient) -> None:
    answer = client.post("/v1/score", content=iter([b" " * 2**16] * 64))
    assert answer.status_code == 413
    assert "expected at most 1,048,576" in answer.json()["errors"][0]


def test_many_faults_are_told_in_few_lines(client: TestClient) -> None:
    lines = client.post("/v1/score", json={**BODY, "candidates": list(range(500))}).json()["errors"]
    assert len(lines) == 11
    assert lines[-1] == "... and 490 more faults"
    unknown = client.post("/v1/score", json={**BODY, "candidates": [f"{number:0200}" for number in range(10)]})
    assert all(len(line) < 500 for line in unknown.json()["errors"])


@given(body=JSON)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_json_is_answered_2xx_or_4xx(client: TestClient, body: object) -> None:
    for path in ("/v1/score", "/v1/rank"):
        assert client.post(path, content=json.dumps(body).encode()).status_code < 500


@given(body=st.binary())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_answered_2xx_or_4xx(client: TestClient, body: bytes) -> None:
    assert 400 <= client.post("/v1/score", content=body).status_code < 500


def test_wrong_methods_and_paths_name_the_right_ones(client: TestClient) -> None:
    wrong = client.get("/v1/score")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
    assert wrong.json() == {"errors": ["got GET; expected POST"]}
    missing = client.get("/v2/score")
    assert missing.status_code == 404
    assert "/v1/score" in missing.json()["errors"][0]


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ({}, "is missing"),
        ({"Authorization": TOKEN}, "is missing"),
        ({"Authorization": f"Basic {TOKEN}"}, "is missing"),
        ({"Authorization": "Bearer wrong"}, "is wrong"),
        ({"Authorization": f"Bearer {TOKEN}x"}, "is wrong"),
        ({"Authorization": "Bearer \xff\xfe".encode("latin-1")}, "is wrong"),
    ],
)
def test_whoever_shows_no_right_token_is_refused(scorer: Scorer, header: dict[str, str], said: str) -> None:
    with TestClient(make_web(Here(scorer), token=TOKEN.encode())) as client:
        answer = client.post("/v1/score", json=BODY, headers=header)
        assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
        (line,) = answer.json()["errors"]
        assert said in line
        assert "Bearer TOKEN" in line
        assert TOKEN not in answer.text
        right = client.post("/v1/score", json=BODY, headers={"Authorization": f"Bearer {TOKEN}"})
        assert right.status_code == 200
        assert client.get("/healthz").status_code == client.get("/readyz").status_code == 200


def test_health_and_readiness(client: TestClient) -> None:
    assert client.get("/healthz").json() == {"status": "alive", "state": None}
    assert client.get("/readyz").json() == {"status": "ready", "state": "step-00000001-test"}


def test_an_answer_that_takes_too_long_is_given_up(scorer: Scorer) -> None:
    with TestClient(make_web(Slow(scorer), ServeConfig(timeout_s=0.05))) as client:
        answer = client.post("/v1/score", json=BODY)
    assert answer.status_code == 504
    assert "no answer within 0.05 s" in answer.json()["errors"][0]


def test_users_without_a_history_are_scored_where_the_configuration_says_so(scorer: Scorer) -> None:
    with TestClient(make_web(Here(scorer), ServeConfig(min_history=0))) as client:
        assert client.post("/v1/score", json={**BODY, "history": []}).status_code == 200


def test_openapi_names_schemas_limits_and_refusals(client: TestClient) -> None:
    described = client.get("/openapi.json").json()
    schemas = described["components"]["schemas"]
    for path, name in (("/v1/score", "ScoreRequest"), ("/v1/rank", "RankRequest")):
        post = described["paths"][path]["post"]
        assert post["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith(f"/{name}")
        assert {"200", "400", "401", "413", "422", "429", "503", "504"} <= set(post["responses"])
        assert schemas[name]["properties"]["candidates"]["maxItems"] == LIMITS.max_candidates
    named = set(re.findall(r"#/components/schemas/(\w+)", json.dumps(described)))
    assert named <= set(schemas)
    assert "swagger" in client.get("/docs").text


def test_every_request_is_counted_once_under_few_routes(scorer: Scorer) -> None:
    series = kept_series()
    with TestClient(make_web(Here(scorer), series=series)) as client:
        for path, body in (
            ("/v1/score", json.dumps(BODY)),
            ("/v1/score", "{"),
            ("/nope", ""),
            ("/v1/rank", " " * 2**21),
        ):
            client.post(path, content=body.encode())
    requests, waiting = series.counters["dti_serve_requests"], series.gauges["dti_serve_waiting_requests"]
    assert isinstance(requests, Kept)
    assert isinstance(waiting, Kept)
    assert [(tags["route"], tags["status"]) for _, tags in requests.values] == [
        ("/v1/score", "200"), ("/v1/score", "400"), ("other", "404"), ("/v1/rank", "413"),
    ]  # fmt: skip
    assert [value for value, _ in waiting.values] == [1, 0] * 4


@pytest.mark.slow
def test_schemathesis_finds_no_server_error_in_its_own_openapi(scorer: Scorer) -> None:
    schema = schemathesis.openapi.from_asgi("/openapi.json", make_web(Here(scorer), ServeConfig(max_candidates=20)))
    tried: set[str] = set()
    for operation in schema.get_all_operations():
        strategy = operation.ok().as_strategy()

        @given(case=strategy)
        @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
        def holds(case: schemathesis.Case) -> None:
            tried.add(case.path)
            case.call_and_validate(checks=[not_a_server_error])

        holds()
    assert tried == {"/v1/score", "/v1/rank", "/healthz", "/readyz"}
