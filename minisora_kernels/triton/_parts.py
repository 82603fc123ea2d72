"""The second stage of sums: adds up the partial sums that the programs of a kernel left, for three results at most."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._common import load, store
from ._launch import Launch, plan

ELEMENTS = tl.constexpr(2048)  # a tile's loads are in flight together: 16 elements a thread


@triton.jit
def _sum(parts_ptr, out_ptr, block, parts, size, PARTS: tl.constexpr):
    COLUMNS: tl.constexpr = ELEMENTS // PARTS
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
    PARTS0: tl.constexpr,
    PARTS1: tl.constexpr,
    PARTS2: tl.constexpr,
):
    block = tl.program_id(0)
    blocks = tl.cdiv(size0, ELEMENTS // PARTS0)
    if block < blocks:
        _sum(parts0_ptr, out0_ptr, block, count0, size0, PARTS0)
    if parts1_ptr is not None:
        block -= blocks
        blocks = tl.cdiv(size1, ELEMENTS // PARTS1)
        if (block >= 0) & (block < blocks):
            _sum(parts1_ptr, out1_ptr, block, count1, size1, PARTS1)
    if parts2_ptr is not None:
        block -= blocks
        if block >= 0:
            _sum(parts2_ptr, out2_ptr, block, count2, size2, PARTS2)


@plan
def _plan(sizes, dtypes, device) -> Launch:
    numbers, parts, blocks = [], [], 0
    for all_of_them, size in sizes:
        count = all_of_them // size
        # The fewer columns, the more rows at a time: enough programs, and few steps of each.
        rows = min(triton.next_power_of_2(max(count, 1)), 128 if size <= 4096 else 16)
        numbers += [count, size]
        parts.append(rows)
        blocks += triton.cdiv(size, ELEMENTS.value // rows)
    missing = 3 - len(sizes)
    return Launch(_sum_parts, (blocks,), *numbers, *(0, 0) * missing, *parts, *(1,) * missing)


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
