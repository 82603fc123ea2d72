"""What ranks send each other in a step, in numbers; the plan prints them, and tests count them in real steps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from .config import ParallelConfig
from .shards import held


class Collective(NamedTuple):
    """Bytes that a GPU gives to the collectives of one kind in a step, among ``ranks`` GPUs.

    What it receives, in rings of n ranks that each are given g bytes:

        allgather         (n - 1) g        of the others' parts
        reduce_scatter    (n - 1) g / n    of sums that become its part
        allreduce         2 (n - 1) g / n  a reduce_scatter, then an allgather
        alltoall          (n - 1) g / n    all but its own

    Source of the ring's counts: Patarasuk and Yuan 2009, J. Parallel Distrib. Comput. 69.
    """

    kind: str
    what: str
    ranks: int
    given: int

    @property
    def received(self) -> float:
        """Bytes that the GPU receives."""
        n = self.ranks
        share = {"allgather": n - 1.0, "reduce_scatter": (n - 1) / n, "allreduce": 2 * (n - 1) / n}
        return self.given * share.get(self.kind, (n - 1) / n)


class Parameter(NamedTuple):
    """Its shape, the number of the unit that has it, None for none, and whether it is trained."""

    shape: tuple[int, ...]
    unit: int | None
    trained: bool


def parameters_of(model: Any) -> tuple[Parameter, ...]:
    """What :func:`collectives` asks of a model."""
    unit_of = {id(p): i for i, unit in enumerate(model.units()) for module in unit for p in module.parameters()}
    return tuple(Parameter(tuple(p.shape), unit_of.get(id(p)), p.requires_grad) for p in model.parameters())


def parts_of(parallel: ParallelConfig) -> int:
    """How many GPUs a copy of the model is divided among."""
    return parallel.shard * parallel.sequence if parallel.shard > 1 else 1


def held_by(parameters: Iterable[Parameter], parts: int) -> int:
    """Numbers of parameters that each of so many GPUs holds."""
    return sum(held(p.shape, parts) for p in parameters)


def collectives(
    parameters: tuple[Parameter, ...], given: Mapping[str, int], parallel: ParallelConfig, *, bf16: bool
) -> tuple[Collective, ...]:
    """What a GPU sends in a training step of one part (``accumulation`` 1): this folder in numbers.

        copies     allreduce of the trained weights' gradients, fp32
        shards     allgather of the units for the forward and for the backward, of the rest once;
                   reduce_scatter of the gradients, fp32; allreduce of their parts among copies
        sequence   alltoall in attention that crosses frames, allgather of the prediction: ``given``, bytes; its
                   gradients are summed with those of copies or shards

    Not counted: numbers that ranks agree on, a few bytes, and the buffers that DDP broadcasts once.
    """
    parts = parts_of(parallel)
    found = []
    if parts > 1:
        rest = held_by((p for p in parameters if p.unit is None), parts)
        units = held_by(parameters, parts) - rest
        gradients = 4 * held_by((p for p in parameters if p.trained), parts)
        found.append(Collective("allgather", "weights", parts, (4 if bf16 else 8) * units + 4 * rest))
        found.append(Collective("reduce_scatter", "gradients", parts, parts * gradients))
        found.append(Collective("allreduce", "gradients", parallel.data, gradients))
    else:
        gradients = 4 * sum(math.prod(p.shape) for p in parameters if p.trained)
        found.append(Collective("allreduce", "gradients", parallel.size, gradients))
    for kind, what in (("alltoall", "activations"), ("allgather", "prediction")):
        found.append(Collective(kind, what, parallel.sequence, given.get(kind, 0)))
    return tuple(each for each in found if each.ranks > 1 and each.given)
