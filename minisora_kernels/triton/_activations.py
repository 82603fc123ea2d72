"""Activations in fp32: the value, and with it the slope. A kernel gets a form as a constant."""

from __future__ import annotations

import triton
import triton.language as tl

SILU, GELU, GELU_TANH = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # their places in ops/glu_mlp.py

LOG2E = tl.constexpr(1.4426950408889634)
# exp(-2u) = exp2(h * (LINEAR + CUBIC * h^2)) with u = sqrt(2 / pi) * (h + 0.044715 * h^3)
LINEAR = tl.constexpr(-2 * 0.7978845608028654 * 1.4426950408889634)
CUBIC = tl.constexpr(-2 * 0.7978845608028654 * 1.4426950408889634 * 0.044715)
# 2 du/dh = SLOPE + SLOPE_SQUARED * h^2
SLOPE = tl.constexpr(2 * 0.7978845608028654)
SLOPE_SQUARED = tl.constexpr(6 * 0.7978845608028654 * 0.044715)


@triton.jit
def _sigmoid(h, FORM: tl.constexpr, dtype: tl.constexpr):
    """exp(-v), s = sigmoid(v) of v = h or v = 2u: s = (1 + tanh(u)) / 2, with its digits where tanh(u) is near -1."""
    if FORM == SILU:
        e = tl.exp2(h * -LOG2E)
    else:
        e = tl.exp2(h * (LINEAR + CUBIC * (h * h)))
    if dtype == tl.float32:
        s = tl.div_rn(1.0, 1.0 + e)
    else:  # an error of 2 units in the last place of fp32 is nothing
        s = 1.0 / (1.0 + e)
    return e, s


@triton.jit
def _distribution(h):
    """Phi(h), the normal distribution."""
    return 0.5 + 0.5 * tl.erf(h * 0.7071067811865476)


@triton.jit
def activated(h, FORM: tl.constexpr, dtype: tl.constexpr):
    """act(h), of h that was loaded from numbers of ``dtype``."""
    if FORM == GELU:
        s = _distribution(h)
    else:
        _, s = _sigmoid(h, FORM, dtype)
    return h * s


@triton.jit
def activated_and_slope(h, FORM: tl.constexpr, dtype: tl.constexpr):
    """act(h) and act'(h)."""
    if FORM == GELU:
        s = _distribution(h)
        hs = h * s
        slope = s + h * (0.3989422804014327 * tl.exp(-0.5 * h * h))
    else:
        e, s = _sigmoid(h, FORM, dtype)
        hs = h * s
        # 1 - s loses digits where s is near 1, and e may be inf where s is 0
        complement = tl.where(s < 0.5, 1.0 - s, e * s)
        if FORM == SILU:
            slope = s + hs * complement
        else:
            slope = s + hs * complement * (SLOPE + SLOPE_SQUARED * (h * h))
    return hs, slope
