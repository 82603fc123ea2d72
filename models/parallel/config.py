"""How many GPUs train one model, and what each of them has of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class SamplingConfig:
    """How the processes that torchrun started share the clips to sample.

    Raises:
        ValueError: a number that is less than 1.
    """

    sequence: int = 1
    """Number of GPUs that divide the tokens of the same clips; the GPUs in all are a multiple of it, and divide the
    clips."""

    def __post_init__(self) -> None:
        if self.sequence < 1:
            raise ValueError(f"parallel.sequence is {self.sequence}; it must be at least 1")

    def among(self, processes: int) -> ParallelConfig:
        """The shares of so many processes.

        Raises:
            ValueError: a number of processes that is no multiple of ``sequence``.
        """
        if processes % self.sequence:
            allowed = ", ".join(str(n) for n in range(1, processes + 1) if processes % n == 0)
            raise ValueError(
                f"parallel.sequence is {self.sequence}; it must divide the number of processes, {processes}: it may "
                f"be {allowed}"
            )
        return ParallelConfig(data=processes // self.sequence, sequence=self.sequence)


@dataclass(frozen=True)
class ParallelConfig:
    """The processes of a run, which torchrun starts: one per GPU, as many as the product of the numbers.

    Raises:
        ValueError: a number that is less than 1.
    """

    data: int = 1
    """Number of copies of the model, each with its own samples of a batch."""
    shard: int = 1
    """Number of GPUs that a copy's weights, gradients, averages and optimizer states are divided among, each of which
    has its own samples too (FSDP2)."""
    sequence: int = 1
    """Number of GPUs that divide the tokens of the same samples; at most the frames of tokens, and at most what the
    model's attention exchanges: places of a frame, or heads."""

    def __post_init__(self) -> None:
        for name, number in self.axes.items():
            if number < 1:
                raise ValueError(f"parallel.{name} is {number}; it must be at least 1")

    @property
    def axes(self) -> dict[str, int]:
        """The numbers by name, in the order of the mesh: neighbours share most."""
        return {item.name: getattr(self, item.name) for item in fields(self)}

    @property
    def size(self) -> int:
        """The number of processes."""
        return math.prod(self.axes.values())

    @property
    def shares(self) -> int:
        """The number of shares that the samples of a batch are divided into."""
        return self.data * self.shard

    def __str__(self) -> str:
        return " x ".join(f"parallel.{name} {number}" for name, number in self.axes.items())
