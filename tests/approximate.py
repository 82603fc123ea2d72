"""Gives Triton's interpreter the errors of a GPU's approximate instructions, so that a test sees what they cost.

The interpreter computes with NumPy, correctly rounded. What Triton compiles ``/``, ``tl.sqrt``, ``tl.rsqrt``,
``tl.exp`` and ``tl.exp2`` to in float32 is not. The bounds are those of the PTX ISA, "Floating-Point Instructions":
div.full.f32 errs by 2 ulp, sqrt.approx.f32 by 2^-23 of the result, rsqrt.approx.f32 by 2^-22.9, ex2.approx.f32 by
2^-22.5; ``tl.exp`` is ex2 of the rounded product with log2(e). ``tl.div_rn`` and ``tl.sqrt_rn`` stay exact, as on a
GPU.

An error is anything up to the bound, drawn from the bits of the operands: the same operands always give the same
result. A result that float32 holds exactly is left alone, so that 1 / 1 stays 1. conftest.py installs this where
MINISORA_APPROXIMATE=1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

# The largest error relative to the exact result. An ulp is at most 2^-23 of it.
DIVISION, ROOT, INVERSE_ROOT, POWER = 2 * 2.0**-23, 2.0**-23, 2.0**-22.9, 2.0**-22.5
LOG2E = np.float32(1.4426950408889634)


def noise(operands: tuple[np.ndarray, ...], shape: tuple[int, ...]) -> np.ndarray:
    """Numbers in [-1, 1) that depend on the operands' bits alone, spread evenly."""
    mixed = np.full(shape, 0x9E3779B9, np.uint32)
    for operand in operands:
        bits = np.broadcast_to(np.asarray(operand, np.float32), shape).copy().view(np.uint32)
        mixed = (mixed ^ bits) * np.uint32(2654435761)
        mixed ^= mixed >> np.uint32(15)
        mixed *= np.uint32(2246822519)
        mixed ^= mixed >> np.uint32(13)
    return mixed / 2.0**31 - 1


def approximate(exact: Callable[..., np.ndarray], bound: float, *operands: np.ndarray) -> np.ndarray:
    """``exact`` of float32 operands, in float32, with an error of at most ``bound`` times the result."""
    with np.errstate(all="ignore"):
        wide = exact(*(np.asarray(operand, np.float64) for operand in operands))
        rounded = wide.astype(np.float32)
        erring = (wide * (1 + bound * noise(operands, wide.shape))).astype(np.float32)
    return np.where((rounded == wide) | ~np.isfinite(rounded), rounded, erring)


def division(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return approximate(np.divide, DIVISION, a, b)


def root(a: np.ndarray) -> np.ndarray:
    return approximate(np.sqrt, ROOT, a)


def inverse_root(a: np.ndarray) -> np.ndarray:
    return approximate(lambda x: 1 / np.sqrt(x), INVERSE_ROOT, a)


def power_of_two(a: np.ndarray) -> np.ndarray:
    return approximate(np.exp2, POWER, a)


def exponential(a: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        return power_of_two(np.asarray(a * LOG2E, np.float32))


INSTRUCTIONS = {
    "create_fdiv": division,
    "create_approx_divf": division,
    "create_sqrt": root,
    "create_rsqrt": inverse_root,
    "create_exp2": power_of_two,
    "create_exp": exponential,
}


def install() -> None:
    """From here on the interpreter's builder errs. Other dtypes are computed as before."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def erring(plain: Callable[..., Any], instruction: Callable[..., np.ndarray]) -> Callable[..., Any]:
        def build(self: InterpreterBuilder, *operands: Any) -> Any:
            if any(operand.data.dtype != np.float32 for operand in operands):
                return plain(self, *operands)
            return TensorHandle(instruction(*(operand.data for operand in operands)), operands[0].dtype.scalar)

        return build

    for name, instruction in INSTRUCTIONS.items():
        if hasattr(InterpreterBuilder, name):  # create_approx_divf is of Triton 3.9
            setattr(InterpreterBuilder, name, erring(getattr(InterpreterBuilder, name), instruction))
