"""More cases of patch_embed."""

from __future__ import annotations

from collections.abc import Iterator

from minisora_kernels.verify.cases import Case, random_tensors
from minisora_kernels.verify.cases.patch_embed import patch_embed


def cases(draw: int) -> Iterator[Case]:
    """The same shapes with other numbers for every ``draw``."""
    random = random_tensors(2 + 100 * draw)
    # name, B, C, size, patch, D, bias, pos
    table: list[tuple] = [
        ("latents", 2, 4, (3, 6, 10), (1, 2, 2), 24, True, True),
        ("tubelets", 3, 4, (4, 6, 6), (2, 2, 2), 40, True, True),
        ("pixels", 1, 3, (1, 16, 32), (1, 16, 16), 9, True, False),
        ("one-channel", 2, 1, (5, 3, 7), (1, 1, 1), 1, False, False),
        ("image", 2, 4, (6, 4), (2, 2), 33, True, True),
        ("frames", 2, 3, (2, 6, 4), (2, 2), 16, False, True),
        ("empty-batch", 0, 4, (2, 4, 4), (2, 2, 2), 8, True, True),
    ]
    for row in table:
        yield patch_embed(random, *row)
