"""More cases of norm_rope."""

from __future__ import annotations

from collections.abc import Iterator

from minisora_kernels.verify.cases import Case, random_tensors
from minisora_kernels.verify.cases.norm_rope import norm_rope


def cases(draw: int) -> Iterator[Case]:
    """The same shapes with other numbers for every ``draw``."""
    random = random_tensors(7 + 100 * draw)
    # name, B, N, heads, head_dim, norm, across heads, weights, biases, angles, interleaved
    table: list[tuple] = [
        ("across", 2, 17, 3, 24, "rms", True, 2, 0, "token", True),
        ("per-head", 2, 9, 5, 72, "layer", False, 1, 2, "head", False),
        ("layer-across", 3, 11, 2, 10, "layer", True, 1, 1, "sample", True),
        ("layer-per-head", 2, 7, 3, 16, "layer", False, 2, 0, "sample", False),
        ("halves-across", 2, 5, 5, 72, "rms", True, 1, 0, "token", False),
        ("rotary", 2, 21, 3, 16, None, False, 0, 0, "head", True),
        ("nothing", 1, 4, 2, 8, None, False, 0, 0, "", True),
        ("norm", 1, 65, 20, 16, "rms", False, 0, 0, "", True),
        ("several-runs", 1, 67, 2, 40, "layer", True, 2, 2, "token", True),
        ("wide", 1, 2, 40, 128, "layer", True, 2, 2, "token", True),
        ("long", 1, 1590, 2, 8, "rms", True, 2, 0, "token", True),
        ("empty-batch", 0, 4, 2, 8, "rms", False, 1, 0, "token", True),
        ("no-tokens", 2, 0, 2, 8, "layer", True, 2, 1, "", True),
    ]
    for row in table:
        yield norm_rope(random, *row)
