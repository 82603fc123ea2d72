"""Sequence parallel training: the tokens of a sample divided among ranks.

Tokens ``[B, T * H * W, D]`` are divided by frames, time slowest: each of K ranks has ``T / K`` frames of the samples,
and of a number that K does not divide the first ranks have one more. What works on single tokens, and attention inside
a frame, needs nothing else. Other attention takes one all-to-all, and one back:

    over time    T / K frames, all places    ->    all frames, H W / K places    (DSP)
    joint        N / K tokens, all heads     ->    all tokens, heads / K         (Ulysses)

Every rank computes the whole loss from the joined output, and hands back the gradient of its own part of it alone. The
gradients of parameters are therefore parts, whose *sum* over these ranks is that of one process.

Source: DSP, Zhao et al. 2024 (arXiv 2403.10266); Ulysses, Jacobs et al. 2023 (arXiv 2309.14509).
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


class Line(NamedTuple):
    """The ranks that divide the tokens of the same samples, in the order of the frames; ``group`` is theirs.

    Without a group nothing is sent. ``given`` counts the bytes that this rank gives to each collective, sent or not.
    """

    rank: int = 0
    ranks: int = 1
    group: dist.ProcessGroup | None = None
    given: Counter[str] | None = None


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
    """Raises ValueError unless each of so many ranks gets a part of all of the counts, which are known by name."""
    if ranks == 1:
        return
    if not counts:
        raise ValueError(f"parallel.sequence is {ranks}; it must be 1, for an autoencoder has no tokens to divide")
    most = min(counts.values())
    if ranks > most:
        named = ", ".join(f"{name} ({count})" for name, count in counts.items())
        raise ValueError(f"parallel.sequence is {ranks}; each rank needs a part of {named}: it must be at most {most}")


def _sizes(count: int) -> list[int]:
    """How many of ``count`` each rank has."""
    even, more = count // _line.ranks, count % _line.ranks  # Dynamo knows no divmod of a symbolic size
    return [even + (rank < more) for rank in range(_line.ranks)]


def part(count: int) -> int:
    """How many of ``count`` this rank has."""
    return _sizes(count)[_line.rank]


def own(x: Tensor, dim: int, count: int | None = None) -> Tensor:
    """This rank's part of what every rank has whole; the axis has ``count`` equal pieces, by default of size 1."""
    if _line.ranks == 1:
        return x
    pieces = x.shape[dim] if count is None else count
    return x.split([n * (x.shape[dim] // pieces) for n in _sizes(pieces)], dim)[_line.rank]


def joined(x: Tensor, dim: int, count: int) -> Tensor:
    """The whole, whose axis has ``count`` pieces, of this rank's part; the gradient is that of the own part."""
    return _Join.apply(x, dim, count) if _line.ranks > 1 else x


def swap(x: Tensor, split: int, join: int, count: int) -> Tensor:
    """The axis ``split`` divided and the axis ``join`` whole, of size ``count``, where it was the other way round."""
    return _Swap.apply(x, split, join, count) if _line.ranks > 1 else x


def _count(collective: str, x: Tensor) -> None:
    if _line.given is not None:
        _line.given[collective] += x.nbytes


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, count: int) -> Tensor:
        ctx.axis = dim, count
        sizes = [n * (x.shape[dim] // part(count)) for n in _sizes(count)]
        # A collective of equal parts: those that lack a piece are filled up.
        filled = F.pad(x, (0, 0) * (x.dim() - 1 - dim) + (0, sizes[0] - x.shape[dim])).contiguous()
        parts = [torch.empty_like(filled) for _ in sizes]
        if _line.group is not None:
            dist.all_gather(parts, filled, group=_line.group)
        _count("allgather", filled)
        return torch.cat([each.narrow(dim, 0, size) for each, size in zip(parts, sizes, strict=True)], dim)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return own(gradient, *ctx.axis), None, None


class _Swap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, split: int, join: int, count: int) -> Tensor:
        ctx.axes = split, join, x.shape[split]
        return _exchanged(x, split, join, count)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        split, join, count = ctx.axes
        return _exchanged(gradient, join, split, count), None, None, None


def _exchanged(x: Tensor, split: int, join: int, count: int) -> Tensor:
    sent = x.movedim(split, 0).contiguous()
    shapes = []
    for n in _sizes(count):
        shape = list(x.shape)
        shape[join], shape[split] = n, part(x.shape[split])
        shapes.append([shape.pop(split), *shape])
    sizes = [math.prod(shape) for shape in shapes]
    received = x.new_empty(sum(sizes))
    if _line.group is not None:
        dist.all_to_all_single(received, sent, sizes, _sizes(x.shape[split]), group=_line.group)
    _count("alltoall", sent)
    parts = zip(received.split(sizes), shapes, strict=True)
    return torch.cat([each.view(shape).movedim(0, split) for each, shape in parts], join)
