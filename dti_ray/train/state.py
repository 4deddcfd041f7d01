"""What a run must remember to go on, in pieces that no number of workers is built into.

Stage: state; below the engine. In: each rank's share of weights and optimizer. Out: bytes in safetensors, and back.
Invariant: a piece is a stretch of one flattened parameter, named by kind, parameter and start. The pieces of all
ranks cover every parameter exactly once, so any other division over ranks can be cut from them.

    weight "head" of 6 numbers on 2 ranks:   rank 0 holds weight:0:head [4], rank 1 weight:4:head [2]
    on 3 ranks, rank 1 reads numbers 2, 3:   from the first piece
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from dti_ray.data.plan import Position
from dti_ray.errors import DamagedError, Fault

WEIGHT = "weight"
SHAPES = "shapes"


@dataclass(frozen=True)
class Progress:
    """How far a run has come.

    Attributes:
        step: optimizer steps done.
        targets: targets trained, all ranks, all epochs.
        tokens: tokens trained.
        seconds: time spent in the loop, restarts included.
        position: where the data stands.
        validated: targets trained at the last validation.
        valid_auc: of this very state; None where it was not validated.
        loss: mean loss of the last line of metrics; None before the first.
        skipped: steps left out because their loss or gradient was not finite.
    """

    step: int = 0
    targets: int = 0
    tokens: int = 0
    seconds: float = 0.0
    position: Position = field(default_factory=Position)
    validated: int = 0
    valid_auc: float | None = None
    loss: float | None = None
    skipped: int = 0


@dataclass(frozen=True)
class Piece:
    """A stretch of one parameter and of its optimizer state.

    Attributes:
        name: of the parameter.
        start: number of the stretch's first element in the flattened parameter.
        values: by kind: `weight`, and what the optimizer keeps: flat stretches in fp32, or single numbers.
    """

    name: str
    start: int
    values: Mapping[str, Tensor]


@dataclass(frozen=True)
class EngineState:
    """One rank's share of the state, on the CPU.

    Attributes:
        shapes: of all trained parameters.
        pieces: of this rank.
    """

    shapes: Mapping[str, tuple[int, ...]]
    pieces: Sequence[Piece]

    def weights(self) -> bytes:
        """Return this rank's weights as a safetensors file."""
        return self._file({WEIGHT})

    def moments(self) -> bytes:
        """Return this rank's optimizer state as a safetensors file."""
        return self._file({kind for piece in self.pieces for kind in piece.values} - {WEIGHT})

    def _file(self, kinds: set[str]) -> bytes:
        named = {
            f"{kind}:{piece.start}:{piece.name}": values
            for piece in self.pieces
            for kind, values in piece.values.items()
            if kind in kinds
        }
        return save(named, metadata={SHAPES: json.dumps(self.shapes)})


class StateFiles:
    """Reads stretches of parameters out of the files of all ranks, whatever their number was.

    Args:
        files: local copies, verified.

    Raises:
        DamagedError: a file is not a state's.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self.stack = ExitStack()
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.found: dict[tuple[str, str], list[tuple[int, int, Any, str]]] = {}
        for path in files:
            file = self.stack.enter_context(safe_open(path, framework="pt"))
            self.shapes.update({name: tuple(shape) for name, shape in json.loads(file.metadata()[SHAPES]).items()})
            for key in file.keys():  # noqa: SIM118 - it is no mapping
                kind, start, name = key.split(":", 2)
                size = file.get_slice(key).get_shape()
                entry = (int(start), size[0] if size else 0, file, key)
                self.found.setdefault((kind, name), []).append(entry)

    def __enter__(self) -> StateFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def kinds(self, name: str) -> list[str]:
        """Return what is kept of a parameter."""
        return [kind for kind, parameter in self.found if parameter == name]

    def read(self, kind: str, name: str, start: int, size: int) -> Tensor:
        """Return a stretch of a parameter, or the single number that holds for all of it.

        Raises:
            DamagedError: the pieces do not cover it.
        """
        pieces = self.found.get((kind, name), [])
        if pieces and pieces[0][1] == 0:
            return pieces[0][2].get_tensor(pieces[0][3])
        values, covered = torch.empty(size), 0
        for first, length, file, key in pieces:
            begin, end = max(start, first), min(start + size, first + length)
            if begin < end:
                values[begin - start : end - start] = file.get_slice(key)[begin - first : end - first]
                covered += end - begin
        if covered != size:
            raise DamagedError(Fault(f"{kind} of {name}", f"{covered} numbers are stored", f"{size} from {start} on"))
        return values

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield all weights in their shapes."""
        for name, shape in self.shapes.items():
            yield name, self.read(WEIGHT, name, 0, torch.Size(shape).numel()).reshape(shape)
