"""Cases of new_op: batches, odd lengths, nothing at all. tests/test_ops.py runs each on every backend and check."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from cases import Case

import minisora_kernels as mk


def cases(draw: int = 0) -> Iterator[Case]:
    """The same shapes with other numbers for every ``draw``."""
    generator = torch.Generator().manual_seed(draw)
    for name, shape in [
        ("tokens", (2, 17, 96)),
        ("odd", (3, 5, 7)),
        ("one", (1,)),
        ("a-clip", (1, 4096, 8)),
        ("empty-batch", (0, 5, 16)),
    ]:
        x = torch.randn(*shape, dtype=torch.float64, generator=generator)
        yield Case("new_op", name, {"x": x}, lambda t, **kwargs: mk.new_op(t["x"], 0.3, **kwargs))
