"""Versions are held against requirement strings, extras of requirements included."""

from __future__ import annotations

import pytest

from dti_ray.config import load_config
from dti_ray.doctor.check import Status
from dti_ray.doctor.packages import (
    Installed,
    check_installation,
    check_packages,
    check_python,
    check_same_versions,
    extras_of,
    installed_here,
    versions,
)

RAY = Installed("2.60.0", ("click", "aiohttp>=3.9; extra == 'default'", "gpustat; extra == 'observability'"))
WORLD = {"ray": RAY, "click": Installed("8.1"), "torch": Installed("2.13.0+cpu"), "numpy": Installed("2.4.6")}


def test_this_environment_is_as_its_own_metadata_asks() -> None:
    assert check_installation(load_config()).status is Status.PASS
    assert check_python(versions("3.11.7")["python"]).status is Status.PASS


def test_versions_in_range_pass_and_are_told() -> None:
    found = check_packages(["torch>=2.11,<2.14", "numpy>=2.0"], (), WORLD.get)
    assert (found.status, found.found) == (Status.PASS, "2 as asked: ray 2.60.0, torch 2.13.0+cpu")


def test_version_out_of_range_and_missing_package_are_named_with_the_command() -> None:
    found = check_packages(["torch>=2.14", "peft>=0.21,<1", "numpy"], (), WORLD.get)
    assert found.status is Status.FAIL
    assert found.found == "2.13.0+cpu for torch>=2.14; peft<1,>=0.21 is missing"
    assert found.advice == "pip install 'torch>=2.14' 'peft<1,>=0.21'"


def test_what_an_extra_of_a_requirement_brings_must_be_there() -> None:
    assert check_packages(["ray>=2.60"], (), WORLD.get).status is Status.PASS
    found = check_packages(["ray[default]>=2.60"], (), WORLD.get)
    assert found.found == "aiohttp>=3.9 is missing"
    assert check_packages(["ray[default]"], (), {**WORLD, "aiohttp": Installed("3.14")}.get).status is Status.PASS


def test_own_extras_count_where_the_configuration_uses_them() -> None:
    requirements = ["numpy", "gguf>=0.17; extra == 'gguf'", "nothing; python_version < '3'"]
    assert check_packages(requirements, (), WORLD.get).status is Status.PASS
    assert check_packages(requirements, ["gguf"], WORLD.get).found == "gguf>=0.17 is missing"


@pytest.mark.parametrize(
    ("overrides", "extras"),
    [
        ([], set()),
        (["model.name_or_path=x", "model.gguf_file=x.gguf"], {"gguf"}),
        (["model.liger=true", "telemetry.mlflow=http://mlflow:5000"], {"liger", "mlflow"}),
    ],
)
def test_extras_follow_from_the_configuration(overrides: list[str], extras: set[str]) -> None:
    assert extras_of(load_config([], overrides)) == extras


def test_python_out_of_range_fails() -> None:
    world = {"dti-ray": Installed("0.1.0", (), ">=3.11")}
    assert check_python("3.12.1", world.get).status is Status.PASS
    found = check_python("3.10.4", world.get)
    assert (found.status, found.found) == (Status.FAIL, "3.10.4, asked for is >=3.11")


def test_sources_without_an_installation_are_a_warning() -> None:
    assert check_installation(load_config(), {}.get).status is Status.WARN
    assert check_python("3.12.1", {}.get).found == "3.12.1"


def test_package_that_is_not_installed_is_none() -> None:
    assert installed_here("surely-not-installed-anywhere") is None


def test_builds_of_one_version_are_the_same() -> None:
    here, there = {"ray": "2.60.0", "torch": "2.13.0+cpu"}, {"ray": "2.60.0", "torch": "2.13.0+cu130"}
    assert check_same_versions(here, {"a": there, "b": here}).status is Status.PASS


def test_node_with_another_ray_fails_and_with_another_numpy_warns() -> None:
    here = {"python": "3.11.7", "ray": "2.60.0", "numpy": "2.4.6"}
    grave = check_same_versions(here, {"a": here, "b": {**here, "ray": "2.61.0"}})
    assert (grave.status, grave.found) == (Status.FAIL, "ray 2.60.0 here, 2.61.0 on b")
    mild = check_same_versions(here, {"a": {**here, "numpy": "2.3.0"}, "b": {"python": "3.11.7", "ray": "2.60.0"}})
    assert (mild.status, mild.found) == (Status.WARN, "numpy 2.4.6 here, 2.3.0 on a, none on b")
