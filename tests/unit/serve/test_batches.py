"""Questions that wait together are answered together, each by its own answer."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import pytest

from dti_ray.serve.batches import Batches


class Doubler:
    """Doubles numbers once it may, and remembers which came together."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.may = threading.Event()

    def __call__(self, numbers: Sequence[int]) -> list[int]:
        self.batches.append(list(numbers))
        assert self.may.wait(10)
        if -1 in numbers:
            raise ValueError("no number")
        return [2 * number for number in numbers]


def test_what_comes_while_one_batch_is_computed_is_the_next_one() -> None:
    async def ask() -> list[int]:
        doubler = Doubler()
        batches = Batches(doubler, most=4)
        first = asyncio.create_task(batches.ask(0))
        while not doubler.batches:
            await asyncio.sleep(0.001)
        rest = [asyncio.create_task(batches.ask(number)) for number in range(1, 7)]
        await asyncio.sleep(0)
        doubler.may.set()
        found = await asyncio.gather(first, *rest)
        assert doubler.batches == [[0], [1, 2, 3, 4], [5, 6]]
        return found

    assert asyncio.run(ask()) == [0, 2, 4, 6, 8, 10, 12]


def test_whoever_has_left_is_not_computed() -> None:
    async def ask() -> list[list[int]]:
        doubler = Doubler()
        batches = Batches(doubler, most=4)
        first = asyncio.create_task(batches.ask(0))
        while not doubler.batches:
            await asyncio.sleep(0.001)
        left, stays = asyncio.create_task(batches.ask(1)), asyncio.create_task(batches.ask(2))
        await asyncio.sleep(0)
        left.cancel()
        first.cancel()
        doubler.may.set()
        assert await stays == 4
        return doubler.batches

    assert asyncio.run(ask()) == [[0], [2]]


def test_an_error_reaches_all_of_its_batch_and_no_other() -> None:
    async def ask() -> int:
        doubler = Doubler()
        doubler.may.set()
        batches = Batches(doubler, most=4)
        bad = [asyncio.create_task(batches.ask(number)) for number in (-1, 1)]
        for task in bad:
            with pytest.raises(ValueError, match="no number"):
                await task
        return await batches.ask(3)

    assert asyncio.run(ask()) == 6
