"""new_op: the equation written out, and one test per error. tests/ops/test_ops.py has what holds for every op."""

from __future__ import annotations

import pytest
import torch

import minisora_kernels as mk


def test_equation():
    x = torch.tensor([[1.0, -2.0], [0.5, 4.0]])
    torch.testing.assert_close(mk.new_op(x, 3.0), torch.tensor([[3.0, -6.0], [1.5, 12.0]]))


def test_errors_name_the_argument():
    with pytest.raises(TypeError, match="new_op: x must be a tensor, got list"):
        mk.new_op([1.0], 2.0)
    with pytest.raises(TypeError, match="new_op: scale is 'two'; it must be a number"):
        mk.new_op(torch.ones(2), "two")
