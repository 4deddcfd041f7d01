"""Whatever is wrong with a run is said on the driver, before a worker is asked for."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dti_ray.config import RunConfig, to_yaml
from dti_ray.errors import ConfigError, InputError, StorageError
from dti_ray.storage import Storage
from dti_ray.train.identity import load_run
from dti_ray.train.launch import check_launch
from tests.builders import make_config, write_dataset

LENGTHS = [30, 12, 25, 40]


def tiny_config(root: Path, *overrides: str) -> RunConfig:
    return make_config(f"storage.root={root}", "data.name=tiny", *overrides)


def test_a_good_configuration_passes_and_knows_its_targets(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path, LENGTHS)
    job = check_launch(tiny_config(tmp_path, "optim.epochs=2"))
    assert job.total_targets == 2 * dataset.targets[0]
    assert job.folder == "runs/run"


def test_data_set_that_is_not_prepared_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="dti-ray prepare"):
        check_launch(tiny_config(tmp_path))


def test_data_set_that_was_prepared_another_way_is_not_trained_on(tmp_path: Path) -> None:
    write_dataset(tmp_path, LENGTHS)  # its manifest says that it was split by user_time, and nothing else
    assert check_launch(tiny_config(tmp_path, "data.split=user_time", "data.min_interactions=7"))
    with pytest.raises(InputError) as caught:
        check_launch(tiny_config(tmp_path, "data.split=global_time"))
    assert str(caught.value) == (
        f"data.split: got 'global_time'; expected 'user_time' as in {tmp_path}/datasets/tiny; "
        "leave it out, or prepare it under another data.name"
    )


def test_row_too_small_for_one_prompt_says_the_size_that_is_enough(tmp_path: Path) -> None:
    write_dataset(tmp_path, LENGTHS)
    with pytest.raises(ConfigError, match=r"packing\.row_tokens: got 30; expected at least (\d+)") as caught:
        check_launch(tiny_config(tmp_path, "packing.row_tokens=30"))
    needed = re.search(r"at least (\d+)", str(caught.value))
    assert needed is not None
    assert check_launch(tiny_config(tmp_path, f"packing.row_tokens={needed[1]}"))


def test_row_too_small_at_inference_is_found_before_training(tmp_path: Path) -> None:
    write_dataset(tmp_path, LENGTHS)
    with pytest.raises(ConfigError, match=r"eval\.row_tokens: got 8; expected at least"):
        check_launch(tiny_config(tmp_path, "eval.row_tokens=8"))


def test_run_name_with_another_configuration_lists_what_differs(tmp_path: Path) -> None:
    write_dataset(tmp_path, LENGTHS)
    first = tiny_config(tmp_path)
    Storage(str(tmp_path)).write("runs/run/config.yaml", to_yaml(first).encode())
    assert check_launch(first)
    assert check_launch(tiny_config(tmp_path, "cluster.workers=1")), "where it runs may change"
    with pytest.raises(InputError) as caught:
        check_launch(tiny_config(tmp_path, "packing.k=3", "optim.lr=0.5"))
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("train.run=run: exists with another configuration")
    assert lines[1:] == [
        "optim.lr: got 0.5; expected 0.003 as in the stored run",
        "packing.k: got 3; expected 20 as in the stored run",
    ]


def test_root_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StorageError, match="cannot be written"):
        check_launch(tiny_config(tmp_path / "file" / "below"))


def test_template_with_an_unknown_column_lists_the_columns(tmp_path: Path) -> None:
    write_dataset(tmp_path, LENGTHS)
    with pytest.raises(ConfigError, match=r"prompt\.item_template.*\{genre\}.*title"):
        check_launch(tiny_config(tmp_path, "prompt.item_template={title} {genre}"))


def test_model_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    write_dataset(tmp_path, LENGTHS)
    with pytest.raises(ConfigError, match=r"model\.name_or_path: got '.*nowhere'"):
        check_launch(tiny_config(tmp_path, f"model.name_or_path={tmp_path}/nowhere"))


def test_unknown_run_lists_the_known_ones(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    storage.write("runs/known/config.yaml", to_yaml(tiny_config(tmp_path)).encode())
    with pytest.raises(InputError, match=r"nobody.*is no run; expected one of \['known'\]"):
        load_run(storage, "nobody")


def test_relative_root_is_made_absolute_since_workers_run_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_dataset(tmp_path / "outputs", LENGTHS)
    monkeypatch.chdir(tmp_path)
    job = check_launch(tiny_config(Path("outputs")))
    assert job.config.storage.root == str(tmp_path / "outputs")
