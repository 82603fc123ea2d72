"""The second stage of sums: adds up the partial sums that the programs of a kernel left, for three results at most."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._common import load, store
from ._launch import Launch, plan

ELEMENTS = tl.constexpr(2048)  # a tile's loads are in flight together: 16 elements a thread
# Programs wanted for each sum: one for each multiprocessor of a large GPU. The partial sums were just written and lie
# in the L2 cache, so a program may take less of a row than memory hands out at a time.
PROGRAMS = 128


@triton.jit
def _sum(parts_ptr, out_ptr, block, parts, size, COLUMNS: tl.constexpr):
    PARTS: tl.constexpr = ELEMENTS // COLUMNS
    columns = block.to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    sums = tl.zeros((PARTS, COLUMNS), tl.float32)
    for first in range(0, parts, PARTS):
        rows = first + tl.arange(0, PARTS).to(tl.int64)
        mask = (rows[:, None] < parts) & (columns[None, :] < size)
        sums += load(parts_ptr + rows[:, None] * size + columns[None, :], mask)
    store(out_ptr + columns, tl.sum(sums, 0), columns < size)


@triton.jit(do_not_specialize=["count0", "count1", "count2"])
def _sum_parts(
    parts0_ptr,
    out0_ptr,
    parts1_ptr,
    out1_ptr,
    parts2_ptr,
    out2_ptr,
    count0,
    size0,
    count1,
    size1,
    count2,
    size2,
    COLUMNS0: tl.constexpr,
    COLUMNS1: tl.constexpr,
    COLUMNS2: tl.constexpr,
):
    block = tl.program_id(0)
    blocks = tl.cdiv(size0, COLUMNS0)
    if block < blocks:
        _sum(parts0_ptr, out0_ptr, block, count0, size0, COLUMNS0)
    if parts1_ptr is not None:
        block -= blocks
        blocks = tl.cdiv(size1, COLUMNS1)
        if (block >= 0) & (block < blocks):
            _sum(parts1_ptr, out1_ptr, block, count1, size1, COLUMNS1)
    if parts2_ptr is not None:
        block -= blocks
        if block >= 0:
            _sum(parts2_ptr, out2_ptr, block, count2, size2, COLUMNS2)


def _columns(count: int, size: int) -> int:
    """Of a tile: few enough for PROGRAMS of them, two at least; no more than leave room for what rows there are."""
    columns = ELEMENTS.value // min(triton.next_power_of_2(max(count, 1)), 16)
    while columns > 2 and triton.cdiv(size, columns) < PROGRAMS:
        columns //= 2
    return columns


@plan
def _plan(sizes, dtypes, device) -> Launch:
    numbers, columns, blocks = [], [], 0
    for all_of_them, size in sizes:
        count = all_of_them // size
        numbers += [count, size]
        columns.append(_columns(count, size))
        blocks += triton.cdiv(size, columns[-1])
    missing = 3 - len(sizes)
    return Launch(_sum_parts, (blocks,), *numbers, *(0, 0) * missing, *columns, *(1,) * missing)


def sum_parts(*sums: tuple[Tensor, Tensor] | None) -> None:
    """For each pair of contiguous ``(parts [P, ...], out)``: ``out``, as parts added over P in fp32, in an order that
    depends on their shapes alone. One launch for all.
    """
    tensors: list[Tensor] = []
    sizes, dtypes = [], []
    for pair in sums:
        if pair is not None and (size := pair[1].numel()):
            tensors += pair
            sizes.append((pair[0].numel(), size))
            dtypes += [pair[0].dtype, pair[1].dtype]
    if tensors:
        missing = (None,) * (6 - len(tensors))
        _plan(tuple(sizes), tuple(dtypes), tensors[0].get_device())(*tensors, *missing)
