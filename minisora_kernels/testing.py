"""The one tolerance rule, for values and gradients of every op, dtype and backend; for kernels of your own too.

    err(kernel) <= 2 * err(reference in that dtype) + floor,        err(y) = |y - exact|, exact = reference in float64

in the maximum norm and in the root mean square, with floor = eps(dtype) times the same norm of exact. Never loosened to
make a test pass.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _norms(x: Tensor) -> tuple[float, float]:
    if x.numel() == 0:
        return 0.0, 0.0
    return x.abs().max().item(), x.square().mean().sqrt().item()


def assert_as_accurate(name: str, kernel: Tensor, reference: Tensor, exact: Tensor) -> float:
    """Raise AssertionError unless ``kernel`` is as near to ``exact`` as the rule asks.

    Args:
        name: names the value in the message.
        kernel: what the kernel computed, in the dtype under test.
        reference: what plain PyTorch computes in that dtype.
        exact: what plain PyTorch computes in float64 from the same rounded inputs.

    Returns:
        The worst error over its bound, at most 1.

    Example::

        assert_as_accurate("dx", x_kernel.grad, x_reference.grad, x_float64.grad)
    """
    assert exact.dtype == torch.float64, f"{name}: exact must be float64, got {exact.dtype}"
    assert kernel.dtype == reference.dtype, f"{name}: dtype {kernel.dtype}, the reference has {reference.dtype}"
    assert kernel.shape == reference.shape == exact.shape, (
        f"{name}: shape {tuple(kernel.shape)}, the reference has {tuple(reference.shape)}, exact {tuple(exact.shape)}"
    )
    assert torch.isfinite(kernel).all(), f"{name}: {(~torch.isfinite(kernel)).sum().item()} values are not finite"
    eps = torch.finfo(kernel.dtype).eps
    worst = 0.0
    ours, theirs, size = _norms(kernel.double() - exact), _norms(reference.double() - exact), _norms(exact)
    for norm, mine, other, scale in zip(("max", "rms"), ours, theirs, size, strict=True):
        bound = 2 * other + eps * scale
        assert math.isfinite(bound), f"{name}: the bound is {bound}: the reference is not finite"
        assert mine <= bound, (
            f"{name} ({kernel.dtype}): {norm} error {mine:.3e} > {bound:.3e} = 2 x {other:.3e} + {eps * scale:.3e}"
        )
        worst = max(worst, mine / bound if bound else 0.0)
    return worst
