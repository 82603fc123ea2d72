"""The processes that train one model: how they find each other, and what they agree on."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from .config import ParallelConfig
from .draws import Share

# A rank waits this long for the others, which write a checkpoint or a preview meanwhile.
PATIENCE = timedelta(minutes=30)


def is_first() -> bool:
    """Whether this process is the one that prints and writes: rank 0, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def processes() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launcher() -> str:
    """The command that starts a module as this process was started, on one machine."""
    return "python -m" if processes() == 1 else f"torchrun --standalone --nproc-per-node {processes()} -m --"


def check_size(config: ParallelConfig) -> None:
    """Raises ValueError unless torchrun started as many processes as ``config`` has."""
    started, wanted = processes(), config.size
    if started == wanted:
        return
    if started == 1:
        raise ValueError(
            f"there is one process, but {config} is {wanted}; start {wanted} with torchrun --standalone "
            f"--nproc-per-node {wanted} -m -- models.train, or use 1 for each"
        )
    fits = [
        f"--parallel.{name} {started * n // wanted}" for name, n in config.axes.items() if started * n % wanted == 0
    ]
    raise ValueError(
        f"torchrun started {started} processes, but {config} is {wanted}; use {', or '.join([*fits, ''])}"
        f"--nproc-per-node {wanted}"
    )


class Ranks:
    """This process among those that train together; the only one without ``mesh``.

    Attributes:
        mesh: of the processes, with the axes of :class:`ParallelConfig`.
        rank: this process; 0 is the one that writes.
        share: the samples that this process has.
        sharded: whether a model is divided among ranks.
    """

    def __init__(self, mesh: DeviceMesh | None = None, share: Share | None = None) -> None:
        self.mesh, self.share = mesh, share or Share()
        self.rank = 0 if mesh is None else dist.get_rank()
        self.sharded = mesh is not None and mesh["shard"].size() > 1

    def axes(self, *names: str) -> DeviceMesh:
        """The part of the mesh with these axes, but for those of one process; at least the last."""
        assert self.mesh is not None
        return self.mesh[tuple(name for name in names if self.mesh[name].size() > 1) or names[-1]]

    @property
    def first(self) -> bool:
        """Whether this process writes the run's files."""
        return self.rank == 0

    def mean(self, value: Tensor) -> Tensor:
        """The mean of the ranks' values."""
        if self.mesh is not None:
            dist.all_reduce(value)
            value /= self.mesh.size()
        return value

    def any(self, flag: bool) -> bool:
        """Whether any rank has it set."""
        if self.mesh is None:
            return flag
        flags = torch.tensor(int(flag))
        dist.all_reduce(flags)
        return bool(flags)

    def agree(self, values: dict[str, Any]) -> None:
        """Raises ValueError on every rank if a value is not the same on all."""
        if self.mesh is None:
            return
        all_values: list[Any] = [None] * self.mesh.size()
        dist.all_gather_object(all_values, values)
        for name, value in all_values[0].items():
            for rank, others in enumerate(all_values):
                if others[name] != value:
                    raise ValueError(f"{name} is {value!r} on rank 0 and {others[name]!r} on rank {rank}")


@contextlib.contextmanager
def open_ranks(config: ParallelConfig, device: torch.device) -> Iterator[Ranks]:
    """The processes of a run, connected over NCCL on GPUs and over gloo on CPUs. They part when the block ends well.

    Raises:
        ValueError: torchrun started another number of processes than ``config`` has.
    """
    check_size(config)
    if config.size == 1:
        yield Ranks()
        return
    # What is agreed on in a step is a number of the host: on GPUs it takes gloo's way.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=PATIENCE, device_id=device if device.type == "cuda" else None)
    mesh = init_device_mesh(device.type, tuple(config.axes.values()), mesh_dim_names=tuple(config.axes))
    yield Ranks(mesh, Share(dist.get_rank(), config.shares, dist.group.WORLD))
    dist.barrier()
    dist.destroy_process_group()
