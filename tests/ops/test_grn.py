"""What is special to grn: the equation written out, frames by themselves, channels of zeros, its GELU, errors."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import DEVICE, KERNEL_BACKENDS

import minisora_kernels as mk
from minisora_kernels import backends
from minisora_kernels.testing import assert_as_accurate

X = torch.randn(2, 12, 8, generator=torch.Generator().manual_seed(0)).to(DEVICE)
BACKENDS = ("reference", *KERNEL_BACKENDS)


@pytest.fixture(autouse=True)
def _on_the_device():
    with torch.device(DEVICE):
        yield


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", (None, "gelu"))
@pytest.mark.parametrize("groups", (1, 3, 12))
def test_the_equation_frame_by_frame(groups: int, activation: str | None, backend: str):
    weight, bias = torch.randn(8), torch.randn(8)
    y = mk.grn(X, weight, bias, groups=groups, activation=activation, backend=backend)
    sites = 12 // groups
    a = X * (1 + torch.erf(X / math.sqrt(2))) / 2 if activation else X
    for b in range(2):
        for frame in range(groups):
            of = slice(frame * sites, (frame + 1) * sites)
            norms = a[b, of].square().sum(0).sqrt()
            s = norms / (norms.mean() + 1e-6)
            torch.testing.assert_close(y[b, of], weight * (a[b, of] * s) + bias + a[b, of])


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradient_against_finite_differences(backend: str):
    """A derivation of its own for the backward that test_ops.py compares the kernels with."""
    weight, bias, dy = torch.randn(8), torch.randn(8), torch.randn(2, 12, 8)
    leaves = [tensor.clone().requires_grad_() for tensor in (X, weight, bias)]
    mk.grn(*leaves, groups=3, activation="gelu", backend=backend).backward(dy)

    def loss(x, weight, bias):
        y = mk.grn(x, weight, bias, groups=3, activation="gelu", backend="reference")
        return (y * dy.double()).sum()

    for k, leaf in enumerate(leaves):
        wanted = torch.empty(leaf.shape, dtype=torch.float64)
        for i in range(leaf.numel()):
            ends = []
            for step in (1e-5, -1e-5):
                moved = [tensor.detach().double().clone() for tensor in leaves]
                moved[k].view(-1)[i] += step
                ends.append(loss(*moved))
            wanted.view(-1)[i] = (ends[0] - ends[1]) / 2e-5
        torch.testing.assert_close(leaf.grad.double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_frame_changes_no_other(backend: str):
    weight, bias, dy = torch.randn(8), torch.randn(8), torch.randn(2, 12, 8)

    def run(x):
        x = x.clone().requires_grad_()
        y = mk.grn(x, weight, bias, groups=3, activation="gelu", backend=backend)
        y.backward(dy)
        return y.detach(), x.grad

    other = X.clone()
    other[1, 4:8] += 1
    for before, after in zip(run(X), run(other), strict=True):
        same = (before == after).all(-1)
        assert same[0].all() and same[1, :4].all() and same[1, 8:].all() and not same[1, 4:8].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_weights_pass_x_and_still_learn(backend: str):
    x, weight, bias = X.clone().requires_grad_(), *(torch.zeros(8, requires_grad=True) for _ in range(2))
    y = mk.grn(x, weight, bias, groups=3, backend=backend)
    assert torch.equal(y, X)
    y.square().sum().backward()
    torch.testing.assert_close(x.grad, 2 * X)
    for parameter in (weight, bias):
        assert parameter.grad is not None and parameter.grad.abs().min() > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_channels_and_frames_of_zeros_have_finite_gradients(backend: str):
    """G = 0 has no derivative; its subgradient 0 leaves dx = dy."""
    x = X.clone()
    x[0, :4] = 0
    x[1, :, 5] = 0
    leaves = [x.requires_grad_(), torch.randn(8, requires_grad=True), torch.randn(8, requires_grad=True)]
    dy = torch.randn(2, 12, 8)
    mk.grn(*leaves, groups=3, backend=backend).backward(dy)
    for leaf in leaves:
        assert leaf.grad is not None and torch.isfinite(leaf.grad).all()
    assert torch.equal(leaves[0].grad[0, :4], dy[0, :4])
    torch.testing.assert_close(leaves[0].grad[1, :, 5], dy[1, :, 5])


@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_the_gelu_and_its_slope_everywhere(dtype: torch.dtype, backend: str):
    """With zero weights y = gelu(x) and dx = gelu'(x) dy, from -60 to 60, where the density has long been 0."""
    sweep = torch.cat([torch.linspace(-60, 60, 997), torch.linspace(-6, 6, 2001)]).to(DEVICE, dtype).view(1, -1, 1)
    found = []
    for name, to in ((backend, dtype), ("reference", dtype), ("reference", torch.float64)):
        x = sweep.to(to, copy=True).requires_grad_()
        zero = torch.zeros(1, dtype=to, device=DEVICE)
        y = mk.grn(x, zero, zero, activation="gelu", backend=name)
        y.backward(torch.ones_like(y))
        # apart from each other, for the large values would hide errors of the small
        inner = (slice(None), slice(997, None))
        found.append([part.detach() for part in (y, x.grad, y[inner], x.grad[inner])])
    for kernel, reference, exact in zip(*found, strict=True):
        assert_as_accurate("gelu", kernel, reference, exact)


@pytest.mark.parametrize("backend", KERNEL_BACKENDS)
@pytest.mark.parametrize(
    ("sites", "width", "dtype"),
    [
        (1100, 8, torch.float32),  # partial sums of more than one program, or task
        (70, 600, torch.float32),  # and of more than one block of columns
        (2100, 2048, torch.bfloat16),  # results that go past the caches
    ],
)
def test_long_and_wide_frames(sites: int, width: int, dtype: torch.dtype, backend: str):
    if backends.INTERPRETED and sites * width > 100_000:
        pytest.skip("takes the interpreter minutes")
    inputs = [torch.randn(1, sites, width), torch.randn(width), torch.randn(width)]
    dy = torch.randn(1, sites, width).to(dtype)
    found = []
    for name, to in ((backend, dtype), ("reference", dtype), ("reference", torch.float64)):
        leaves = [tensor.to(dtype).to(to, copy=True).requires_grad_() for tensor in inputs]
        y = mk.grn(*leaves, activation="gelu", backend=name)
        y.backward(dy.to(to))
        found.append([y.detach(), *(leaf.grad for leaf in leaves)])
    for part, kernel, reference, exact in zip(("y", "dx", "dweight", "dbias"), *found, strict=True):
        assert_as_accurate(part, kernel, reference, exact)


@pytest.mark.skipif(not KERNEL_BACKENDS, reason="no kernels here")
def test_the_backward_keeps_x_and_the_norms_only():
    from torch.autograd.graph import saved_tensors_hooks

    saved: list[torch.Tensor] = []
    leaves = [tensor.clone().requires_grad_() for tensor in (X, torch.ones(8), torch.ones(8))]
    with saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        mk.grn(*leaves, groups=3, activation="gelu", backend=KERNEL_BACKENDS[0])
    inputs = {leaf.data_ptr() for leaf in leaves}
    assert sum(tensor.numel() for tensor in saved if tensor.data_ptr() not in inputs) == 2 * 3 * 8


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(x=X[0]), ValueError, r"x must be \[B, N, D\], got shape \(12, 8\)"),
        (dict(x=X.int()), TypeError, "x has dtype torch.int32"),
        (dict(eps=0.0), ValueError, "eps is 0.0; it must be positive"),
        (dict(weight=torch.zeros(7)), ValueError, r"weight has shape \(7,\); it must be \[C\] with C = 8"),
        (dict(bias=torch.zeros(2, 8)), ValueError, r"bias has shape \(2, 8\); it must be \[C\] with C = 8"),
        (dict(bias=None), TypeError, "bias must be a tensor, got NoneType"),
        (dict(weight=torch.zeros(8, device="meta")), ValueError, f"weight is on meta, x is on {DEVICE}"),
        (dict(groups=5), ValueError, "groups is 5; it must be positive and divide the 12 tokens of x"),
        (dict(groups=0), ValueError, "groups is 0; it must be positive"),
        (dict(activation="silu"), ValueError, "activation is 'silu'; it may be None or 'gelu'"),
    ],
)
def test_errors_name_the_argument(arguments, error, message):
    arguments = {"x": X, "weight": torch.zeros(8), "bias": torch.zeros(8)} | arguments
    with pytest.raises(error, match="grn: " + message):
        mk.grn(**arguments)
