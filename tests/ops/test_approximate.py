"""The errors that tests/approximate.py gives the interpreter are those of the PTX ISA, and a kernel meets them."""

from __future__ import annotations

import approximate
import numpy as np
import pytest
import torch

from minisora_kernels import backends

CASES = [
    (approximate.division, np.divide, 2, approximate.DIVISION),
    (approximate.root, np.sqrt, 1, approximate.ROOT),
    (approximate.inverse_root, lambda x: 1 / np.sqrt(x), 1, approximate.INVERSE_ROOT),
    (approximate.power_of_two, np.exp2, 1, approximate.POWER),
]


@pytest.mark.parametrize(("instruction", "exact", "count", "bound"), CASES)
def test_errors_fill_their_bounds_and_repeat(instruction, exact, count, bound):
    operands = np.random.default_rng(0).uniform(0.1, 10, (count, 20_000)).astype(np.float32)
    result = instruction(*operands)
    wide = exact(*operands.astype(np.float64))
    errors = (result - wide) / wide
    assert np.abs(errors).max() <= bound + 2.0**-24  # and the rounding to float32
    assert errors.max() > 0.8 * bound and errors.min() < -0.8 * bound and abs(errors.mean()) < 0.02 * bound
    assert np.array_equal(result, instruction(*operands)) and result.dtype == np.float32


def test_what_is_exact_or_not_finite_stays():
    a, b = np.float32([1, 6, 0, 1, -1, 0, np.nan]), np.float32([1, 2, 5, 0, 0, 0, 1])
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(approximate.division(a, b), a / b)
    np.testing.assert_array_equal(approximate.root(np.float32([0, 1, 4, np.inf])), np.float32([0, 1, 2, np.inf]))
    assert approximate.power_of_two(np.float32(0)) == 1 and approximate.exponential(np.float32(-np.inf)) == 0


@pytest.mark.skipif(not backends.INTERPRETED, reason="TRITON_INTERPRET is not 1")
def test_kernels_err_where_it_is_installed_and_only_there():
    """Division and exp2 are approximate, ``div_rn`` is not."""
    import os

    import triton
    import triton.language as tl

    @triton.jit
    def kernel(x_ptr, plain_ptr, rounded_ptr, power_ptr):
        at = tl.arange(0, 1024)
        x = tl.load(x_ptr + at)
        tl.store(plain_ptr + at, 1.0 / x)
        tl.store(rounded_ptr + at, tl.div_rn(1.0, x))
        tl.store(power_ptr + at, tl.exp2(x))

    x = torch.rand(1024) + 0.5
    plain, rounded, power = (torch.empty(1024) for _ in range(3))
    kernel[(1,)](x, plain, rounded, power)
    erring = os.environ.get("MINISORA_APPROXIMATE") == "1"
    assert torch.equal(rounded, 1 / x)
    assert torch.equal(plain, 1 / x) is not erring
    assert ((power.double() - x.double().exp2()).abs() > 2.0**-24 * power).any() or not erring
    torch.testing.assert_close(plain, 1 / x, rtol=2.0**-21, atol=0)
