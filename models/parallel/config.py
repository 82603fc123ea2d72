"""How many GPUs train one model, and what each of them has of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ParallelConfig:
    """The processes of a run, which torchrun starts: one per GPU.

    Raises:
        ValueError: a number that is less than 1.
    """

    data: int = 1
    """Groups of GPUs, each with its own samples of a batch; it must divide the samples of a part of the batch."""

    def __post_init__(self) -> None:
        for name in ("data",):
            if getattr(self, name) < 1:
                raise ValueError(f"parallel.{name} is {getattr(self, name)}; it must be at least 1")

    @property
    def size(self) -> int:
        """The number of processes."""
        return self.data
