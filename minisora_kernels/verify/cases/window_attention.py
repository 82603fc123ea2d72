"""Cases of window_attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor

import minisora_kernels as mk
from minisora_kernels.modulation import Norm

from . import MODEL_SIZED, Case, Random, random_tensors, side_of


def window_attention(
    random: Random,
    name: str,
    batch: int,
    grid: tuple[int, int, int],
    window: tuple[int, int, int],
    heads: int,
    head_dim: int,
    norm: Norm | None = None,
    weights: int | None = None,
    rotary: str | None = None,
    biased: bool = False,
) -> Case:  # one argument a column of the tables
    """``weights``: None, 1 for all heads together, 2 a head; ``rotary``: None, "interleaved" or "half"."""
    length = prod(window)
    tensors = {"qkv": random(batch, prod(grid), 3, heads, head_dim) * 1.5}
    if weights is not None:
        shape = (head_dim,) if weights == 1 else (heads, head_dim)
        tensors |= {"q_weight": random(*shape) + 1, "k_weight": random(*shape) + 1}
    if biased:
        tensors["bias"] = random(heads, length, length)
    constants: tuple[str, ...] = ()
    if rotary is not None:
        angles = mk.rope_3d(grid, head_dim)
        tensors |= {"cos": angles.cos.double(), "sin": angles.sin.double()}
        constants = ("cos", "sin")

    def call(t: dict[str, Tensor], **kwargs: Any) -> Tensor:
        rope = mk.Rope(t["cos"], t["sin"], rotary == "interleaved") if rotary else None
        kwargs |= {name: t.get(name) for name in ("q_weight", "k_weight", "bias")}
        return mk.window_attention(t["qkv"], grid, window, qk_norm=norm, rope=rope, **kwargs)

    return Case("window_attention", name, tensors, call, dict.fromkeys(constants, torch.float32), constants)


def cases(draw: int = 0) -> list[Case]:
    """What :mod:`..right` checks: every kernel and every branch of its launcher, on as few numbers as show it."""
    random = random_tensors(1 + 100 * draw)
    nan = window_attention(random, "packed-beside-nan", 2, (5, 2, 3), (5, 1, 1), 2, 8)
    nan.tensors["qkv"][0, 1] = float("nan")  # the second place, in the first frame: one window of the first sample
    nan.has_nan = True
    return [
        nan,
        window_attention(random, "16x72", 1, (16, 1, 2), (16, 1, 1), 2, 72, "rms", 1, "interleaved"),
        window_attention(random, "32x64", 2, (32, 1, 2), (32, 1, 1), 2, 64),
        window_attention(random, "48-bias", 1, (1, 8, 12), (1, 8, 6), 2, 64, None, None, None, True),
        window_attention(random, "spatial", 3, (2, 3, 4), (1, 3, 4), 2, 16, "layer", 2, "half"),
        window_attention(random, "ragged", 2, (5, 7, 6), (2, 3, 4), 2, 8, "rms", 1, "half", True),
        window_attention(random, "alone", 2, (2, 2, 3), (1, 1, 1), 2, 8),
        window_attention(random, "257", 1, (1, 1, 257), (1, 1, 257), 1, 64, None, None, "interleaved"),
        window_attention(random, "162-bias", 1, (2, 9, 10), (2, 9, 9), 2, 16, "layer", 2, None, True),
        window_attention(random, "320-bias", 1, (5, 8, 8), (5, 8, 8), 2, 72, None, None, None, True),
        window_attention(random, "600", 1, (6, 10, 10), (6, 10, 10), 1, 64, "rms", 1, "half"),
        window_attention(random, "wide-heads", 1, (2, 9, 9), (2, 9, 9), 1, 128),
        replace(window_attention(random, "offset", 1, (4, 3, 4), (4, 1, 1), 2, 16, "rms", 1, "half"), layout="offset"),
        replace(window_attention(random, "offset-long", 1, (2, 9, 9), (2, 9, 9), 1, 64), layout="offset"),
    ]


def speed_cases(random: Random, tokens: int) -> Iterator[tuple[str, Callable[[], Case]]]:
    """What :mod:`..faster` times, on about so many tokens."""
    side = side_of(tokens)
    heads, head_dim = (16, 72) if tokens >= MODEL_SIZED else (2, 8)
    windows = {
        "short": ((16, side, side), (16, 1, 1)),
        "long": ((max(1, tokens // 256), 16, 16), (1, 16, 16)) if tokens >= MODEL_SIZED else ((1, 9, 9), (1, 9, 9)),
    }
    for length, (grid, window) in windows.items():
        for kind in ("plain", "norm", "bias"):
            of_windows = partial(window_attention, random, "", 1, grid, window, heads, head_dim)
            if kind == "norm":
                of_windows = partial(of_windows, norm="rms", weights=1, rotary="interleaved")
            yield f"window_attention {length} {kind}", partial(of_windows, biased=kind == "bias")
