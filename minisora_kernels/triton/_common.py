"""What the Triton kernels share."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backends import INTERPRETED

_UPCAST = tl.constexpr(INTERPRETED)


@triton.jit
def dot(a, b, acc):
    """``acc + a @ b``, fp32 sums; fp32 operands as fp32, never as TF32.

    The interpreter of Triton 3.9 multiplies the bit patterns of bfloat16 operands. There they are widened first, which
    is exact: a product of two bfloat16 fits in fp32. tests/test_triton.py shows the flaw, and fails when it is gone.
    """
    if _UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


PARTS, COLUMNS = 16, 128  # a tile of sum_parts: all its loads are in flight together


@triton.jit(do_not_specialize=["parts"])
def _sum_parts(parts_ptr, out_ptr, parts, size, PARTS: tl.constexpr, COLUMNS: tl.constexpr):
    columns = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    sums = tl.zeros((PARTS, COLUMNS), tl.float32)
    for first in range(0, parts, PARTS):
        rows = first + tl.arange(0, PARTS).to(tl.int64)
        mask = (rows[:, None] < parts) & (columns[None, :] < size)
        sums += tl.load(parts_ptr + rows[:, None] * size + columns[None, :], mask, other=0.0)
    tl.store(out_ptr + columns, tl.sum(sums, 0).to(out_ptr.dtype.element_ty), columns < size)


def sum_parts(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """The second stage of a sum: fp32 ``parts [P, ...]`` added over P in an order that depends on P alone."""
    out = parts.new_empty(parts.shape[1:], dtype=dtype)
    _sum_parts[(triton.cdiv(out.numel(), COLUMNS),)](
        parts, out, parts.shape[0], out.numel(), PARTS=PARTS, COLUMNS=COLUMNS
    )
    return out
