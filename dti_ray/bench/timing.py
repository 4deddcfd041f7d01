"""Interleaved repetitions: what is compared takes turns, so that a slow moment of the machine hits all alike.

Stage: bench. In: named pieces of work. Out: seconds of each repetition.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds of one case.

    Attributes:
        steps: per step the median over the repetitions.
        repetitions: per repetition the sum over the steps.
    """

    steps: tuple[float, ...]
    repetitions: tuple[float, ...]

    @property
    def seconds(self) -> float:
        """Sum of the steps' medians."""
        return sum(self.steps)

    @property
    def spread(self) -> float:
        """(Slowest - fastest repetition) / median repetition."""
        return (max(self.repetitions) - min(self.repetitions)) / median(self.repetitions)


def interleave(
    cases: Mapping[str, Sequence[Callable[[], object]]],
    repeats: int,
    device: torch.device,
    done: Callable[[int], None] = lambda _: None,
) -> dict[str, Timing]:
    """Time some cases step by step, in turns; ahead, untimed, the first step of each runs once.

    On CUDA all steps do, since kernels are compiled for the shapes that they meet.

    Args:
        cases: for each name its steps; all have the same number.
        repeats: rounds over all steps.
        device: waited for at the end of each step.
        done: called with the number of rounds of steps that are done.
    """
    for steps in cases.values():
        for step in steps if device.type == "cuda" else steps[:1]:
            _seconds(step, device)
    times: dict[str, list[list[float]]] = {name: [[] for _ in steps] for name, steps in cases.items()}
    count = len(next(iter(cases.values())))
    for repeat in range(repeats):
        for number in range(count):
            for name, steps in cases.items():
                times[name][number].append(_seconds(steps[number], device))
            done(repeat * count + number + 1)
    return {
        name: Timing(tuple(median(step) for step in steps), tuple(map(sum, zip(*steps, strict=True))))
        for name, steps in times.items()
    }


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    started = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
