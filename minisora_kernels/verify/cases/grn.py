"""Cases of grn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Literal

import torch

import minisora_kernels as mk

from . import Case, Random, random_tensors, width_of


def grn(
    random: Random,
    name: str,
    batch: int,
    tokens: int,
    width: int,
    groups: int = 1,
    activation: Literal["gelu"] | None = None,
    dtypes: dict[str, torch.dtype] | None = None,
) -> Case:
    return Case(
        "grn",
        name,
        {"x": random(batch, tokens, width) * 2 + 0.5, "weight": random(width), "bias": random(width)},
        lambda t, **kwargs: mk.grn(**t, groups=groups, activation=activation, **kwargs),
        dtypes or {},
    )


def cases(draw: int = 0) -> list[Case]:
    """What :mod:`..right` checks: every kernel and every branch of its launcher, on as few numbers as show it."""
    random = random_tensors(6 + 100 * draw)
    return [
        grn(random, "frames", 2, 3 * 20, 24, 3),
        grn(random, "odd", 3, 35, 77, 5, "gelu"),
        grn(random, "sites-over-chunks", 2, 2 * 150, 33, 2, "gelu"),
        grn(random, "wide", 1, 2 * 9, 2048, 2),
        replace(grn(random, "offset", 2, 3 * 20, 24, 3), layout="offset"),
        grn(random, "float32-stream", 2, 30, 48, 2, None, {"x": torch.float32, "bias": torch.float32}),
    ]


def speed_cases(random: Random, tokens: int) -> Iterator[tuple[str, Callable[[], Case]]]:
    """What :mod:`..faster` times, on about so many tokens."""
    yield "grn", lambda: grn(random, "", 1, tokens // 8 * 8, width_of(tokens), 8, "gelu")
