"""An evaluation on two Ray workers equals that of one process, also where a worker is killed on the way."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyarrow import parquet as pq

from dti_ray.config import RunConfig
from dti_ray.data.interactions import open_dataset
from dti_ray.data.prompts import TokenTable
from dti_ray.errors import ConfigError, RunError
from dti_ray.infer import units
from dti_ray.infer.evaluate import OnProgress, Plan, evaluate_run, plan_evaluation
from dti_ray.infer.outcome import Evaluation
from dti_ray.infer.workers import evaluate_on_workers
from dti_ray.storage import Storage
from dti_ray.train.tokens import tokenizer_and_table
from tests.processes import living
from tests.scoring import write_run

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.usefixtures("ray_cluster"),
    # 2026-11, ray 2.60: of two pipelines in one process, Ray opens a log file twice and closes it once.
    pytest.mark.filterwarnings("ignore:unclosed file .*ray-data:ResourceWarning"),
]

USERS = [2000] * 10  # a unit each, which takes some tenths of a second


@pytest.fixture(autouse=True)
def _small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "UNIT_TOKENS", 1)  # one segment each


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return write_run(tmp_path, "packing.k=20", "model.layers=4", "eval.bootstrap=100", lengths=USERS)


def with_cluster(config: RunConfig, **changes: float) -> RunConfig:
    return config.model_copy(update={"cluster": config.cluster.model_copy(update=changes)})


def planned(config: RunConfig) -> tuple[Plan, TokenTable]:
    storage = Storage(config.storage.root)
    table = tokenizer_and_table(config, storage, open_dataset(storage, config.data.name))[1]
    return plan_evaluation(config, storage, table, "test"), table


def on_workers(config: RunConfig, on_progress: OnProgress = lambda _done, _total: None) -> Evaluation:
    plan, table = planned(config)
    return evaluate_on_workers(plan, table, on_progress)


def predictions(config: RunConfig) -> dict[str, list[Any]]:
    return pq.read_table(f"{config.storage.root}/runs/run/metrics/predictions_test.parquet").to_pydict()


def kill_workers(count: int) -> None:
    """Kill some processes that score."""
    for process in islice(living("MapWorker"), count):
        process.kill()


def test_two_workers_give_the_predictions_of_one_process_also_when_one_of_them_is_killed(config: RunConfig) -> None:
    plan, table = planned(config)
    assert len(plan.units) == len(USERS)
    evaluate_run(config, plan.dataset.storage, table, "test", lambda _done, _total: None)
    expected = predictions(config)
    told: list[tuple[int, int]] = []

    def kill_one_on_the_way(done: int, total: int) -> None:
        told.append((done, total))
        if len(told) == 2:
            kill_workers(1)

    evaluation = on_workers(with_cluster(config, workers=2), kill_one_on_the_way)
    found = predictions(config)
    assert found.keys() == expected.keys()
    for name in ("user_id", "position", "label"):
        assert found[name] == expected[name]
    for name in ("probability", "probability_streaming"):
        np.testing.assert_allclose(found[name], expected[name], atol=1e-6)
    targets = plan.dataset.targets[2]
    assert told == [(part * targets // len(USERS), targets) for part in range(1, len(USERS) + 1)]
    assert evaluation.metrics.targets == targets


def test_workers_that_keep_dying_end_it_in_words(config: RunConfig) -> None:
    impatient = config.model_copy(update={"train": config.train.model_copy(update={"max_failures": 0})})
    with pytest.raises(
        RunError, match=r"evaluation of run: workers died 1 times, train\.max_failures allows 0; see Ray"
    ) as e:
        on_workers(impatient, lambda _done, _total: kill_workers(1))
    assert "\n" not in str(e.value)


def test_workers_that_no_node_can_hold_are_refused_and_not_waited_for(config: RunConfig) -> None:
    with pytest.raises(ConfigError, match=r"cluster: no node has 1 CPUs and 1 GPUs for a worker; .*per_worker=0 comp"):
        on_workers(with_cluster(config, gpus_per_worker=1))
