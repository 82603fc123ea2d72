"""What the Triton kernels share."""

from __future__ import annotations

import triton
import triton.language as tl

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


@triton.jit
def cast(x, dtype: tl.constexpr):
    """x in ``dtype``, rounded to nearest, ties to even.

    The interpreter of Triton 3.9 cuts off what bfloat16 has no bits for, which doubles the error of every result. There
    these bits are rounded away before.
    """
    if _UPCAST and dtype == tl.bfloat16 and x.dtype == tl.float32:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)
