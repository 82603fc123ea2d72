"""More cases of attention."""

from __future__ import annotations

from collections.abc import Iterator

from minisora_kernels.verify.cases import Case, random_tensors
from minisora_kernels.verify.cases.attention import attention


def cases(draw: int) -> Iterator[Case]:
    """The same shapes with other numbers for every ``draw``."""
    random = random_tensors(8 + 100 * draw)
    # name, B, N, M, heads, head_dim, lengths, masked, norm, across heads, weights, biased, angles, interleaved
    table: list[tuple] = [
        ("cross", 2, 21, 13, 3, 24, None, False, None, False, 0, False, "", True),
        ("lengths", 3, 9, 70, 2, 72, [70, 0, 33], False, None, False, 0, False, "", True),
        ("mask", 2, 30, 75, 1, 64, [40, 66], True, None, False, 0, False, "", True),
        ("two-keys", 2, 7, 2, 2, 8, None, False, None, False, 0, False, "", True),
        ("norm", 2, 33, 33, 2, 16, [33, 20], False, "layer", True, 2, True, "sample", True),
        ("norm-mask", 2, 17, 17, 3, 8, [5, 17], True, "rms", False, 1, False, "head", False),
        ("norm-cross", 2, 9, 40, 2, 24, [40, 11], False, "rms", True, 2, False, "", True),
        ("several-blocks", 1, 140, 131, 1, 8, None, False, None, False, 0, False, "", True),
        ("wide-heads", 1, 20, 70, 1, 128, [67], True, None, False, 0, False, "", True),
        ("self", 1, 257, 257, 1, 40, None, False, None, False, 0, False, "token", True),
        ("empty-batch", 0, 4, 3, 2, 8, [], False, "rms", False, 1, False, "", True),
        ("no-queries", 2, 0, 3, 2, 8, None, False, None, False, 0, False, "", True),
    ]
    for row in table:
        yield attention(random, *row)
