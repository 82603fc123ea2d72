"""gelu_mlp in Triton's interpreter: what the activation does far from 0, and sums over more than one tile."""

from __future__ import annotations

import importlib

import pytest
import torch
import torch.nn.functional as F
from conftest import on_triton

import minisora_kernels as mk
from minisora_kernels.testing import assert_as_accurate

pytestmark = on_triton
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def activation(h, keep=True):
    """gelu(h) of a column, through products by 1."""
    one = torch.ones(1, 1, dtype=h.dtype)
    return torch.ops.minisora_triton.gelu_mlp_fwd(h, one, None, one, None, False, keep)[0]


def backward(h, da):
    """a, dh and the sum of dh, of a column."""
    one = torch.ones(1, 1, dtype=h.dtype)
    return torch.ops.minisora_triton.gelu_mlp_bwd(da, h, one, one, False, *(True,) * 3)[1:]


def test_activation_keeps_its_digits_where_it_is_small():
    """tanh(u) rounds to -1 long before gelu(h) is 0; the sigmoid form does not."""
    h = torch.linspace(-9, -0.01, 4097)[:, None]
    exact = h.double() / (1 + torch.exp(-2 * (2 / torch.pi) ** 0.5 * (h.double() + 0.044715 * h.double() ** 3)))
    torch.testing.assert_close(activation(h).double(), exact, rtol=2e-5, atol=0)


def test_slope_keeps_its_digits_where_it_is_near_one():
    h = torch.linspace(0.01, 9, 512)[:, None]
    exact_h = h.double().requires_grad_()
    (exact,) = torch.autograd.grad(F.gelu(exact_h, approximate="tanh").sum(), exact_h)
    dh = backward(h, torch.ones_like(h))[1]
    torch.testing.assert_close(dh.double() - 1, exact - 1, rtol=1e-5, atol=2e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_values_behave_as_in_torch(dtype):
    values = [1e4, -1e4, 20, -20, 10.1, -10.1, 6e4, -6e4, float("inf"), -float("inf"), float("nan"), 0.0, -0.0]
    values += [torch.finfo(dtype).smallest_normal, -torch.finfo(dtype).smallest_normal / 4]
    h = torch.tensor(values, dtype=dtype)[:, None]
    one = torch.ones_like(h)
    a, dh, _ = backward(h, one)
    close = {"rtol": 1e-6, "atol": 1e-37, "equal_nan": True}
    for ours in (a, activation(h), activation(h, keep=False)):
        torch.testing.assert_close(ours, F.gelu(h, approximate="tanh"), **close)
    torch.testing.assert_close(dh, torch.ops.aten.gelu_backward(one, h, approximate="tanh"), **close)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_tiles_of_rows_and_columns(dtype, monkeypatch, nan_filled):
    launcher = importlib.import_module("minisora_kernels.triton.gelu_mlp")
    monkeypatch.setattr("minisora_kernels.triton._mlp.PROGRAMS", 6)
    rows, hidden, width = 41, 2 * launcher.COLUMNS + 3, 5
    h, dy = (3 * torch.randn(rows, hidden)).to(dtype), torch.randn(rows, width).to(dtype)
    w1, w2 = torch.randn(hidden, width).to(dtype) / 4, torch.randn(width, hidden).to(dtype)
    _, a, dh, db1 = torch.ops.minisora_triton.gelu_mlp_bwd(dy, h, w1, w2, False, *(True,) * 3)
    da = dy @ w2
    exact = F.gelu(h.double(), approximate="tanh")
    exact_dh = torch.ops.aten.gelu_backward(da.double(), h.double(), approximate="tanh")
    reference_dh = torch.ops.aten.gelu_backward(da, h, approximate="tanh")
    assert_as_accurate("a", a, F.gelu(h, approximate="tanh"), exact)
    assert_as_accurate("dh", dh, reference_dh, exact_dh)
    assert_as_accurate("db1", db1, reference_dh.sum(0), exact_dh.sum(0))


@pytest.mark.parametrize("shape", [(1, 1), (0, 5), (17, 3, 50), (40, 129)])
def test_parts_are_added(shape, nan_filled):
    sum_parts = importlib.import_module("minisora_kernels.triton._parts").sum_parts
    parts, others = torch.randn(shape), torch.randn(3, 2, 50, dtype=torch.bfloat16)
    for dtype in DTYPES:
        total, small, scalar = torch.empty(shape[1:], dtype=dtype), torch.empty(2, 50), torch.empty(1)
        for pairs in (
            [(parts, total)],
            [None, (others, small), (parts, total)],
            [(parts, total), (others, small), (others.view(-1, 1), scalar)],
        ):
            for out in (total, small, scalar):
                out.fill_(float("nan"))
            sum_parts(*pairs)
            for summed, out in filter(None, pairs):
                expected = summed.double().view(-1, *out.shape).sum(0).to(out.dtype)
                torch.testing.assert_close(out, expected)


def test_no_hidden_units():
    x, w1, w2, b2 = (torch.randn(shape, requires_grad=True) for shape in ((2, 5, 8), (0, 8), (8, 0), (8,)))
    y = mk.gelu_mlp(x, w1, None, w2, b2, backend="triton")
    assert torch.equal(y, b2.expand_as(y))
    dx, dw1, dw2, db2 = torch.autograd.grad(y.sum(), (x, w1, w2, b2))
    assert torch.equal(dx, torch.zeros_like(x)) and torch.equal(db2, torch.full_like(b2, 10.0))
    assert (dw1.shape, dw2.shape) == (w1.shape, w2.shape)
