"""Cases of gelu_mlp."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Literal

import minisora_kernels as mk

from . import Case, Random, random_tensors, width_of


def gelu_mlp(
    random: Random,
    name: str,
    shape: Sequence[int],
    hidden: int,
    out: int,
    biased: bool = True,
    approximate: Literal["none", "tanh"] = "tanh",
) -> Case:
    tensors = {"x": random(*shape), "w1": random(hidden, shape[-1]) / 4, "w2": random(out, hidden) / 8}
    biases = {"b1": random(hidden), "b2": random(out)} if biased else {}
    return Case(
        "gelu_mlp",
        name,
        tensors | biases,
        lambda t, **kwargs: mk.gelu_mlp(
            t["x"], t["w1"], t.get("b1"), t["w2"], t.get("b2"), approximate=approximate, **kwargs
        ),
        any_threads=False,
    )


def cases(draw: int = 0) -> list[Case]:
    """What :mod:`..right` checks: every kernel and every branch of its launcher, on as few numbers as show it."""
    random = random_tensors(4 + 100 * draw)
    return [
        gelu_mlp(random, "tokens", (2, 17, 32), 128, 32),
        gelu_mlp(random, "odd-widths", (2, 17, 24), 90, 7),
        gelu_mlp(random, "no-bias", (3, 5, 8), 33, 7, False),
        gelu_mlp(random, "no-bias-even-widths", (3, 5, 16), 40, 24, False),
        gelu_mlp(random, "exact", (2, 17, 32), 128, 32, True, "none"),
        replace(gelu_mlp(random, "offset", (2, 17, 32), 64, 32), layout="offset"),
    ]


def speed_cases(random: Random, tokens: int) -> Iterator[tuple[str, Callable[[], Case]]]:
    """What :mod:`..faster` times, on about so many tokens."""
    width = width_of(tokens)
    yield "gelu_mlp", lambda: gelu_mlp(random, "", (tokens // 4, width), 4 * width, width)
