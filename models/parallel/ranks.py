"""The processes that train one model: how they find each other, and what they agree on."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout

from ..runtime.verification import serving
from .config import ParallelConfig
from .draws import Share
from .sequence import Line

# Seconds that a rank waits for the others where no option says how long, as in sampling.
PATIENCE = 1800
# What a rank does, in the order of a step: who is earlier in it holds up the others.
PLACES = ("saves a checkpoint", "samples a preview", "reads data", "computes gradients")


class Place(NamedTuple):
    """Where a rank stands: the step, 0-based, what it does there as a number and in words, and since when."""

    step: int
    order: int
    doing: str
    since: float


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
    """This process among those that train together; the only one by default.

    Attributes:
        size: the number of processes.
        rank: this process; 0 is the one that writes.
        share: the samples that this process has.
        line: the ranks that have the same samples, and divide their tokens.
        mesh: that a model is divided over, by all ranks of a copy of it, with an axis for copies if there are several;
            None if it is not divided.
        parts: the number of parts of a divided model; 1 if it is not divided.
        place: where this rank stands.
        part: the one that this rank saves; None on ranks with other copies of it.
    """

    def __init__(self, config: ParallelConfig = ParallelConfig(), device: str = "cpu") -> None:  # noqa: B008 - frozen
        self.size, self.rank = config.size, 0
        self.share, self.line, self.mesh = Share(), Line(), None
        self.part: int | None = 0
        self.parts = 1
        self.at(0, PLACES[0])
        if self.size == 1:
            return
        self.rank = dist.get_rank()
        parts = init_device_mesh(device, (config.shares, config.sequence), mesh_dim_names=("share", "sequence"))
        share, line = parts["share"], parts["sequence"]
        self.share = Share(share.get_local_rank(), share.size(), share.get_group())
        self.line = Line(line.get_local_rank(), line.size(), line.get_group())
        if config.shard > 1:
            axes = {"data": config.data, "shard": config.shard * config.sequence}
            axes = {name: number for name, number in axes.items() if number > 1}
            self.mesh = init_device_mesh(device, tuple(axes.values()), mesh_dim_names=tuple(axes))
            self.parts = self.mesh["shard"].size()
            self.part = self.rank if self.rank < self.parts else None

    @property
    def sharded(self) -> bool:
        """Whether a model is divided among ranks."""
        return self.mesh is not None

    def groups(self) -> list[dist.ProcessGroup]:
        """The groups beside that of all ranks."""
        groups = [] if self.mesh is None else self.mesh.get_all_groups()
        return [group for group in (self.share.group, self.line.group, *groups) if group is not None]

    @property
    def first(self) -> bool:
        """Whether this process writes the run's files."""
        return self.rank == 0

    @property
    def previews(self) -> bool:
        """Whether this process takes part in samples that the first one shows."""
        return self.sharded or self.share.rank == 0

    def mean(self, value: Tensor) -> Tensor:
        """The mean of the ranks' values."""
        if self.size > 1:
            dist.all_reduce(value)
            value /= self.size
        return value

    def any(self, flag: bool) -> bool:
        """Whether any rank has it set."""
        if self.size == 1:
            return flag
        flags = torch.tensor(int(flag))
        dist.all_reduce(flags)
        return bool(flags)

    def agree(self, values: dict[str, Any]) -> None:
        """Raises ValueError on every rank if a value is not the same on all."""
        if self.size == 1:
            return
        all_values: list[Any] = [None] * self.size
        dist.all_gather_object(all_values, values)
        for name, value in all_values[0].items():
            for rank, others in enumerate(all_values):
                if others[name] != value:
                    raise ValueError(f"{name} is {value!r} on rank 0 and {others[name]!r} on rank {rank}")

    def at(self, step: int, doing: str) -> None:
        """Note where this rank stands: what it does, one of ``PLACES``, in a step."""
        self.place = Place(step, PLACES.index(doing), doing, time.monotonic())

    def meet(self) -> None:
        """Return when all ranks have called it."""
        self.any(False)

    def joined(self, values: Any) -> list[Any]:
        """The shares' values in their order, on the first rank; nothing on the others.

        Ranks that divide the tokens of the same samples have the same values, of which those of the first are taken.
        """
        if self.size == 1:
            return [values]
        found: list[Any] = [None] * self.size
        dist.gather_object(values if self.line.rank == 0 else None, found if self.first else None)
        return found[:: self.line.ranks] if self.first else []


@contextlib.contextmanager
def serving_on(
    ranks: Ranks, device: torch.device, backend: str, verify: str, stored: Mapping[str, str] | None = None
) -> Iterator[None]:
    """As :func:`models.runtime.verification.serving`; the first rank verifies the kernels, and the others wait."""
    if not ranks.first:
        ranks.meet()
    with serving(device, backend, verify if ranks.first else "never", stored):
        if ranks.first:
            ranks.meet()
        yield


@contextlib.contextmanager
def open_ranks(config: ParallelConfig, device: torch.device, patience: float = PATIENCE) -> Iterator[Ranks]:
    """The processes of a run, connected over NCCL on GPUs and over gloo on CPUs. They part when the block ends well.

    What is sent fails when another rank takes part in it ``patience`` seconds too late.

    Raises:
        ValueError: torchrun started another number of processes than ``config`` has.
    """
    check_size(config)
    if config.size == 1:
        yield Ranks()
        return
    # What is agreed on in a step is a number of the host: on GPUs it takes gloo's way.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend, timeout=timedelta(seconds=patience), device_id=device if device.type == "cuda" else None
    )
    ranks = Ranks(config, device.type)
    for group in ranks.groups():
        _set_pg_timeout(timedelta(seconds=patience), group)
    yield ranks
    dist.barrier()
    dist.destroy_process_group()
