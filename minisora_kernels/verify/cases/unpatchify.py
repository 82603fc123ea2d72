"""Cases of unpatchify."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from math import prod

import minisora_kernels as mk

from . import Case, Random, random_tensors, side_of


def unpatchify(
    random: Random,
    name: str,
    batch: int,
    grid: Sequence[int],
    patch: Sequence[int],
    channels: int,
    channels_first: bool = False,
) -> Case:
    return Case(
        "unpatchify",
        name,
        {"tokens": random(batch, prod(grid), prod(patch) * channels)},
        lambda t, **kwargs: mk.unpatchify(t["tokens"], grid, patch, channels, channels_first=channels_first, **kwargs),
    )


def cases(draw: int = 0) -> list[Case]:
    """What :mod:`..right` checks: every kernel and every branch of its launcher, on as few numbers as show it."""
    random = random_tensors(3 + 100 * draw)
    return [
        unpatchify(random, "video", 2, (3, 2, 5), (2, 2, 2), 4),
        unpatchify(random, "odd", 1, (5, 1, 7), (1, 4, 4), 1),
        unpatchify(random, "channels-first", 2, (3, 2, 5), (2, 2, 2), 3, True),
        replace(unpatchify(random, "offset", 1, (3, 2, 5), (1, 2, 2), 4), layout="offset"),
    ]


def speed_cases(random: Random, tokens: int) -> Iterator[tuple[str, Callable[[], Case]]]:
    """What :mod:`..faster` times, on about so many tokens."""
    side = side_of(tokens)
    yield "unpatchify", lambda: unpatchify(random, "", 4, (16, side, side), (1, 2, 2), 16)
