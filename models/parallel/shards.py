"""Sharded training: weights, gradients, averages and optimizer states divided among ranks, by FSDP2.

A unit is gathered before it runs, freed after, and gathered once more for its backward; its gradients are summed and
divided when its backward is over. The model says which modules make a unit (:meth:`models.protocols.Model.units`).
"""

from __future__ import annotations

import contextlib
import itertools
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from .ranks import Ranks


def divided_axis(shape: Sequence[int], parts: int) -> int:
    """The axis of a parameter that is divided: the first, unless it is shorter than ``parts``, and another is even.

    The first may be uneven, which FSDP2 fills up. Positions ``[1, N, D]`` would be filled up to ``parts`` times as
    many.
    """
    if shape and shape[0] < parts:
        return next((axis for axis, size in enumerate(shape) if size % parts == 0), 0)
    return 0


def held(shape: Sequence[int], parts: int) -> int:
    """Numbers that each rank holds of a parameter."""
    if not shape:
        return 1
    axis = divided_axis(shape, parts)
    return -(-shape[axis] // parts) * math.prod(shape) // shape[axis]


def shard(model: Any, ranks: Ranks, *, bf16: bool, offload: bool = False) -> None:
    """Divide the model's parameters over ``ranks.mesh``, in place.

    With ``bf16`` units are gathered in bfloat16, which autocast would round their weights to anyway. What belongs to no
    unit stays float32, inputs are not rounded, and gradients are summed in float32. With ``offload`` the parts are
    in the CPU's memory, weights and gradients, and a unit is copied to the GPU to be gathered.

    While a unit runs forward, the next one is gathered. With checkpointing it is not: a part that is computed again
    would gather a unit whose backward is over. In the backward FSDP2 gathers ahead by itself, in the reversed order.
    """
    mesh = ranks.mesh
    assert mesh is not None
    parts = mesh.size(mesh.ndim - 1)

    def placed(parameter: nn.Parameter) -> Shard:
        return Shard(divided_axis(parameter.shape, parts))

    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    where = CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if offload else OffloadPolicy()
    how: dict[str, Any] = {"mesh": mesh, "shard_placement_fn": placed, "offload_policy": where}
    units = model.units()
    for unit in units:
        fully_shard(unit, mp_policy=policy if bf16 else MixedPrecisionPolicy(), **how)
    fully_shard(model, **how)
    if not model.checkpointing:
        for unit, after in itertools.pairwise(units):
            unit[0].set_modules_to_forward_prefetch([after[0]])
    if hasattr(model, "modulations"):
        register_fsdp_forward_method(model, "modulations")
    # Of outputs that are views: no block writes into them.
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view", category=UserWarning)


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


@contextlib.contextmanager
def without_sums(model: Any) -> Iterator[None]:
    """In the block a backward adds to this rank's gradients of a sharded model, which stay whole until the next one."""
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a parameter; all of one that is not divided."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def part_of(state: Any, *, first: bool) -> Any:
    """A copy of a state on the CPU: of a tensor that is divided the axis and this rank's rows, as ``models.checkpoint``
    joins them; only the ``first`` has what is not divided.
    """
    if isinstance(state, DTensor):
        axis = next(placement.dim for placement in state.placements if isinstance(placement, Shard))
        return axis, state.to_local().detach().to("cpu", copy=True)
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        kept = {key: value for key, value in state.items() if first or isinstance(value, (DTensor, dict))}
        return {key: part_of(value, first=first) for key, value in kept.items()}
    return state


def divided(state: dict[str, Any], parameters: list[nn.Parameter]) -> dict[str, Any]:
    """The state of an optimizer with whole tensors, divided as its ``parameters`` are."""
    parts = {}
    for number, values in state["state"].items():
        like = parameters[number]
        parts[number] = {
            name: distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
            if isinstance(like, DTensor) and value.shape == like.shape
            else value
            for name, value in values.items()
        }
    return state | {"state": parts}
