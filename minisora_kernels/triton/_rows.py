"""Tokens [B, N, D] modulated by rows [B, R, D]: how a program holds tokens, and sums over the tokens of a row.

A token lies in the registers of ``lanes`` neighbouring threads: each takes ``vector`` columns (16 bytes) of one chunk
after the other, and the last chunk is as narrow as a power of two allows. So 1152 columns are 9 chunks of 128, or 4 of
256 and one of 128; a tile of the next power of two would leave 44% of the lanes without work. A chunk of some tokens is
a tensor ``[rows, lanes, vector]``, the tokens are a tuple of chunks. A thread has columns of one token only, so a sum
over D is one within the thread, then one over the lanes, which needs no shared memory while they are of one warp.

A sum over tokens has two stages: a program adds up a run of neighbouring tokens in registers and leaves a partial sum,
a second kernel adds those of a row. Runs, and so the order of every sum, depend on shapes and dtypes alone.
"""

from __future__ import annotations

from functools import lru_cache
from math import lcm
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import FUSED, load, store

# The most columns of a token that a thread holds, and the most tokens that a program takes at a time. A backward, with
# sums for two or three parameters in registers too, has room for two to four blocks of it on a multiprocessor, and
# takes few tokens because a tile does not reach over the end of a row.
FORWARD, BACKWARD = (96, 128), (24, 16)

# Runs are as long as makes RUNS of them, three blocks for every multiprocessor of a large GPU, which holds them all at
# once. With MIN_RUN tokens the partial sums are 17% of what the backward of adaln in bfloat16 reads and writes, with
# MAX_RUN 4%.
MIN_RUN, MAX_RUN, RUNS = 8, 32, 384


class Tile(NamedTuple):
    """The tokens that a program holds at a time; kernels get its ``constants``."""

    width: int
    rows: int
    lanes: int
    vector: int


@lru_cache
def tile_of(width: int, itemsize: int, held: int, rows: int) -> tuple[Tile, int]:
    """The tile, and the number of warps, for tokens of ``width`` elements of ``itemsize`` bytes."""
    vector = 16 // itemsize
    lanes = max(triton.next_power_of_2(triton.cdiv(width, held)), 8)  # 8 read a line of 128 bytes
    lanes = min(lanes, triton.next_power_of_2(triton.cdiv(width, vector)))
    rows = min(max(128 // lanes, 1), rows)
    return Tile(width, rows, lanes, vector), max(rows * lanes // 32, 1)


@triton.constexpr_function
def chunks(tile):
    return triton.cdiv(tile.width, tile.lanes * tile.vector)


@triton.constexpr_function
def _vector(tile, c):
    rest = tile.width - c * tile.lanes * tile.vector
    return min(tile.vector, triton.next_power_of_2(triton.cdiv(rest, tile.lanes)))


@triton.constexpr_function
def padded(tile, c):
    """Whether chunk ``c`` goes beyond the width."""
    return (c * tile.vector + _vector(tile, c)) * tile.lanes > tile.width


@triton.jit
def columns(tile: tl.constexpr):
    """The columns of every chunk."""
    out = ()
    for c in tl.static_range(chunks(tile)):
        start = c * tile.lanes * tile.vector + tl.arange(0, tile.lanes)[:, None] * _vector(tile, c)
        out = out + ((start + tl.arange(0, _vector(tile, c))[None, :])[None],)
    return out


@triton.jit
def mask_of(live, column, tile: tl.constexpr, c: tl.constexpr):
    """What there is of chunk ``c`` of the tokens that are ``live``."""
    mask = live
    if padded(tile, c):
        mask = live & (column < tile.width)
    return mask


@triton.jit
def row_of(parameter, sample, token, row_tokens):
    """Where the row of a token of a sample begins; ``parameter``: see :func:`strided`."""
    return parameter[0] + sample.to(tl.int64) * parameter[1] + (token // row_tokens).to(tl.int64) * parameter[2]


@triton.jit
def run_of(tokens, row_tokens, run_tokens):
    """This program's run: its first token and the one after its last, over all samples; its sample, and begin there."""
    row_runs = tl.cdiv(row_tokens, run_tokens)
    row = tl.program_id(0) // row_runs
    begin = row * row_tokens + tl.program_id(0) % row_runs * run_tokens
    end = tl.minimum(begin + run_tokens, (row + 1) * row_tokens)
    return begin, end, begin // tokens, begin % tokens


@triton.jit
def zeros(tile: tl.constexpr):
    sums = ()
    for c in tl.static_range(chunks(tile)):
        sums = sums + (tl.zeros([tile.rows, tile.lanes, _vector(tile, c)], tl.float32),)
    return sums


@triton.jit
def add(sums, c: tl.constexpr, value):
    """``sums`` with ``value`` added to chunk ``c``."""
    return sums[:c] + (sums[c] + value,) + sums[c + 1 :]


@triton.jit
def store_sum(out_ptr, value, column, mask, tile: tl.constexpr):
    """``value`` is a chunk of this run's sum."""
    store(out_ptr + tl.program_id(0).to(tl.int64) * tile.width + column, value, mask)


DEPTH, COLUMNS = 64, 32  # a tile of the second stage: 64 loads of 128 bytes in flight


@triton.jit
def _add_up(partial_ptr, out_ptr, rows, count, width: tl.constexpr, DEPTH: tl.constexpr, COLUMNS: tl.constexpr):
    """Adds up ``count`` partial sums for each of ``rows`` rows; in float64, for a long clip has thousands of them."""
    blocks: tl.constexpr = (width + COLUMNS - 1) // COLUMNS
    row = (tl.program_id(0) // blocks).to(tl.int64)
    if row < rows:
        column = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        sums = tl.zeros([DEPTH, COLUMNS], tl.float64)
        for first in range(0, count, DEPTH):
            run = first + tl.arange(0, DEPTH)[:, None]
            sums += load(partial_ptr + (row * count + run) * width + column, (run < count) & (column < width))
        store(out_ptr + row * width + column, tl.sum(sums, 0)[None, :].to(tl.float32), column < width)


@triton.jit(do_not_specialize=["runs", "rows0", "rows1", "rows2", "rows3", "rows4"])
def _add_up_all(
    partials,
    gradients,
    runs,
    rows0,
    rows1,
    rows2,
    rows3,
    rows4,
    width: tl.constexpr,
    DEPTH: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    rows = (rows0, rows1, rows2, rows3, rows4)
    for k in tl.static_range(len(gradients)):
        if tl.program_id(1) == k:
            _add_up(partials[k], gradients[k], rows[k], runs // rows[k], width, DEPTH, COLUMNS)


class Runs:
    """The tokens of ``like`` cut into runs, each within a row of every one of ``parameters`` that is summed.

    A parameter with a row a token has no sums: its gradient is written token by token, and its rows cut nothing. Where
    others have different rows, the coarser one gets a partial sum for each row of the finer.
    """

    def __init__(self, like: Tensor, tile: Tile, *parameters: Tensor | None) -> None:
        batch, tokens, self._width = like.shape
        rows = lcm(*(p.shape[1] for p in parameters if p is not None and p.shape[1] != tokens))
        self._all_tokens = batch * tokens
        self.row_tokens = tokens // rows
        run_tokens = min(max(triton.cdiv(self._all_tokens, RUNS), MIN_RUN), MAX_RUN)
        self.run_tokens = min(triton.cdiv(run_tokens, tile.rows) * tile.rows, self.row_tokens)
        self.count = batch * rows * triton.cdiv(self.row_tokens, self.run_tokens)
        self._sums: list[tuple[Tensor, Tensor, int]] = []

    def target(self, gradient: Tensor | None) -> Tensor | None:
        """Where a kernel writes for ``gradient [..., D]``: in place if a run or a token has a row, else a row a run."""
        if gradient is None or gradient.numel() in (self.count * self._width, self._all_tokens * self._width):
            return gradient
        partial = gradient.new_empty((self.count, self._width), dtype=torch.float32)
        self._sums.append((partial, gradient, gradient.numel() // self._width))
        return partial

    def finish(self) -> None:
        """Add up what the runs left, in one launch for all gradients."""
        if not self._sums:
            return
        partials, gradients, rows = zip(*self._sums, strict=True)
        grid = (max(rows) * triton.cdiv(self._width, COLUMNS), len(rows))
        rows += (1,) * (5 - len(rows))
        _add_up_all[grid](partials, gradients, self.count, *rows, self._width, DEPTH, COLUMNS, **FUSED)


def strided(name: str, parameter: Tensor | None) -> tuple[Tensor, int, int] | None:
    """``parameter [B, R, D]`` for a kernel that reads it in place."""
    if parameter is None:
        return None
    if parameter.shape[2] > 1 and parameter.stride(2) != 1:
        raise ValueError(f"{name} must have stride 1 over D, got strides {parameter.stride()}")
    return parameter, parameter.stride(0), parameter.stride(1)


def tokens_per_row(parameter: Tensor | None, tokens: int) -> int:
    return 1 if parameter is None else tokens // parameter.shape[1]


def max_itemsize(*tensors: Tensor | None) -> int:
    """What a tile is made for: threads store 16 bytes of the widest, and less of the others. With more of the widest
    Triton would exchange values between threads before every store.
    """
    return max(tensor.element_size() for tensor in tensors if tensor is not None)
