"""More cases of window_attention."""

from __future__ import annotations

from collections.abc import Iterator

from minisora_kernels.verify.cases import Case, random_tensors
from minisora_kernels.verify.cases.window_attention import window_attention


def cases(draw: int) -> Iterator[Case]:
    """The same shapes with other numbers for every ``draw``."""
    random = random_tensors(1 + 100 * draw)
    # name, B, grid, window, heads, head_dim, norm, weights, rope, bias
    table: list[tuple] = [
        ("temporal", 2, (5, 2, 3), (5, 1, 1), 2, 8, None, None, None, False),
        ("temporal-16-72", 1, (16, 1, 2), (16, 1, 1), 2, 72, "rms", 1, "interleaved", False),
        ("spatial", 3, (2, 3, 4), (1, 3, 4), 2, 16, "layer", 2, "half", False),
        ("joint", 2, (2, 3, 5), (2, 3, 5), 1, 40, "rms", None, "interleaved", False),
        ("ragged", 2, (5, 7, 6), (2, 3, 4), 2, 8, "rms", 1, "half", True),
        ("identity", 2, (2, 2, 3), (1, 1, 1), 2, 8, None, None, None, False),
        ("bias", 2, (1, 6, 6), (1, 3, 3), 3, 24, None, None, None, True),
        ("long", 1, (1, 1, 257), (1, 1, 257), 1, 64, None, None, "interleaved", False),
        ("long-bias", 1, (2, 9, 10), (2, 9, 10), 2, 16, "layer", 2, None, True),
        ("empty-batch", 0, (2, 2, 2), (2, 1, 1), 2, 8, None, None, None, False),
    ]
    for row in table:
        yield window_attention(random, *row)
