"""Pieces that any number of ranks wrote are read by any other number."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dti_ray.errors import DamagedError, RunError
from dti_ray.train.shards import Held, fill, held_whole, snapshot
from dti_ray.train.state import EngineState, Piece, StateFiles

SHAPES = {"a.weight": (3, 4), "b": (5,), "c:d": (2, 3)}


def cut(world: int) -> list[list[tuple[str, int, int]]]:
    """Deal the flat row of all parameters to ranks as ZeRO does; return (name, start, size) of each rank."""
    sizes = {name: torch.Size(shape).numel() for name, shape in SHAPES.items()}
    share = -(-sum(sizes.values()) // world)
    ranks = []
    for rank in range(world):
        mine, first = [], 0
        for name, size in sizes.items():
            begin, end = max(rank * share, first), min((rank + 1) * share, first + size)
            if begin < end:
                mine.append((name, begin - first, end - begin))
            first += size
        ranks.append(mine)
    return ranks


def write(folder: Path, world: int, values: dict[str, torch.Tensor]) -> list[Path]:
    paths = []
    for rank, mine in enumerate(cut(world)):
        pieces = [
            Piece(
                name, start,
                {"weight": values[name].view(-1)[start : start + size],
                 "exp_avg": 2 * values[name].view(-1)[start : start + size], "step": torch.tensor(7.0)},
            )
            for name, start, size in mine
        ]  # fmt: skip
        state = EngineState(SHAPES, pieces)
        for kind, content in (("weights", state.weights()), ("moments", state.moments())):
            paths.append(folder / f"{kind}-{rank}")
            paths[-1].write_bytes(content)
    return paths


@settings(max_examples=20, deadline=None)
@given(before=st.integers(1, 6), after=st.integers(1, 6))
def test_any_number_of_ranks_reads_what_any_other_wrote(
    before: int, after: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    values = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    with StateFiles(write(tmp_path_factory.mktemp("state"), before, values)) as files:
        assert all(torch.equal(weight, values[name]) for name, weight in files.weights())
        for mine in cut(after):
            for name, start, size in mine:
                expected = values[name].view(-1)[start : start + size]
                assert torch.equal(files.read("weight", name, start, size), expected)
                assert torch.equal(files.read("exp_avg", name, start, size), 2 * expected)
                assert files.read("step", name, start, size) == 7


def test_missing_stretch_is_refused(tmp_path: Path) -> None:
    paths = write(tmp_path, 3, {name: torch.randn(shape) for name, shape in SHAPES.items()})
    with StateFiles(paths[:2]) as files, pytest.raises(DamagedError, match=r"weight of .*numbers are stored"):
        dict(files.weights())


def test_optimizer_goes_on_where_another_stood(tmp_path: Path) -> None:
    def steps(parameters: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer, first: int) -> None:
        for step in range(first, first + 3):
            for parameter in parameters.values():
                parameter.grad = torch.full_like(parameter, 0.1 * step) + parameter.detach()
            optimizer.step()

    def fresh() -> tuple[dict[str, torch.nn.Parameter], torch.optim.Optimizer]:
        parameters = {name: torch.nn.Parameter(torch.ones(shape)) for name, shape in SHAPES.items()}
        return parameters, torch.optim.AdamW(parameters.values(), lr=0.1)

    one, its_optimizer = fresh()
    steps(one, its_optimizer, 1)
    state = snapshot(held_whole(one), its_optimizer.state, one)
    for kind, content in (("weights", state.weights()), ("moments", state.moments())):
        (tmp_path / kind).write_bytes(content)
    steps(one, its_optimizer, 4)
    other, its_optimizer = fresh()
    with StateFiles(tmp_path.iterdir()) as files:
        fill(held_whole(other), its_optimizer.state, files)
    steps(other, its_optimizer, 4)
    assert all(torch.equal(one[name], other[name]) for name in SHAPES)


def test_empty_parameter_is_refused() -> None:
    empty = torch.nn.Parameter(torch.zeros(0, 4))
    with pytest.raises(RunError, match=r"1 weights are empty, lora_A first"):
        snapshot([Held("lora_A", 0, 0, empty, 0)], {}, {"lora_A": empty})
