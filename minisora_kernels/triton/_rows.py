"""Tokens [B, N, D] modulated by rows [B, R, D]: how a program holds tokens, and sums over the tokens of a row.

A token lies in the registers of ``lanes`` neighbouring threads: each takes ``vector`` columns (16 bytes) of one chunk
after the other, and the last chunk is as narrow as a power of two allows. So 1152 columns are 9 chunks of 128, or 4 of
256 and one of 128; a tile of the next power of two would leave 44% of the lanes without work. A chunk of some tokens is
a tensor ``[rows, lanes, vector]``, the tokens are a tuple of chunks. A thread has columns of one token only, so a sum
over D is one within the thread, then one over the lanes, which needs no shared memory while they are of one warp.

A sum over tokens has two stages: a program adds up a run of neighbouring tokens in registers and leaves a partial sum,
a second kernel adds those of a row. Runs, and so the order of every sum, depend on shapes and dtypes alone. How many
programs take them depends on the GPU: as many as it holds at once, with equally many runs each.

With an index of the tokens' rows, a kernel first sorts the tokens by row. Runs are then of neighbours in that order:
one begins at every multiple of its length, and one more where a row begins between two of those. So their number, which
the host must know, depends on shapes alone, and the order of a sum on the index too. What an index has beyond the rows
is taken for the nearest row.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import lcm, prod
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import load, store
from ._launch import Launch, Like, architecture, dense, multiprocessors
from ._tiles import AHEAD, sizes

# The most columns of a token that a thread holds, and the most tokens that a program takes at a time. A backward has
# sums for two or three parameters and rows of one or two in registers too, and takes few tokens because a tile does not
# reach over the end of a row.
FORWARD, BACKWARD = (96, 128), (24, 16)
MANY_SUMS = 12, 16  # a backward with four sums or more, of tokens that then still fit 16 warps
KEPT = tl.constexpr(4096)  # columns of the widest tokens whose rows a backward keeps

# Runs are as long as makes RUNS of them, two or three for every multiprocessor of a large GPU. With MIN_RUN tokens the
# partial sums are 17% of what the backward of adaln in bfloat16 reads and writes, with MAX_RUN 4%.
MIN_RUN, MAX_RUN, RUNS = 8, 32, 384

# Shared memory of a multiprocessor in KiB, by architecture, of which a program may have all but one; newer ones than
# sm_80 that are not named have 100.
SHARED = {80: 164, 90: 228, 100: 228}
SCRATCH = 3 << 10  # of it, for what threads exchange, and what the system keeps
TILES_AHEAD = 4  # at most, for each has addresses in registers


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


class Depth(NamedTuple):
    """How far a backward reads ahead: ``stages`` of its loop, the tiles read ahead plus 2, or 1 where none is.

    ``programs`` are on a multiprocessor at once.
    """

    stages: int
    programs: int


def depth_of(tile: Tile, warps: int, *dtypes: torch.dtype) -> Depth:
    """For tiles of tokens of ``dtypes``: as many tiles ahead as have the bytes wanted, or as fit the shared memory.

    They are copied there while a program computes, so that what it waits for is on its way.
    """
    target, wanted = architecture(), sizes(AHEAD)
    shared = (SHARED.get(target, 100) << 10) if target >= 80 else 0
    programs = max(wanted.warps // warps, 1)
    whole, rest = divmod(tile.width, tile.lanes * tile.vector)
    columns = whole * tile.vector + triton.next_power_of_2(triton.cdiv(rest, tile.lanes))  # of a thread
    each = tile.rows * tile.lanes * columns * sum(dtype.itemsize for dtype in dtypes)
    ahead = min(triton.cdiv(wanted.bytes, each), (shared - SCRATCH) // each - 1, TILES_AHEAD)
    if ahead < 1:
        return Depth(1, programs)
    return Depth(ahead + 2, min(programs, shared // ((ahead + 1) * each + SCRATCH)))


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
def kept(row, column, tile: tl.constexpr):
    """A row of a parameter for each token of a tile, in its own dtype: what a program holds through a run.

    Of wide tokens, whose rows do not fit the registers, where it lies.
    """
    out = ()
    for c in tl.static_range(chunks(tile)):
        each = row + column[c]
        if tile.width <= KEPT:
            each = tl.load(each, mask_of(tl.arange(0, tile.rows)[:, None, None] >= 0, column[c], tile, c), other=0.0)
        out = out + (each,)
    return out


@triton.jit
def chunk_of(rows, c: tl.constexpr, mask, tile: tl.constexpr):
    """Chunk ``c`` of what :func:`kept` returned, in fp32."""
    value = rows[c]
    if tile.width > KEPT:
        value = tl.load(value, mask, other=0.0)
    return value.to(tl.float32)


@triton.jit
def row_of(parameter, sample_stride, row_stride, sample, token, row_tokens):
    """Where the row of a token of a sample begins."""
    return parameter + sample.to(tl.int64) * sample_stride + (token // row_tokens).to(tl.int64) * row_stride


@triton.jit
def row_by_index(index, token, mask, rows):
    """The row that an index names for a token."""
    row = tl.load(index + token, mask, other=0)
    return tl.minimum(tl.maximum(row, 0), rows - 1).to(tl.int32)


# The numbers that tell a kernel its runs. It is not compiled anew for others.
RUN_NUMBERS = ("runs", "tokens", "row_tokens", "run_tokens", "index_rows", "index_sample", "first_sample")
SORTED = 1024  # tokens that a program of the sort looks at in one go


@triton.jit(do_not_specialize=["tokens", "rows"])
def _sort(index_ptr, first_ptr, order_ptr, tokens, rows, BLOCK: tl.constexpr):
    """The tokens of one row of one sample, in their order, behind those of the rows before; and where they begin."""
    row = tl.program_id(0)
    sample = tl.program_id(1).to(tl.int64)
    index = index_ptr + sample * tokens
    order = order_ptr + sample * tokens
    first = first_ptr + sample * (rows + 1)
    before = tl.zeros([BLOCK], tl.int32)
    for begin in range(0, tokens, BLOCK):
        token = begin + tl.arange(0, BLOCK)
        named = tl.where(token < tokens, row_by_index(index, token, token < tokens, rows), rows)
        before += (named < row).to(tl.int32)
    place = tl.sum(before, 0)
    tl.store(first + row, place)
    if row == rows - 1:
        tl.store(first + rows, tokens)
    for begin in range(0, tokens, BLOCK):
        token = begin + tl.arange(0, BLOCK)
        named = tl.where(token < tokens, row_by_index(index, token, token < tokens, rows), rows)
        here = (named == row).to(tl.int32)
        tl.store(order + place + tl.cumsum(here, 0) - 1, token, here != 0)
        place += tl.sum(here, 0)


@triton.jit
def sorted_run_of(run, index_ptr, first_ptr, order_ptr, index_sample, first_sample, index_rows, tokens, run_tokens):
    """A run of sorted tokens: its first place and the one after its last, its sample, and its row."""
    blocks = tl.cdiv(tokens, run_tokens)
    sample = run // (blocks + index_rows)
    number = run % (blocks + index_rows)
    whole = number < blocks  # begins at a multiple of the length
    index = index_ptr + sample.to(tl.int64) * index_sample
    token = tl.load(order_ptr + sample.to(tl.int64) * index_sample + number * run_tokens, whole, other=0)
    row = tl.where(whole, row_by_index(index, token, whole, index_rows), number - blocks)
    first = first_ptr + sample.to(tl.int64) * first_sample + row
    begin = tl.where(whole, number * run_tokens, tl.load(first))
    end = tl.minimum((begin // run_tokens + 1) * run_tokens, tl.load(first + 1))
    return begin, tl.where(whole | (begin % run_tokens != 0), end, begin), sample, row


@triton.jit
def run_of(run, tokens, row_tokens, run_tokens):
    """A run: its first token and the one after its last, over all samples; its sample, and begin there."""
    row_runs = tl.cdiv(row_tokens, run_tokens)
    row = run // row_runs
    begin = row * row_tokens + run % row_runs * run_tokens
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
def store_sum(out_ptr, sums_ptr, SLOT: tl.constexpr, run, runs, value, column, mask, tile: tl.constexpr):
    """``value`` is a chunk of a run's sum: of the gradient itself, or a partial sum where there is a slot for it."""
    at = tl.cast(run, tl.int64) * tile.width + column
    if SLOT is None:
        store(out_ptr + at, value, mask)
    else:
        slots = SLOT * runs.to(tl.int64) * tile.width
        tl.store(sums_ptr + slots + at, value, mask)


DEPTH, COLUMNS = 64, 32  # a tile of the second stage: 64 loads of 128 bytes in flight
SUMS = 6  # the most gradients that it adds up


@triton.jit
def _add_up(
    partial_ptr,
    out_ptr,
    first_ptr,
    rows,
    count,
    blocks,
    run_tokens,
    index_rows,
    first_sample,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Adds up ``count`` partial sums for each of ``rows`` rows; in float64, for a long clip has thousands of them.

    With an index, rows have the sums of the blocks that begin in them, and one more.
    """
    columns: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    row = (tl.program_id(0) // columns).to(tl.int64)
    if row < rows:
        column = tl.program_id(0) % columns * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        start = row * count
        last = start + count - 1
        if first_ptr is not None:
            if rows > 1:  # else all sums are of the one row, or of what has none
                sample = row // index_rows
                first = first_ptr + sample * first_sample + row % index_rows
                begin = tl.cdiv(tl.load(first), run_tokens)
                start = sample * (blocks + index_rows)
                last = start + blocks + row % index_rows
                start += begin
                count = tl.cdiv(tl.load(first + 1), run_tokens) - begin + 1
        sums = tl.zeros([DEPTH, COLUMNS], tl.float64)
        for begin in range(0, count, DEPTH):
            run = begin + tl.arange(0, DEPTH)[:, None]
            at = start + run
            if first_ptr is not None:
                at = tl.where(run < count - 1, at, last)
            sums += load(partial_ptr + at * WIDTH + column, (run < count) & (column < WIDTH))
        store(out_ptr + row * WIDTH + column, tl.sum(sums, 0)[None, :].to(tl.float32), column < WIDTH)


_NUMBERS = ("runs", "rows0", "rows1", "rows2", "rows3", "rows4", "rows5")


@triton.jit(do_not_specialize=[*_NUMBERS, "blocks", "run_tokens", "index_rows", "first_sample"])
def _add_up_all(
    sums_ptr,
    out0_ptr,
    out1_ptr,
    out2_ptr,
    out3_ptr,
    out4_ptr,
    out5_ptr,
    first_ptr,
    runs,
    rows0,
    rows1,
    rows2,
    rows3,
    rows4,
    rows5,
    blocks,
    run_tokens,
    index_rows,
    first_sample,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    slots = runs.to(tl.int64) * WIDTH
    by = (blocks, run_tokens, index_rows, first_sample)
    if tl.program_id(1) == 0:
        _add_up(sums_ptr, out0_ptr, first_ptr, rows0, runs // rows0, *by, WIDTH, DEPTH, COLUMNS)
    if out1_ptr is not None:
        if tl.program_id(1) == 1:
            _add_up(sums_ptr + slots, out1_ptr, first_ptr, rows1, runs // rows1, *by, WIDTH, DEPTH, COLUMNS)
    if out2_ptr is not None:
        if tl.program_id(1) == 2:
            _add_up(sums_ptr + 2 * slots, out2_ptr, first_ptr, rows2, runs // rows2, *by, WIDTH, DEPTH, COLUMNS)
    if out3_ptr is not None:
        if tl.program_id(1) == 3:
            _add_up(sums_ptr + 3 * slots, out3_ptr, first_ptr, rows3, runs // rows3, *by, WIDTH, DEPTH, COLUMNS)
    if out4_ptr is not None:
        if tl.program_id(1) == 4:
            _add_up(sums_ptr + 4 * slots, out4_ptr, first_ptr, rows4, runs // rows4, *by, WIDTH, DEPTH, COLUMNS)
    if out5_ptr is not None:
        if tl.program_id(1) == 5:
            _add_up(sums_ptr + 5 * slots, out5_ptr, first_ptr, rows5, runs // rows5, *by, WIDTH, DEPTH, COLUMNS)


class Runs:
    """Tokens ``[B, N, D]`` cut into runs, each within a row of every parameter that the kernel reads or sums.

    ``rows`` has the numbers of rows of those that it reads, ``gradients`` the shapes of those that it sums, or None
    where one is not asked for. A parameter with a row a token has no sums: its gradient is written token by token, and
    its rows cut nothing. Where others have different rows, the coarser one gets a partial sum for each row of the
    finer. Where a run has a row of its own, its sum is the gradient. The gradients of the others have a slot each in
    one tensor of partial sums. With an ``index`` all rows are of one number, and all gradients have a slot.
    """

    def __init__(
        self,
        shape: torch.Size,
        tile: Tile,
        rows: Sequence[int],
        gradients: Sequence[tuple[int, ...] | None],
        index: Like | None,
    ) -> None:
        batch, tokens, self._width = shape
        summed = [gradient[1] for gradient in gradients if gradient is not None and len(gradient) == 3]
        self._index = index
        if index is None:
            count = lcm(*(number for number in (*rows, *summed) if number != tokens))
            self.row_tokens, self.index_rows = tokens // count, 0
        else:
            self.row_tokens, self.index_rows = tokens, max(*rows, *summed, 1)
        run_tokens = min(max(triton.cdiv(batch * tokens, RUNS), MIN_RUN), MAX_RUN)
        self.run_tokens = min(triton.cdiv(run_tokens, tile.rows) * tile.rows, self.row_tokens)
        self._blocks = triton.cdiv(self.row_tokens, self.run_tokens)
        self.count = batch * count * self._blocks if index is None else batch * (self._blocks + self.index_rows)
        # per parameter the slot of its partial sums, if it has any
        self.slots: list[int | None] = []
        self._rows: list[int] = []
        for gradient in gradients:
            numbers = 0 if gradient is None else prod(gradient)
            whole = (self.count * self._width, batch * tokens * self._width) if index is None else ()
            partial = numbers not in (0, *whole)
            self.slots.append(len(self._rows) if partial else None)
            if partial:
                self._rows.append(numbers // self._width)

    def programs(self, depth: Depth, device: int) -> int:
        """Those that take the runs, equally many each, all at once on a device."""
        return triton.cdiv(self.count, triton.cdiv(self.count, multiprocessors(device) * depth.programs))

    @property
    def added(self) -> tuple[int | None, ...]:
        """The parameters whose gradients the second stage takes, in its order; None to fill up its six."""
        order = [place for place, slot in enumerate(self.slots) if slot is not None]
        return (*order, *(None,) * (SUMS - len(order)))

    @property
    def sums(self) -> tuple[int, int]:
        """Size of the tensor of partial sums, in fp32."""
        return len(self._rows) * self.count, self._width

    @property
    def strides(self) -> tuple[int, int]:
        """From one sample to the next in an index, and in the places where the rows of the sorted tokens begin."""
        if self._index is None or len(self._index.shape) == 1:
            return 0, 0
        return self._index.shape[1], self.index_rows + 1

    def sort(self) -> Launch | None:
        """Sorts the tokens: takes the index, and what :class:`Backward` allocates."""
        if self._index is None:
            return None
        samples, tokens = (1, *self._index.shape)[-2:]
        return Launch(_sort, (self.index_rows, samples), tokens, self.index_rows, SORTED)

    def second_stage(self) -> Launch | None:
        """Adds up what the runs left, in one launch for all: takes the sums, six gradients or None, begins of rows."""
        if not self._rows:
            return None
        grid = (max(self._rows) * triton.cdiv(self._width, COLUMNS), len(self._rows))
        rows = self._rows + [1] * (SUMS - len(self._rows))
        division = self._blocks, self.run_tokens, self.index_rows, self.strides[1]
        return Launch(_add_up_all, grid, self.count, *rows, *division, self._width, DEPTH, COLUMNS)


class Backward:
    """The launches of a backward, called one after the other."""

    def __init__(self, first: Launch, runs: Runs) -> None:
        self._sort, self._first, self._second = runs.sort(), first, runs.second_stage()
        self._sums, self._added, self._rows = runs.sums, runs.added, runs.index_rows

    def __call__(
        self,
        inputs: Sequence[Tensor | None],
        index: Tensor | None,
        outputs: Sequence[Tensor | None],
        gradients: Sequence[Tensor | None],
        like: Tensor,
    ) -> None:
        """Fills ``outputs`` and ``gradients``; what is between is on the device of ``like``."""
        first = order = sums = None
        if self._sort is not None and index is not None:
            first = index.new_empty((*index.shape[:-1], self._rows + 1), dtype=torch.int32)
            order = torch.empty_like(index, dtype=torch.int32)
            self._sort(index, first, order)
        if self._second is not None:
            sums = like.new_empty(self._sums, dtype=torch.float32)
        self._first(*inputs, index, first, order, *outputs, *gradients, sums)
        if self._second is not None:
            self._second(sums, *(None if i is None else gradients[i] for i in self._added), first)


def strides_of(name: str, parameter: Like | None) -> tuple[int, int]:
    """From one sample's row to the next sample's, and from row to row, of a parameter that is read where it lies.

    Raises:
        ValueError: the elements of a row do not lie side by side.
    """
    if parameter is None:
        return 0, 0
    if parameter.shape[2] > 1 and parameter.stride[2] != 1:
        raise ValueError(f"{name} must have stride 1 over D, got strides {parameter.stride}")
    return parameter.stride[0], parameter.stride[1]


def gradient_of(like: Tensor, rows: int, dtype: torch.dtype | None) -> Tensor | None:
    """Room for a gradient ``[B, R, D]`` of tokens like ``like``; None where it is not asked for."""
    return None if dtype is None else like.new_empty((like.shape[0], rows, like.shape[2]), dtype=dtype)


def given(like: Tensor, gradients: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """What a raw op returns: a tensor without elements for a gradient that is not asked for."""
    return tuple(like.new_empty(0) if gradient is None else gradient for gradient in gradients)


def tokens_per_row(parameter: Like | None, tokens: int, index: Like | None) -> int:
    return 1 if parameter is None or index is not None else tokens // parameter.shape[1]


def dense_index(index: tuple | None, *parameters: Like | None) -> tuple[Like | None, int, int]:
    """An index, from one sample's to the next, and the number of rows that it names."""
    like = dense("index", index)
    if like is None:
        return None, 0, 0
    return like, like.shape[1] if len(like.shape) == 2 else 0, max(each.shape[1] for each in parameters if each)


def max_itemsize(*dtypes: torch.dtype) -> int:
    """What a tile is made for: threads store 16 bytes of the widest, and less of the others. With more of the widest
    Triton would exchange values between threads before every store.
    """
    return max(dtype.itemsize for dtype in dtypes)
