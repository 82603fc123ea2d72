"""glu_mlp in Triton's interpreter: what the activation does far from 0, and sums over more than one tile."""

from __future__ import annotations

import importlib

import pytest
import torch
import torch.nn.functional as F
from conftest import on_triton

from minisora_kernels.testing import assert_as_accurate

pytestmark = on_triton
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_values_behave_as_in_torch(dtype):
    values = [1e4, -1e4, 20, -20, 10.1, -10.1, 6e4, -6e4, float("inf"), -float("inf"), float("nan"), 0.0, -0.0]
    values += [torch.finfo(dtype).smallest_normal, -torch.finfo(dtype).smallest_normal / 4]
    g = torch.tensor(values, dtype=dtype)[:, None]
    one, single = torch.ones_like(g), torch.ones(1, 1, dtype=dtype)
    h, weights = torch.cat([g, one], -1), torch.zeros(2, 1, dtype=dtype)
    raw = torch.ops.minisora_triton
    _, a, dh, _ = raw.glu_mlp_bwd(one, h, weights, None, single, 0, True, *(True,) * 3)
    close = {"rtol": 1e-6, "atol": 1e-37, "equal_nan": True}
    for keep in (True, False):  # h itself by products with 1; 0 * inf would be nan
        finite = h[g.isfinite()[:, 0]]
        eye = torch.eye(2, dtype=dtype)
        y = raw.glu_mlp_fwd(finite, eye, None, None, None, single, None, 0, True, keep)[0]
        torch.testing.assert_close(y, F.silu(finite[:, :1]), **close)
    leaf = g.clone().requires_grad_()
    (slope,) = torch.autograd.grad(F.silu(leaf), leaf, one)
    torch.testing.assert_close(a, F.silu(g), **close)
    torch.testing.assert_close(dh[:, :1], slope, **close)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gate_first", [True, False])
def test_several_tiles_of_rows_and_columns(gate_first, dtype, monkeypatch, nan_filled):
    launcher = importlib.import_module("minisora_kernels.triton.glu_mlp")
    monkeypatch.setattr("minisora_kernels.triton._mlp.PROGRAMS", 6)
    rows, hidden, width = 41, 2 * launcher.COLUMNS + 3, 5
    h, dy = (3 * torch.randn(rows, 2 * hidden)).to(dtype), torch.randn(rows, width).to(dtype)
    w1, w2 = torch.randn(2 * hidden, width).to(dtype) / 4, torch.randn(width, hidden).to(dtype)
    _, a, dh, db1 = torch.ops.minisora_triton.glu_mlp_bwd(dy, h, w1, None, w2, 0, gate_first, *(True,) * 3)

    def plain(dtype):
        leaf = h.to(dtype).requires_grad_()
        first, second = leaf.chunk(2, dim=-1)
        result = F.silu(first) * second if gate_first else F.silu(second) * first
        (slant,) = torch.autograd.grad(result, leaf, (dy @ w2).to(dtype))
        return result.detach(), slant, slant.sum(0)

    for name, *values in zip(("a", "dh", "db1"), (a, dh, db1), plain(dtype), plain(torch.float64), strict=True):
        assert_as_accurate(name, *values)
