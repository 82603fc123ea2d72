"""Cases of guided_step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch

import minisora_kernels as mk

from . import Case, Random, random_tensors, side_of


def guided_step(
    random: Random,
    name: str,
    shape: Sequence[int],
    channels: int | None = None,
    learned: bool = False,
    guided: bool = True,
    noisy: bool = False,
    rows: bool = False,
    dtypes: dict[str, torch.dtype] | None = None,
) -> Case:  # one argument a column of the tables
    """``rows``: a row of coefficients a sample."""
    predicted = (shape[0], (2 if learned else 1) * shape[1], *shape[2:])
    tensors = {
        "x": random(*shape) * 2,
        "cond": random(*predicted),
        "coefficients": random(shape[0], 5) * 0.5 + 1 if rows else random(5) * 0.5 + 1,
    }
    tensors |= {"null": tensors["cond"] + random(*predicted) / 4} if guided else {}
    tensors |= {"z": random(*shape)} if noisy else {}
    return Case(
        "guided_step",
        name,
        tensors,
        lambda t, **kwargs: mk.guided_step(**t, channels=channels, **kwargs),
        {"coefficients": torch.float32, **(dtypes or {})},
        tuple(tensors),
    )


def cases(draw: int = 0) -> list[Case]:
    """What :mod:`..right` checks: every kernel and every branch of its launcher, on as few numbers as show it."""
    random = random_tensors(5 + 100 * draw)
    half = torch.bfloat16
    return [
        guided_step(random, "euler", (2, 4, 3, 6, 10)),
        guided_step(random, "ddpm-learned", (3, 4, 3, 6, 5), 3, True, True, True, True),
        guided_step(random, "a-clip", (2, 4, 16, 16, 17), 3, True, True, True, True),
        replace(guided_step(random, "offset", (2, 4, 3, 6, 10)), layout="offset"),
        guided_step(random, "bf16-state", (2, 4, 3, 8, 8), None, True, True, True, True, {"x": half, "z": half}),
    ]


def speed_cases(random: Random, tokens: int) -> Iterator[tuple[str, Callable[[], Case]]]:
    """What :mod:`..faster` times, on about so many tokens."""
    side = side_of(tokens)
    latents = (1, 16, 16, 2 * side, 2 * side)
    yield "guided_step", lambda: guided_step(random, "", latents, None, True, True, True)
