"""The MLP of a DiT block: Linear, tanh-GELU, Linear, keeping the pre-activation only.

    h = x w1^T + b1
    a = gelu(h) = h / 2 * (1 + tanh(sqrt(2 / pi) * (h + 0.044715 h^3)))
    y = a w2^T + b2

Backward recomputes a from h in the pass that makes dh, so neither a nor gelu'(h) is kept:

    da = dy w2          dh = da * gelu'(h)          dw2 = dy^T a       db2 = sum dy
    dx = dh w1          dw1 = dh^T x                db1 = sum dh

Source: Hendrycks & Gimpel 2016 (arXiv 1606.08415), the tanh form.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import backends
from ..backends import define, kernels, register_fake
from ..checks import check_tensor, compute_dtype, kernel_refusal


def reference(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None) -> Tensor:
    """The equation in plain PyTorch."""
    return F.linear(F.gelu(F.linear(x, w1, b1), approximate="tanh"), w2, b2)


define("gelu_mlp_fwd(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, bool keep) -> (Tensor y, Tensor h)")
define("gelu_mlp_bwd(Tensor dy, Tensor h, Tensor w1, Tensor w2) -> (Tensor dx, Tensor a, Tensor dh, Tensor db1)")


@register_fake("gelu_mlp_fwd")
def _(x, w1, b1, w2, b2, keep):
    return x.new_empty(x.shape[0], w2.shape[0]), x.new_empty((x.shape[0], w1.shape[0]) if keep else (0, 0))


@register_fake("gelu_mlp_bwd")
def _(dy, h, w1, w2):
    return dy.new_empty(dy.shape[0], w1.shape[1]), torch.empty_like(h), torch.empty_like(h), h.new_empty(h.shape[1])


class _GeluMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, w1, b1, w2, b2, keep, backend):
        ctx.backend = backend
        y, h = kernels(backend).gelu_mlp_fwd(x.reshape(-1, x.shape[-1]).contiguous(), w1, b1, w2, b2, keep)
        ctx.save_for_backward(x, w1, w2, h)
        return y.view(*x.shape[:-1], w2.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any):
        x, w1, w2, h = ctx.saved_tensors
        need_x, need_w1, need_b1, need_w2, need_b2 = ctx.needs_input_grad[:5]
        dy = gradients[0].reshape(-1, w2.shape[0]).contiguous()
        dx, a, dh, db1 = kernels(ctx.backend).gelu_mlp_bwd(dy, h, w1, w2)
        return (
            dx.view(x.shape) if need_x else None,
            dh.t() @ x.reshape(-1, x.shape[-1]) if need_w1 else None,
            db1 if need_b1 else None,
            dy.t() @ a if need_w2 else None,
            dy.sum(0) if need_b2 else None,
            None,
            None,
        )


def _kernels(x, *_):
    return kernel_refusal(x=x)  # the others have its dtype


BACKENDS: backends.Table = {"reference": lambda *_: None, "cpu": _kernels, "triton": _kernels}


def gelu_mlp(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, *, backend: str | None = None
) -> Tensor:
    """Linear, tanh-GELU, Linear. Differentiable in every tensor.

    Args:
        x: ``[..., D]``; float16, bfloat16, float32 (float64: reference only).
        w1, b1: ``[hidden, D]``, ``[hidden]`` or None, as nn.Linear keeps them.
        w2, b2: ``[D_out, hidden]``, ``[D_out]`` or None.
        backend: ``None`` chooses; a name runs that backend or raises.

    Returns:
        ``[..., D_out]`` in x's dtype; inside autocast in autocast's dtype. The matrix products are torch's on every
        backend; the kernels are what lies between them, forward and backward. On a CPU a chunk of tokens goes through
        both products at a time, so that the activation never leaves the caches. The kernels' bits do not depend on the
        number of threads; torch's products and sums repeat with the same number of threads.

    Raises:
        ValueError, TypeError, RuntimeError: as for :func:`minisora_kernels.adaln`.
    """
    op = "gelu_mlp"
    check_tensor(op, "x", x)
    for name, tensor in (("w1", w1), ("b1", b1), ("w2", w2), ("b2", b2)):
        if tensor is not None or name in ("w1", "w2"):
            check_tensor(op, name, tensor, x)
    if x.dim() < 1:
        raise ValueError(f"{op}: x must be [..., D], got a scalar")
    if w1.dim() != 2 or w1.shape[1] != x.shape[-1]:
        raise ValueError(f"{op}: w1 has shape {tuple(w1.shape)}; it must be [hidden, D] with D = {x.shape[-1]}")
    if w2.dim() != 2 or w2.shape[1] != w1.shape[0]:
        raise ValueError(
            f"{op}: w2 has shape {tuple(w2.shape)}; it must be [D_out, hidden] with hidden = {w1.shape[0]}"
        )
    for name, b, w in (("b1", b1, w1), ("b2", b2, w2)):
        if b is not None and tuple(b.shape) != (w.shape[0],):
            raise ValueError(f"{op}: {name} has shape {tuple(b.shape)}; it must be [{w.shape[0]}]")
    dtype = compute_dtype(x)
    x, w1, w2 = x.to(dtype), w1.to(dtype), w2.to(dtype)
    b1, b2 = (None if b is None else b.to(dtype) for b in (b1, b2))
    chosen = backends.choose(op, BACKENDS, x.device, backend, x, w1, b1, w2, b2)
    if chosen == "reference":
        return reference(x, w1, b1, w2, b2)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, w1, b1, w2, b2))
    return backends.apply(_GeluMLP, x, w1, b1, w2, b2, keep, chosen)
