"""Where each optimizer keeps which stretch of which parameter, for every stage of ZeRO.

Stage: beside the engine; imports no DeepSpeed, knows its optimizers by what they hold. In: trained parameters and
the optimizer around them. Out: `Held` stretches; from them an `EngineState`, and an `EngineState` back into them.
Invariant: over all ranks the stretches cover every parameter exactly once; padding is never stored.

    ZeRO 1 on 2 ranks, parameters a of 5 numbers and b of 3 in one flat group of 8:
    rank 0 holds a[0:4] at 0       rank 1 holds a[4:5] at 0 and b[0:3] at 1
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dti_ray.errors import Fault, RunError
from dti_ray.train.state import WEIGHT, EngineState, Piece, StateFiles

Kept = MutableMapping[Any, dict[str, Any]]  # an optimizer's state, by the tensor that it updates


@dataclass(frozen=True)
class Held:
    """A stretch of a parameter: `flat[offset : offset + size]` in fp32.

    Attributes:
        name: of the parameter.
        start: number of the stretch's first element in the flattened parameter.
        size: its elements, > 0.
        flat: tensor that the optimizer updates.
        offset: where in the flattened `flat` the stretch begins.
    """

    name: str
    start: int
    size: int
    flat: Tensor
    offset: int

    def of(self, tensor: Tensor) -> Tensor:
        """Return the stretch of a tensor that is laid out as `flat` is."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.size)


def held_whole(trained: Mapping[str, nn.Parameter]) -> list[Held]:
    """Return all parameters, each updated in place by an optimizer of this process's own."""
    return [Held(name, 0, parameter.numel(), parameter, 0) for name, parameter in trained.items()]


def held_by_deepspeed(optimizer: Any, trained: Mapping[str, nn.Parameter]) -> list[Held]:
    """Return what this rank's optimizer holds, whichever of DeepSpeed's it is; replicas included."""
    if hasattr(optimizer, "grad_position"):
        return list(_held_by_zero_3(optimizer, trained))
    if hasattr(optimizer, "single_partition_of_fp32_groups"):
        return list(_held_by_zero_2(optimizer, trained))
    if hasattr(optimizer, "fp32_groups"):
        masters = _masters(optimizer)
        return [Held(name, 0, p.numel(), masters[p], 0) for name, p in trained.items()]
    return held_whole(trained)


def refresh_parameters(optimizer: Any) -> None:
    """Bring the parameters that the model reads to the fp32 values that DeepSpeed's optimizer holds."""
    if hasattr(optimizer, "grad_position"):
        optimizer._partition_all_parameters()
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
    elif hasattr(optimizer, "single_partition_of_fp32_groups"):
        optimizer.update_lp_params()
    elif hasattr(optimizer, "fp32_groups"):
        for parameter, master in _masters(optimizer).items():
            parameter.data.copy_(master.data)


def snapshot(held: Iterable[Held], kept: Kept, trained: Mapping[str, nn.Parameter]) -> EngineState:
    """Copy stretches and their optimizer state to the CPU.

    Raises:
        RunError: a parameter is empty.
    """
    shapes = {name: _shape(parameter) for name, parameter in trained.items()}
    empty = [name for name, shape in shapes.items() if torch.Size(shape).numel() == 0]
    if empty:  # known of ZeRO 3 with adapters; such a checkpoint would be worth nothing
        raise RunError(Fault("checkpoint", f"{len(empty)} weights are empty, {empty[0]} first"))
    return EngineState(shapes, [_piece(one, kept.get(one.flat, {})) for one in held])


@torch.no_grad()
def fill(held: Iterable[Held], kept: Kept, files: StateFiles) -> None:
    """Bring stretches and their optimizer state to what files hold.

    Raises:
        DamagedError: the files do not cover a stretch.
    """
    for one in held:
        one.of(one.flat).copy_(files.read(WEIGHT, one.name, one.start, one.size))
        for kind in files.kinds(one.name):
            if kind == WEIGHT:
                continue
            values = files.read(kind, one.name, one.start, one.size)
            state = kept[one.flat]
            if values.ndim == 0:
                state[kind] = values
            else:
                state.setdefault(kind, torch.zeros_like(one.flat, requires_grad=False))
                one.of(state[kind]).copy_(values)


def _piece(one: Held, state: Mapping[str, Any]) -> Piece:
    values = {WEIGHT: one.of(one.flat)}
    for kind, value in state.items():
        if torch.is_tensor(value):
            values[kind] = one.of(value) if value.ndim and value.numel() == one.flat.numel() else value.detach()
    return Piece(one.name, one.start, {kind: value.to("cpu", copy=True) for kind, value in values.items()})


def _held_by_zero_3(optimizer: Any, trained: Mapping[str, Any]) -> Iterator[Held]:
    for name, parameter in trained.items():
        group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = size * optimizer._get_param_partition_rank(parameter)
        size = min(size, parameter.ds_numel - start)  # the last rank's share is padded
        if size > 0:
            yield Held(name, start, size, optimizer.fp32_partitioned_groups_flat[group], offset)


def _held_by_zero_2(optimizer: Any, trained: Mapping[str, Any]) -> Iterator[Held]:
    flats = optimizer.single_partition_of_fp32_groups
    for name, parameter in trained.items():
        mapping = parameter._hp_mapping
        if mapping is not None:
            flat, here, there = (
                flats[mapping.param_group_index],
                mapping.lp_fragment_address,
                mapping.hp_fragment_address,
            )
            yield Held(name, here.start, here.numel, flat, there.start)


def _masters(optimizer: Any) -> dict[nn.Parameter, Tensor]:
    groups = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
    return {p: master for parameters, masters in groups for p, master in zip(parameters, masters, strict=True)}


def _shape(parameter: nn.Parameter) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
