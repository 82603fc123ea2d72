"""guided_step: equation in minisora_kernels/ops/guided_step.py.

A program takes a block of one sample's latents. It reads x, cond, null, z and the variance once, each where it is
given, and the sample's five coefficients, and writes x' once; everything in between stays in registers. There is
nothing to share between elements, so the only concern is the width of the accesses: 8 elements a thread are one
16-byte access in half precision and two in fp32. Blocks do not cross samples, so that the coefficients are scalars.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._common import load, store
from ._launch import Launch, dense, plan, signature

BLOCK, WARPS = 1024, 4


_LOG2E = tl.constexpr(1.4426950408889634)
# ln(2) in two parts; the first has so few bits that a whole number times it is exact
_LN2_HIGH, _LN2_LOW = tl.constexpr(0.693359375), tl.constexpr(-2.12194440e-4)


@triton.jit
def _exp(t):
    """e^t, wrong by at most two units in the last place.

    ``tl.exp`` rounds t log2(e) first, so the error of its result grows with t. Here e^t = 2^n e^r with
    n = floor(t log2(e)); r lies in [0, ln(2)), where Taylor's sum to r^9 misses nothing that float32 could hold.
    """
    t = tl.clamp(t, -104.0, 89.0, propagate_nan=tl.PropagateNan.ALL)
    n = tl.floor(t * _LOG2E)
    r = t - n * _LN2_HIGH - n * _LN2_LOW
    e = r * (1.0 / 9) + 1
    for k in tl.static_range(8, 0, -1):
        e = e * r * (1.0 / k) + 1
    return e * tl.exp2(n)


@triton.jit(do_not_specialize=["row_stride"])
def _update(
    x, cond, null, z, coefficients, out, size, guided, cond_size, row_stride, LEARNED: tl.constexpr, BLOCK: tl.constexpr
):
    blocks = tl.cdiv(size, BLOCK)
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    i = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    row = coefficients + sample * row_stride
    g = load(cond + sample * cond_size + i, inside)
    if null is not None:
        other = load(null + sample * cond_size + i, inside & (i < guided))
        # from cond, not from null: exact where w is 1
        g = tl.where(i < guided, g + (tl.load(row) - 1) * (g - other), g)
    y = tl.load(row + 1) * load(x + sample * size + i, inside) + tl.load(row + 2) * g
    if z is not None:
        factor = tl.load(row + 3)
        if LEARNED:
            v = load(cond + sample * cond_size + size + i, inside)
            factor *= _exp(tl.load(row + 4) * (v - 1))
        y += factor * load(z + sample * size + i, inside)
    store(out + sample * size + i, y, inside)


@plan
def _plan(x, cond, null, z, coefficients, channels, device) -> Launch:
    x, cond = dense("x", x), dense("cond", cond)
    dense("null", null), dense("z", z)
    shape, stride, _ = coefficients
    if shape[1] > 1 and stride[1] != 1:
        raise ValueError(f"coefficients must have stride 1 over its columns, got strides {stride}")
    batch = x.shape[0]
    size, cond_size = x.shape[1:].numel(), cond.shape[1:].numel()
    guided = size // x.shape[1] * channels
    numbers = (size, guided, cond_size, stride[0])
    return Launch(_update, (batch * triton.cdiv(size, BLOCK),), *numbers, cond_size > size, BLOCK, num_warps=WARPS)


def guided_step_fwd(
    x: Tensor, cond: Tensor, null: Tensor | None, z: Tensor | None, coefficients: Tensor, channels: int
) -> Tensor:
    out = x.new_empty(x.shape)
    if out.numel() == 0:
        return out
    inputs = (x, cond, null, z, coefficients)
    _plan(*map(signature, inputs), channels, x.get_device())(*inputs, out)
    return out
