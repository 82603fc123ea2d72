"""More cases of grn."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from minisora_kernels.verify.cases import Case, random_tensors
from minisora_kernels.verify.cases.grn import grn


def cases(draw: int) -> Iterator[Case]:
    """The same shapes with other numbers for every ``draw``."""
    random = random_tensors(6 + 100 * draw)
    single = dict.fromkeys(("weight", "bias"), torch.float32)
    # name, B, N, C, groups, activation, dtypes
    table: list[tuple] = [
        ("frames", 2, 3 * 20, 24, 3, None, {}),
        ("gelu", 2, 3 * 20, 24, 3, "gelu", {}),
        ("odd", 3, 35, 7, 1, None, {}),
        ("odd-gelu", 3, 35, 77, 5, "gelu", {}),
        ("width-one", 2, 5, 1, 1, "gelu", {}),
        ("one-site", 1, 4, 40, 4, "gelu", {}),
        ("sites-over-chunks", 2, 2 * 150, 33, 2, "gelu", {}),
        ("wide", 1, 2 * 9, 2048, 2, None, {}),
        ("fp32-weights", 2, 65, 48, 1, "gelu", single),
        ("fp32-stream", 2, 30, 48, 2, None, {"x": torch.float32, "bias": torch.float32}),
        ("many-frames", 1, 120, 8, 40, "gelu", {}),
        ("a-clip", 1, 16 * 576, 64, 16, "gelu", {}),
        ("empty-batch", 0, 6, 16, 2, "gelu", {}),
        ("no-tokens", 2, 0, 16, 1, None, {}),
    ]
    for row in table:
        yield grn(random, *row)
