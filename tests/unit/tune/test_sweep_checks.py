from __future__ import annotations

import pytest

from dti_ray.config import RunConfig, TuneConfig
from dti_ray.errors import ConfigError
from dti_ray.tune.checks import concurrency
from tests.builders import make_config

SMALL, LARGE, GPUS = {"CPU": 2.0}, {"CPU": 16.0}, {"CPU": 16.0, "GPU": 8.0}


def asking(*overrides: str, at_once: int = 9) -> RunConfig:
    config = make_config("packing.streams=24", "optim.targets_per_step=24", *overrides)
    return config.model_copy(update={"tune": TuneConfig(max_concurrent=at_once)})


@pytest.mark.parametrize(
    ("overrides", "nodes", "expected"),
    [
        (["cluster.workers=1"], [SMALL], 1),
        (["cluster.workers=1"], [LARGE], 8),
        (["cluster.workers=2", "cluster.cpus_per_worker=2"], [LARGE], 3),  # 5 CPUs each: one is for packing
        (["cluster.workers=2", "cluster.gpus_per_worker=4"], [GPUS, GPUS], 2),
        (["cluster.workers=2", "cluster.gpus_per_worker=0.5"], [GPUS], 5),
        (["cluster.workers=16", "cluster.gpus_per_worker=1", "packing.streams=16"], [GPUS, GPUS, LARGE], 1),
    ],
)
def test_as_many_trials_train_at_once_as_the_nodes_hold(
    overrides: list[str], nodes: list[dict[str, float]], expected: int
) -> None:
    assert concurrency(asking(*overrides), nodes) == expected
    assert concurrency(asking(*overrides, at_once=1), nodes) == 1


@pytest.mark.parametrize(
    ("overrides", "nodes", "told"),
    [
        (
            ["cluster.workers=1", "cluster.gpus_per_worker=2"], [{"CPU": 9.0, "GPU": 1.0}] * 2,
            "1 workers with 1 CPUs and 2 GPUs each; expected at most 0, as the cluster's nodes have "
            "9 CPUs and 1 GPUs, 9 CPUs and 1 GPUs",
        ),
        (["cluster.workers=4"], [SMALL], "4 workers with 1 CPUs each; expected at most 2"),
        (["cluster.workers=2"], [SMALL], "a trial needs 3 CPUs: those of its workers, and one for packing"),
    ],
)  # fmt: skip
def test_trial_that_no_node_can_hold_is_refused_with_both_numbers(
    overrides: list[str], nodes: list[dict[str, float]], told: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        concurrency(asking(*overrides), nodes)
    assert told in str(caught.value)


def test_population_that_could_only_train_one_by_one_is_refused() -> None:
    config = asking("cluster.workers=1")
    config = config.model_copy(update={"tune": config.tune.model_copy(update={"scheduler": "pbt"})})
    assert concurrency(config, [LARGE]) == 8
    with pytest.raises(ConfigError, match="the cluster holds one"):
        concurrency(config, [SMALL])
