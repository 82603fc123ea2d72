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
