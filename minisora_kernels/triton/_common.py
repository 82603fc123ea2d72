"""What the Triton kernels share."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..backends import INTERPRETED, tf32

_UPCAST = tl.constexpr(INTERPRETED)


class Constants:
    """The fields of a named tuple as a kernel's constants, by the same names.

    Triton before 3.8 takes fields of a named tuple for numbers that are known at run time only. Here each is a
    ``tl.constexpr``, which every Triton keeps as it is; the interpreter wants the bare values.
    """

    def __init__(self, fields: NamedTuple) -> None:
        self._fields = fields
        for name, value in fields._asdict().items():
            setattr(self, name, _constant(value))

    # Triton looks a compiled kernel up by these.
    def __repr__(self) -> str:
        return repr(self._fields)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Constants) and self._fields == other._fields

    def __hash__(self) -> int:
        return hash(self._fields)


def _constant(value: Any) -> Any:
    if isinstance(value, tuple):
        value = tuple(_constant(item) for item in value)
    return value if INTERPRETED else tl.constexpr(value)


constants = cache(Constants)


def precision_of(dtype: torch.dtype) -> str:
    """How kernels multiply: float32 as TF32 where torch lets cuBLAS."""
    return "tf32" if dtype == torch.float32 and tf32() else "ieee"


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """``acc + a @ b``, fp32 sums; fp32 operands as ``precision_of`` says.

    The interpreter of Triton 3.9 multiplies the bit patterns of bfloat16 operands. There they are widened first, which
    is exact: a product of two bfloat16 fits in fp32. tests/ops/test_triton.py shows the flaw, and fails when it is
    gone.
    """
    if _UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


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


@triton.jit
def inverse_root(x):
    """1 / sqrt(x), both steps rounded correctly.

    What ``/``, ``tl.sqrt`` and ``tl.rsqrt`` become on a GPU errs by up to 2 units in the last place. In a statistic,
    where a division a row or channel costs nothing, that is more than all its sums err by.
    """
    return tl.div_rn(1.0, tl.sqrt_rn(x))


@triton.jit
def load(ptr, mask):
    return tl.load(ptr, mask, other=0.0).to(tl.float32)


@triton.jit
def store(ptr, value, mask):
    tl.store(ptr, cast(value, ptr.dtype.element_ty), mask)
