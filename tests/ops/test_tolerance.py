"""The tolerance rule accepts what is as good as the reference and nothing else."""

from __future__ import annotations

import pytest
import torch

from minisora_kernels.testing import assert_as_accurate

exact = torch.linspace(-3, 3, 1001, dtype=torch.float64)
reference = (exact + 1e-3 * torch.sin(37 * exact)).float()


@pytest.mark.parametrize("factor", (0.0, 1.0, 1.9))
def test_accepts_errors_up_to_twice_the_reference(factor):
    assert_as_accurate("y", (exact + factor * (reference.double() - exact)).float(), reference, exact)


def test_accepts_one_rounding_where_the_reference_is_exact():
    short = exact.bfloat16()
    assert_as_accurate("y", short, short, exact)
    assert_as_accurate("y", exact.float(), exact.float(), exact)


@pytest.mark.parametrize(
    "spoil",
    (
        lambda y: exact + 2.5 * (y - exact),
        lambda y: torch.where(torch.arange(1001) == 500, y + 0.01, y),
        lambda y: torch.where(torch.arange(1001) == 500, torch.nan, y),
        lambda y: torch.where(torch.arange(1001) == 500, torch.inf, y),
        lambda y: y + 2.1e-3,
        lambda y: y.roll(1),
    ),
)
def test_rejects(spoil):
    with pytest.raises(AssertionError):
        assert_as_accurate("y", spoil(reference.double()).float(), reference, exact)


def test_rejects_a_small_error_everywhere_that_the_maximum_hides():
    spiky = reference.clone()
    spiky[500] += 1.0
    with pytest.raises(AssertionError, match="rms"):
        assert_as_accurate("y", (exact + 0.5).float(), spiky, exact)


def test_rejects_another_dtype_shape_or_oracle():
    with pytest.raises(AssertionError, match="dtype"):
        assert_as_accurate("y", exact.bfloat16(), reference, exact)
    with pytest.raises(AssertionError, match="shape"):
        assert_as_accurate("y", reference[:-1], reference, exact)
    with pytest.raises(AssertionError, match="float64"):
        assert_as_accurate("y", reference, reference, exact.float())
