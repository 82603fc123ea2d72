"""Calls of every op: those that :mod:`..right` checks, and those that :mod:`..faster` times.

An op has a file beside this one, with ``cases(draw)`` and ``speed_cases(random, tokens)``. tests/cases has more cases,
by the same builders.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

Call = Callable[..., Any]
Random = Callable[..., Tensor]


@dataclass
class Case:
    """``tensors`` are masters by name; ``call(tensors, **kwargs)`` runs the public op on (casts of) them."""

    op: str
    name: str
    tensors: dict[str, Tensor]
    call: Call
    # Tensors that keep a dtype of their own, whatever the case is run in.
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    # Tensors that are constants of the op; all of them, if its kernels have no backward.
    constants: tuple[str, ...] = ()
    # False where matrix products are torch's, which may round differently with another number of threads.
    any_threads: bool = True
    # Where the masters have NaN: the results that depend on them are NaN, and no others.
    has_nan: bool = False
    # What models give: "chunked" are shift, scale and gate as views of one tensor, as modulation has them; "offset" are
    # addresses that are not multiples of 16 bytes.
    layout: Literal["", "chunked", "offset"] = ""
    device: str = "cpu"

    def __str__(self) -> str:
        return f"{self.op}-{self.name}"

    @property
    def differentiable(self) -> bool:
        return any(name not in self.constants for name in self.tensors)

    def leaves(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The inputs in ``dtype``, rounded; leaves that require gradients, but for the constants."""
        rounded = {
            name: master.to(self.device, self.dtypes.get(name, dtype)).detach() for name, master in self.tensors.items()
        }
        return {name: leaf.requires_grad_(name not in self.constants) for name, leaf in self.laid(rounded).items()}

    def laid(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of the same values in the case's layout."""
        if self.layout == "offset":
            return {
                name: torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)
                for name, tensor in tensors.items()
            }
        if self.layout == "chunked":
            names = [name for name in ("shift", "scale", "gate") if name in tensors]
            whole = torch.cat([tensors[name] for name in names for _ in range(2)], -1)
            return tensors | dict(zip(names, whole.chunk(2 * len(names), -1)[::2], strict=True))
        return tensors


def random_tensors(seed: int) -> Random:
    """``random(*shape)``: normal, float64, the same on every machine."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)


# Tokens from which a timed call has the widths of a model; below, it is for a test.
MODEL_SIZED = 1024


def width_of(tokens: int) -> int:
    """Width of the tokens of a timed call."""
    return 1152 if tokens >= MODEL_SIZED else 96


def side_of(tokens: int) -> int:
    """Side of the grid of 16 square frames with about so many tokens."""
    return max(2, int((tokens / 16) ** 0.5))


def files_of_ops() -> list[ModuleType]:
    """The files beside this one: of an op each, or of ops that take the same inputs."""
    stems = sorted(path.stem for path in Path(__file__).parent.glob("[!_]*.py"))
    return [importlib.import_module(f"{__package__}.{stem}") for stem in stems]


def checked(draw: int = 0) -> list[Case]:
    """What :mod:`..right` checks, with other numbers for every ``draw``."""
    return [case for file in files_of_ops() for case in file.cases(draw)]


def speed_cases(random: Random, tokens: int) -> Iterator[tuple[str, Callable[[], Case]]]:
    """Per regime of an op (see ``detail`` in ``backends.choose``) what is timed.

    A case is made when it is asked for: on a GPU each takes up to a gigabyte.
    """
    for file in files_of_ops():
        yield from file.speed_cases(random, tokens)


DTYPES = ("float32", "bfloat16", "float16")


def regimes() -> Iterator[tuple[str, str, str]]:
    """Of every op what a record tells apart: op, dtype, and direction with detail."""
    for name, _ in speed_cases(random_tensors(0), 32):
        op, _, detail = name.partition(" ")
        both = hasattr(torch.ops.minisora, f"{op}_bwd")
        for dtype in DTYPES:
            for direction in ("forward+backward", "forward") if both else ("forward",):
                yield op, dtype, f"{direction} {detail}".rstrip()
