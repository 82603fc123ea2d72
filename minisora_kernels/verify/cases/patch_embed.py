"""Cases of patch_embed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from math import prod

import minisora_kernels as mk

from . import Case, Random, random_tensors, side_of, width_of


def patch_embed(
    random: Random,
    name: str,
    batch: int,
    channels: int,
    size: Sequence[int],
    patch: Sequence[int],
    width: int,
    biased: bool = True,
    placed: bool = True,
) -> Case:  # one argument a column of the tables
    tensors = {"x": random(batch, channels, *size), "weight": random(width, channels, *patch)}
    full = (1,) * (len(size) - len(patch)) + tuple(patch)
    count = prod(n // p for n, p in zip(size, full, strict=True))
    if biased:
        tensors["bias"] = random(width)
    if placed:
        tensors["pos"] = random(count, width)
    return Case("patch_embed", name, tensors, lambda t, **kwargs: mk.patch_embed(**t, **kwargs))


def cases(draw: int = 0) -> list[Case]:
    """What :mod:`..right` checks: every kernel and every branch of its launcher, on as few numbers as show it."""
    random = random_tensors(2 + 100 * draw)
    return [
        patch_embed(random, "latents", 2, 4, (3, 6, 10), (1, 2, 2), 24),
        patch_embed(random, "tubelets", 3, 4, (4, 6, 6), (2, 2, 2), 40),
        patch_embed(random, "pixels", 1, 3, (1, 32, 64), (1, 16, 16), 48, True, False),
        patch_embed(random, "odd", 2, 1, (5, 3, 7), (1, 1, 1), 1, False, False),
        replace(patch_embed(random, "offset", 1, 4, (2, 8, 8), (1, 2, 2), 24), layout="offset"),
    ]


def speed_cases(random: Random, tokens: int) -> Iterator[tuple[str, Callable[[], Case]]]:
    """What :mod:`..faster` times, on about so many tokens."""
    side, width = side_of(tokens), width_of(tokens)
    for length, channels, patch in (("short", 4, (1, 2, 2)), ("long", 3, (1, 16, 16))):
        size = (16, patch[1] * side, patch[2] * side)
        yield f"patch_embed {length}", partial(patch_embed, random, "", 1, channels, size, patch, width)
