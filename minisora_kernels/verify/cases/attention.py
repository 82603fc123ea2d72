"""Cases of attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import minisora_kernels as mk
from minisora_kernels.modulation import Norm

from . import MODEL_SIZED, Case, Random, random_tensors
from .norm_rope import angles_of


def attention(
    random: Random,
    name: str,
    batch: int,
    tokens: int,
    keys: int,
    heads: int,
    head_dim: int,
    lengths: Sequence[int] | None = None,
    masked: bool = False,
    norm: Norm | None = None,
    across: bool = False,
    weights: int = 0,
    biased: bool = False,
    angles: str = "",
    interleaved: bool = True,
) -> Case:  # one argument a column of the tables
    """``masked``: the keys that count are every other one, then the rest; ``weights``: as in norm_rope's cases."""
    tensors = {"q": random(batch, tokens, heads, head_dim) * 1.5}
    tensors |= {name: random(batch, keys, heads, head_dim) * 1.5 for name in ("k", "v")}
    shape = (head_dim,) if weights == 1 else (heads, head_dim)
    if weights:
        tensors |= {name: random(*shape) + 1 for name in ("q_weight", "k_weight")}
    if biased:
        tensors |= {name: random(*shape) for name in ("q_bias", "k_bias")}
    constants: tuple[str, ...] = ()
    if angles:
        tensors |= angles_of(random, angles, batch, tokens, heads, head_dim)
        constants = ("cos", "sin")
    names = [name for name in ("q_weight", "k_weight", "q_bias", "k_bias") if name in tensors]

    def call(t: dict[str, Tensor], **kwargs: Any) -> Tensor:
        if lengths is not None:
            counts = torch.tensor(list(lengths), dtype=torch.int64, device=t["q"].device)
            order = [*range(0, keys, 2), *range(1, keys, 2)]  # of the keys: how soon each counts
            place = torch.tensor([order.index(n) for n in range(keys)], device=t["q"].device)
            kwargs |= {"mask": place < counts[:, None]} if masked else {"lengths": counts}
        rope = mk.Rope(t["cos"], t["sin"], interleaved) if angles else None
        kwargs |= {name: t[name] for name in names}
        return mk.attention(t["q"], t["k"], t["v"], qk_norm=norm, across_heads=across, rope=rope, **kwargs)

    return Case("attention", name, tensors, call, dict.fromkeys(constants, torch.float32), constants)


def cases(draw: int = 0) -> list[Case]:
    """What :mod:`..right` checks: every kernel and every branch of its launcher, on as few numbers as show it."""
    random = random_tensors(8 + 100 * draw)
    nan = attention(random, "beside-nan", 2, 5, 12, 2, 8)
    nan.tensors["q"][0, 3, 1, 2] = float("nan")
    nan.has_nan = True
    return [
        attention(random, "cross", 2, 21, 13, 3, 24),
        nan,
        attention(random, "lengths", 3, 9, 70, 2, 72, [70, 0, 33]),
        attention(random, "mask", 2, 130, 75, 1, 64, [40, 66], True),
        attention(random, "two-keys", 2, 3, 2, 2, 8),
        attention(random, "norm", 2, 33, 33, 2, 16, [33, 20], False, "layer", True, 2, True, "sample"),
        attention(random, "257", 1, 257, 257, 1, 64, None, False, "rms", False, 1, False, "head", False),
        attention(random, "wide-heads", 1, 70, 140, 1, 128),
        replace(attention(random, "offset", 1, 17, 9, 2, 16), layout="offset"),
    ]


def speed_cases(random: Random, tokens: int) -> Iterator[tuple[str, Callable[[], Case]]]:
    """What :mod:`..faster` times, on about so many tokens: video to text, padded or not; and Wan's self-attention."""
    large = tokens >= MODEL_SIZED
    heads, head_dim = (16, 72) if large else (2, 8)
    keys = tokens // 4
    cross = partial(attention, random, "", 2, tokens // 2, keys, heads, head_dim)
    yield "attention plain", cross
    yield "attention padded", partial(cross, [keys, keys // 2])
    whole = tokens // 2
    yield (
        "attention norm",
        partial(attention, random, "", 1, whole, whole, heads, head_dim, None, False, "rms", True, 2, False, "token"),
    )
