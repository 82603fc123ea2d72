"""Sizes that kernels are launched with, by architecture, frozen.

Those of :class:`Ahead` and :class:`Product` leave the order of sums over tokens as it is. :class:`Blocks` sets the
order in which attention takes keys: its bits are those of an architecture. 0 stands for every architecture that is not
named. The compile record holds what the compiler makes of them. `python -m bench.gpu --step tune` measures
:data:`CANDIDATES` on a GPU and writes this file anew; nothing is measured while kernels run. What is here was chosen by
counts.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

from ._launch import architecture


class Ahead(NamedTuple):
    """Of the backwards of modulated tokens: bytes that a program reads ahead, and warps on a multiprocessor."""

    bytes: int
    warps: int


class Product(NamedTuple):
    """Of patch_embed's forward for long patches: tokens of a tile, half of them in float32, bytes of a patch at a step,
    warps and stages.
    """

    tokens: int
    bytes: int
    warps: int
    stages: int


class Blocks(NamedTuple):
    """Of attention: tokens that a program keeps, and tokens that it takes at a step; warps and stages."""

    block: int
    inner: int
    warps: int
    stages: int


Sizes = TypeVar("Sizes", Ahead, Product, Blocks)

# With 26 KB in flight on every multiprocessor an H200 reads at its full speed, by an estimate. Registers hold 8 warps
# of the most that a kernel may have: all programs are there at once, and none waits for another to end.
AHEAD = {
    0: Ahead(bytes=26000, warps=8),
}
# The most tokens that Triton 3.7.1 compiles without spills with 384 columns; 57 KiB of shared memory on sm_80.
PRODUCT = {
    0: Product(tokens=64, bytes=64, warps=8, stages=3),
}
# Attention in 16 bits, heads of up to 80 channels; in windows those of more than 64 tokens. What Triton 3.7.1 compiles
# without spills for heads of 72, in windows with a bias, on sm_80 and sm_90.
ATTENTION_FORWARD = {
    0: Blocks(block=128, inner=64, warps=8, stages=2),
}
ATTENTION_BACKWARD = {
    0: Blocks(block=128, inner=32, warps=8, stages=2),
}
WINDOW_FORWARD = {
    0: Blocks(block=128, inner=64, warps=8, stages=2),
    90: Blocks(block=64, inner=64, warps=4, stages=2),
}
WINDOW_BACKWARD = {
    0: Blocks(block=64, inner=32, warps=8, stages=1),
    90: Blocks(block=64, inner=32, warps=4, stages=2),
}

_FORWARD = [Blocks(block, inner, warps, 2) for block, warps in ((64, 4), (128, 4), (128, 8)) for inner in (32, 64)]
_BACKWARD = [Blocks(block, 32, warps, stages) for block, warps in ((64, 4), (64, 8), (128, 8)) for stages in (1, 2)]
CANDIDATES: dict[str, list[Any]] = {
    "AHEAD": [Ahead(bytes_, warps) for bytes_ in (26_000, 40_000) for warps in (4, 8)],
    "PRODUCT": [
        Product(tokens, bytes_, warps, stages)
        for tokens, warps in ((32, 4), (32, 8), (64, 8), (128, 8))
        for bytes_, stages in ((32, 4), (64, 3), (64, 4))
    ],
    "ATTENTION_FORWARD": _FORWARD,
    "ATTENTION_BACKWARD": _BACKWARD,
    "WINDOW_FORWARD": _FORWARD,
    "WINDOW_BACKWARD": _BACKWARD,
}


def sizes(table: dict[int, Sizes]) -> Sizes:
    """Of the architecture that Triton compiles for."""
    return table.get(architecture(), table[0])
