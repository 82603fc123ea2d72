"""Cases of norm_rope."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import minisora_kernels as mk
from minisora_kernels.modulation import Norm

from . import MODEL_SIZED, Case, Random, random_tensors


def angles_of(random: Random, angles: str, batch: int, tokens: int, heads: int, head_dim: int) -> dict[str, Tensor]:
    """Tables of angles: "token" ``[N, head_dim / 2]``, "head" ``[N, heads, head_dim / 2]``, "sample" with both."""
    shape = {"token": (tokens,), "head": (tokens, heads), "sample": (batch, tokens, heads)}[angles]
    turns = random(*shape, head_dim // 2)
    return {"cos": turns.cos(), "sin": turns.sin()}


def norm_rope(
    random: Random,
    name: str,
    batch: int,
    tokens: int,
    heads: int,
    head_dim: int,
    norm: Norm | None = None,
    across: bool = False,
    weights: int = 0,
    biases: int = 0,
    angles: str = "",
    interleaved: bool = True,
) -> Case:  # one argument a column of the tables
    """``weights`` and ``biases``: 0 for none, 1 for all heads together, 2 a head; ``angles``: "" or see `angles_of`."""
    tensors = {"x": random(batch, tokens, heads, head_dim) * 1.5}
    shapes: dict[int, tuple[int, ...]] = {1: (head_dim,), 2: (heads, head_dim)}
    if weights:
        tensors["weight"] = random(*shapes[weights]) + 1
    if biases:
        tensors["bias"] = random(*shapes[biases])
    constants: tuple[str, ...] = ()
    if angles:
        tensors |= angles_of(random, angles, batch, tokens, heads, head_dim)
        constants = ("cos", "sin")

    def call(t: dict[str, Tensor], **kwargs: Any) -> Tensor:
        rope = mk.Rope(t["cos"], t["sin"], interleaved) if angles else None
        kwargs |= {name: t.get(name) for name in ("weight", "bias")}
        return mk.norm_rope(t["x"], norm=norm, across_heads=across, rope=rope, **kwargs)

    return Case("norm_rope", name, tensors, call, dict.fromkeys(constants, torch.float32), constants)


def cases(draw: int = 0) -> list[Case]:
    """What :mod:`..right` checks: every kernel and every branch of its launcher, on as few numbers as show it."""
    random = random_tensors(7 + 100 * draw)
    nan = norm_rope(random, "beside-nan", 2, 9, 3, 8, "rms", True, 2, 0, "token")
    nan.tensors["x"][0, 4, 1, 3] = float("nan")
    nan.has_nan = True
    return [
        norm_rope(random, "across", 2, 37, 3, 24, "rms", True, 2, 0, "token"),
        nan,
        norm_rope(random, "per-head", 2, 19, 5, 72, "layer", False, 1, 2, "head", False),
        norm_rope(random, "layer-across", 3, 11, 2, 10, "layer", True, 1, 1, "sample"),
        norm_rope(random, "rotary", 2, 21, 3, 16, angles="sample", interleaved=False),
        norm_rope(random, "norm", 1, 65, 20, 16, "rms"),
        norm_rope(random, "wide", 1, 3, 40, 128, "rms", True, 2, 0, "token"),
        replace(norm_rope(random, "offset", 1, 9, 2, 24, "rms", False, 1, 0, "token"), layout="offset"),
    ]


def speed_cases(random: Random, tokens: int) -> Iterator[tuple[str, Callable[[], Case]]]:
    """What :mod:`..faster` times, on about so many tokens: Wan's norm across heads, and one over each head."""
    heads, head_dim = (12, 96) if tokens >= MODEL_SIZED else (2, 8)
    for detail, across in (("across", True), ("per head", False)):
        yield (
            f"norm_rope {detail}",
            partial(norm_rope, random, "", 1, tokens, heads, head_dim, "rms", across, 2 if across else 1, 0, "token"),
        )
