"""Sequence parallel training: the tokens of a sample divided among ranks.

Tokens ``[B, T * H * W, D]`` are divided by frames, time slowest: each of K ranks has ``T / K`` frames of the samples.
What works on single tokens, and attention inside a frame, needs nothing else. Other attention takes one all-to-all, and
one back:

    over time    T / K frames, all places    ->    all frames, H W / K places    (DSP)
    joint        N / K tokens, all heads     ->    all tokens, heads / K         (Ulysses)

Every rank computes the whole loss from the joined output, and hands back the gradient of its own part of it alone. The
gradients of parameters are therefore parts, whose *sum* over these ranks is that of one process.

Source: DSP, Zhao et al. 2024 (arXiv 2403.10266); Ulysses, Jacobs et al. 2023 (arXiv 2309.14509).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Line(NamedTuple):
    """The ranks that divide the tokens of the same samples, in the order of the frames; ``group`` is theirs.

    Without a group nothing is sent, for shapes and sizes alone.
    """

    rank: int = 0
    ranks: int = 1
    group: dist.ProcessGroup | None = None


# As in draws.py, not a context variable.
_line = Line()


@contextlib.contextmanager
def dividing(line: Line) -> Iterator[None]:
    """In the block models divide their tokens among the ranks of a line."""
    global _line
    before, _line = _line, line
    try:
        yield
    finally:
        _line = before


def ranks() -> int:
    """How many ranks divide the tokens now; 1 for none."""
    return _line.ranks


def check_divisible(ranks: int, counts: Mapping[str, int]) -> None:
    """Raises ValueError unless so many ranks divide all of the counts, which are known by name, and there are any."""
    if ranks == 1:
        return
    if not counts:
        raise ValueError(f"parallel.sequence is {ranks}; this model cannot divide its tokens, so it must be 1")
    common = math.gcd(*counts.values())
    if common % ranks:
        named = ", ".join(f"{name} ({count})" for name, count in counts.items())
        allowed = [str(n) for n in range(1, common + 1) if common % n == 0]
        raise ValueError(f"parallel.sequence is {ranks}; it must divide {named}: it may be {', '.join(allowed)}")


def own(x: Tensor, dim: int) -> Tensor:
    """This rank's part of what every rank has whole."""
    return x.chunk(_line.ranks, dim)[_line.rank] if _line.ranks > 1 else x


def joined(x: Tensor, dim: int) -> Tensor:
    """The whole of which ``x`` is this rank's part; the gradient is that of the own part."""
    return _Join.apply(x, dim) if _line.ranks > 1 else x


def swap(x: Tensor, split: int, join: int) -> Tensor:
    """The axis ``split`` divided and the axis ``join`` whole, where it was the other way round: one all-to-all."""
    return _Swap.apply(x, split, join) if _line.ranks > 1 else x


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int) -> Tensor:
        ctx.dim = dim
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(_line.ranks)]
        if _line.group is not None:
            dist.all_gather(parts, x.contiguous(), group=_line.group)
        return torch.cat(parts, dim)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return own(gradient, ctx.dim), None


class _Swap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, split: int, join: int) -> Tensor:
        ctx.axes = split, join
        return _exchanged(x, split, join)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        split, join = ctx.axes
        return _exchanged(gradient, join, split), None, None


def _exchanged(x: Tensor, split: int, join: int) -> Tensor:
    sent = torch.stack(x.chunk(_line.ranks, split))
    received = torch.empty_like(sent)
    if _line.group is not None:
        dist.all_to_all_single(received, sent, group=_line.group)
    return torch.cat(received.unbind(), join)
