"""Cases of glu_mlp."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import minisora_kernels as mk

from . import Case, Random, random_tensors, width_of


def glu_mlp(
    random: Random,
    name: str,
    shape: Sequence[int],
    hidden: int,
    out: int,
    *,
    biased: bool = True,
    apart: bool = False,
    **options: Any,
) -> Case:
    """``apart``: each half has a weight of its own."""
    rows = hidden if apart else 2 * hidden
    tensors = {"x": random(*shape), "w1": random(rows, shape[-1]) / 4, "w2": random(out, hidden) / 8}
    if biased:
        tensors |= {"b1": random(rows), "b2": random(out)}
    if apart:
        tensors["w3"] = random(hidden, shape[-1]) / 4
    if apart and biased:
        tensors["b3"] = random(hidden)

    def call(t, **kwargs):
        given = {"w3": t.get("w3"), "b3": t.get("b3")}
        return mk.glu_mlp(t["x"], t["w1"], t.get("b1"), t["w2"], t.get("b2"), **given, **options, **kwargs)

    return Case("glu_mlp", name, tensors, call, any_threads=False)


def cases(draw: int = 0) -> list[Case]:
    """What :mod:`..right` checks: every kernel and every branch of its launcher, on as few numbers as show it."""
    random = random_tensors(12 + 100 * draw)
    return [
        glu_mlp(random, "tokens", (2, 17, 32), 128, 32),
        glu_mlp(random, "odd-widths", (2, 17, 24), 45, 7, gate_first=False),
        glu_mlp(random, "no-bias", (3, 5, 8), 33, 7, biased=False, activation="gelu"),
        glu_mlp(random, "tanh", (2, 17, 32), 64, 32, activation="gelu_tanh", gate_first=False),
        glu_mlp(random, "apart", (2, 17, 32), 64, 32, apart=True),
        replace(glu_mlp(random, "offset", (2, 17, 32), 64, 32), layout="offset"),
    ]


def speed_cases(random: Random, tokens: int) -> Iterator[tuple[str, Callable[[], Case]]]:
    """What :mod:`..faster` times, on about so many tokens."""
    width = width_of(tokens)
    yield "glu_mlp", lambda: glu_mlp(random, "", (tokens // 4, width), 8 * width // 3, width)
