"""A job scores by the model that it chose, or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from dti_ray.config import RunConfig, config_hash, with_values
from dti_ray.errors import InputError, RunError
from dti_ray.export import export_run
from dti_ray.score.model import choose
from dti_ray.storage import Storage
from tests.scoring import write_run
from tests.serving import damage_state, write_state


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return write_run(tmp_path)


def test_the_best_state_is_loaded_as_long_as_it_is_the_best(config: RunConfig) -> None:
    storage = Storage(config.storage.root)
    chosen = choose(config, storage)
    assert chosen.identity.keys() == {"run", "checkpoint", "config_hash", "sha256"}
    assert chosen.identity["config_hash"] == config_hash(config)
    assert chosen.load("cpu").origin == chosen.origin
    newer = write_state(config, step=2, seed=5)
    with pytest.raises(RunError, match=f"best state of run run: is {newer} by now; expected step-00000001-test"):
        chosen.load("cpu")
    damage_state(config, newer)
    assert choose(config, storage) == chosen
    assert chosen.load("cpu").origin == chosen.origin


def test_an_export_is_loaded_as_long_as_nobody_writes_it_anew(config: RunConfig, tmp_path: Path) -> None:
    storage, uri = Storage(config.storage.root), str(tmp_path / "exported")
    export_run(config, storage, uri)
    of_export = with_values(config, {"score.model": uri})
    chosen = choose(of_export, storage)
    assert chosen.identity.keys() == {"export", "run", "checkpoint", "config_hash", "sha256"}
    assert chosen.identity["run"] == config.train.run
    assert chosen.load("cpu").origin == chosen.origin
    export_run(config, storage, uri, calibrate=True)
    assert choose(of_export, storage).origin.checkpoint == chosen.origin.checkpoint
    with pytest.raises(RunError, match=r"exported: is step-00000001-test/.* by now"):
        chosen.load("cpu")


def test_a_folder_of_something_else_is_no_export(config: RunConfig) -> None:
    storage = Storage(config.storage.root)
    with pytest.raises(InputError, match=r"tiny: has no config\.yaml; expected an export that can score"):
        choose(with_values(config, {"score.model": f"{config.storage.root}/datasets/tiny"}), storage)
