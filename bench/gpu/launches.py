"""Small calls that between them make an op's launcher choose whatever it can choose.

The benches' shapes are what models run most; these are the rest: every form of a window, every width of a head, rows
of parameters of every kind, widths that no chunk divides, dtypes that meet. The calls of an op are in its bench, as
``LAUNCHES``; `bench.aot` compiles both. The tensors are "meta" ones, for only shapes, strides and dtypes count.
tests/bench/test_aot.py finds kernels, and branches of constants in them, that none of these calls compiles.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.harness.session import Problem

BOTH, HALF, TF32 = ("float32", "bfloat16"), ("bfloat16",), ("tf32",)  # see PRECISIONS of bench/aot.py


@dataclass(frozen=True)
class Launch:
    """A call by name: ``problem(dtype)`` has its tensors. ``dtypes`` are those it is made in.

    Without ``quick`` it has no kernel and no branch that others of its op lack.
    """

    name: str
    problem: Callable[[torch.dtype], Problem]
    dtypes: tuple[str, ...] = BOTH
    quick: bool = True


def meta(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")
