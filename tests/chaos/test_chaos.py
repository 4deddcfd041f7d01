"""The short form: one fault, once; `make chaos` runs all of them several times and writes the table."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.chaos import stage as stages
from tests.chaos.rows import ROWS
from tests.chaos.stage import Stage

SHORT = ["SIGKILL of a worker during upload"]

pytestmark = [pytest.mark.chaos, pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with stages.stage() as built:
        yield built


@pytest.mark.parametrize("name", SHORT)
def test_run_survives_and_its_losses_are_those_of_an_undisturbed_one(stage: Stage, name: str) -> None:
    outcome = ROWS[name](stage, 0)
    assert outcome.is_good, outcome
