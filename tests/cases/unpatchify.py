"""More cases of unpatchify."""

from __future__ import annotations

from collections.abc import Iterator

from minisora_kernels.verify.cases import Case, random_tensors
from minisora_kernels.verify.cases.unpatchify import unpatchify


def cases(draw: int) -> Iterator[Case]:
    """The same shapes with other numbers for every ``draw``."""
    random = random_tensors(3 + 100 * draw)
    # name, B, grid, patch, C, channels first
    for row in [
        ("video", 2, (3, 2, 5), (2, 2, 2), 4),
        ("latents", 3, (2, 3, 3), (1, 2, 2), 8),
        ("one-channel", 1, (5, 1, 7), (1, 4, 4), 1),
        ("image", 2, (3, 4), (2, 2), 3),
        ("channels-first", 2, (3, 2, 5), (2, 1, 2), 3, True),
        ("channels-first-image", 2, (3, 4), (2, 2), 4, True),
        ("empty-batch", 0, (1, 2, 2), (1, 2, 2), 4),
    ]:
        yield unpatchify(random, *row)
