"""The MLP of a DiT block: Linear, GELU, Linear. It saves the pre-activation only.

    h = x w1^T + b1
    a = gelu(h) = h / 2 * (1 + tanh(sqrt(2 / pi) * (h + 0.044715 h^3))), or h * Phi(h): Phi is the normal distribution
    y = a w2^T + b2

The backward computes a from h again, in the pass that computes dh. So it needs neither a nor gelu'(h):

    da = dy w2          dh = da * gelu'(h)          dw2 = dy^T a       db2 = sum dy
    dx = dh w1          dw1 = dh^T x                db1 = sum dh

Source: Hendrycks & Gimpel 2016 (arXiv 1606.08415).
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from ..backends import define, kernels, register_fake
from ..checks import (
    architecture_refusal,
    as_matrix,
    cast,
    check_bias,
    check_tensor,
    check_weight,
    kernel_refusal,
    linear_dtype,
)
from ..derivatives import once
from ..flops import formula
from ..scratch import scratch
from ..sharding import token_local
from ..shortcut import shortcut


def reference(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    approximate: Literal["none", "tanh"] = "tanh",
) -> Tensor:
    """The equation in plain PyTorch."""
    return F.linear(F.gelu(F.linear(x, w1, b1), approximate=approximate), w2, b2)


define(
    "gelu_mlp_fwd(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, bool exact, bool keep) "
    "-> (Tensor y, Tensor h)"
)
# x is [..., D], h is [tokens, hidden].
# What is not asked for comes back without elements: dx without w1; dh and db1 without w2.
define(
    "gelu_mlp_bwd(Tensor dy, Tensor h, Tensor? w1, Tensor? w2, bool exact, bool need_a, bool need_dh, bool need_b1) "
    "-> (Tensor dx, Tensor a, Tensor dh, Tensor db1)"
)


token_local("gelu_mlp", matrix=True)


@register_fake("gelu_mlp_fwd")
def _(x, w1, b1, w2, b2, exact, keep):
    tokens = x.shape[:-1]
    h = (math.prod(tokens), w1.shape[0]) if keep else (0, 0)
    return x.new_empty(*tokens, w2.shape[0]), x.new_empty(h)


@register_fake("gelu_mlp_bwd")
def _(dy, h, w1, w2, exact, need_a, need_dh, need_b1):
    return (
        dy.new_empty(0) if w1 is None else dy.new_empty(dy.shape[0], w1.shape[1]),
        h.new_empty(h.shape if need_a else 0),
        h.new_empty(h.shape if need_dh else 0),
        h.new_empty(h.shape[1] if need_b1 else 0),
    )


@formula("gelu_mlp_fwd")
def _(x, w1, b1, w2, b2, *options, **out):
    return 2 * math.prod(x[:-1]) * w1[0] * (w1[1] + w2[0])


@formula("gelu_mlp_bwd")
def _(dy, h, w1, w2, *options, **out):
    return 2 * h[0] * h[1] * ((0 if w1 is None else w1[1]) + (0 if w2 is None else dy[1]))


@scratch("gelu_mlp_fwd")
def _(x, w1, *options):
    # a; on a CPU of a chunk of tokens. Not counted: 32 MiB at most that cuBLASLt works in, and h where it cannot do
    # without.
    return math.prod(x.shape[:-1]) * w1.shape[0] * x.element_size()


@scratch("gelu_mlp_bwd")
def _(dy, h, w1, w2, exact, need_a, need_dh, need_b1):
    return 0 if need_dh or w2 is None else h.numel() * h.element_size()  # dh; on a CPU of a chunk of tokens


class _GeluMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, w1, b1, w2, b2, exact, backend):
        need_x, need_w1, need_b1, need_w2, _ = ctx.needs_input_grad[:5]
        inner = need_x or need_w1 or need_b1
        keep = inner or need_w2
        y, h = kernels(backend).gelu_mlp_fwd(x.contiguous(), w1, b1, w2, b2, exact, keep)
        ctx.backend, ctx.shape, ctx.exact = backend, x.shape, exact
        ctx.save_for_backward(
            x if need_w1 else None, w1 if need_x else None, w2 if inner else None, h if keep else None
        )
        return y

    @staticmethod
    @once
    def backward(ctx: Any, *gradients: Any):
        x, w1, w2, h = ctx.saved_tensors
        need_x, need_w1, need_b1, need_w2, need_b2 = ctx.needs_input_grad[:5]
        dy = as_matrix(gradients[0]).contiguous()
        if h is None:
            return None, None, None, None, dy.sum(0), None, None
        asked = (ctx.exact, need_w2, need_w1, need_b1)
        dx, a, dh, db1 = kernels(ctx.backend).gelu_mlp_bwd(dy, h, w1, w2, *asked)
        return (
            dx.view(ctx.shape) if need_x else None,
            dh.t() @ as_matrix(x) if need_w1 else None,
            db1 if need_b1 else None,
            dy.t() @ a if need_w2 else None,
            dy.sum(0) if need_b2 else None,
            None,
            None,
        )


def _kernels(x, *_):
    return kernel_refusal(x=x)  # the others have its dtype


def _cuda(x, w1, b1, w2, b2):
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"x has dtype {x.dtype}; cuBLASLt's GELU takes bfloat16 and float16"
    for name, width in (("D", x.shape[-1]), ("hidden", w1.shape[0]), ("D_out", w2.shape[0])):
        if width < 8 or width % 8:
            return f"{name} is {width}; cuBLASLt's GELU takes multiples of 8"
    return architecture_refusal(x.device.index)


def _cuda_exact(*_):
    return "approximate is 'none'; cuBLASLt has one form of GELU, which stands for the tanh form, as in torch"


BACKENDS: backends.Table = {"reference": lambda *_: None, "cpu": _kernels, "cuda": _cuda, "triton": _kernels}
EXACT_BACKENDS: backends.Table = {**BACKENDS, "cuda": _cuda_exact}

# By count cuBLASLt's epilogues save 2 of 8 passes over [tokens, hidden] between the products: the forward writes h and
# a and reads neither (2 of 3), the backward reads h, writes dh, and has a computed again (4 of 5). At D 1152 and 8192
# tokens in bfloat16 a pass is 75 MB, and the products are 522 GFLOP. At 1.75 TB/s and 250 TFLOP/s, as an A100 may reach
# them, the two passes are an estimated 4% of the time of the MLP.
#
# Whether cuBLASLt loses nothing elsewhere depends on the GPU. FusedMLP of flash-attention
# (flash_attn/ops/fused_dense.py) says that the epilogues are slower than separate passes on H100, and does without them
# there alone; llm.c's pull request 338 found them slower in bfloat16. So the record of the GPU decides.
ROUTES = (
    "cpu and triton: torch computes the products, a kernel what lies between them. cuda: cuBLASLt computes the "
    "products of tokens with bias, GELU and its gradient, for the tanh form of 16-bit numbers and widths that are "
    "multiples of 8; torch computes the gradients of the weights."
)


@shortcut
def gelu_mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    approximate: Literal["none", "tanh"] = "tanh",
    backend: backends.Name | None = None,
) -> Tensor:
    """The MLP of a block: ``y = gelu(x w1^T + b1) w2^T + b2``. It saves the pre-activation only.

    Every tensor is differentiable. Torch computes the matrix products; the kernels compute what lies between them,
    forward and backward. On the backend ``cuda`` cuBLASLt computes the products of tokens with bias, GELU and its
    gradient, and torch the gradients of the weights. On a CPU a chunk of tokens goes through both products at a time,
    which bounds the memory of the activation. The kernels give the same bits for any number of threads. Torch's
    products repeat for the same number of threads.

    Source: Hendrycks & Gimpel 2016 (arXiv 1606.08415).

    Args:
        x: ``[..., D]``; float16, bfloat16, float32, or float64 on the reference.
        w1: First weight, ``[hidden, D]``, as nn.Linear stores it.
        b1: First bias, ``[hidden]``, or None.
        w2: Second weight, ``[D_out, hidden]``.
        b2: Second bias, ``[D_out]``, or None. A gated residual that reads y may take it instead: ``branch_bias`` of
            :func:`gate_residual`.
        approximate: Form of GELU, in torch's words: ``"tanh"``, or ``"none"`` for the exact form.
        backend: Backend to run, or None for the automatic choice.

    Returns:
        ``[..., D_out]`` in x's dtype; inside autocast in autocast's dtype.

    Raises:
        ValueError: A shape, device or option does not fit, or the chosen backend refuses the call.
        TypeError: An argument is not a dense floating-point tensor, or a weight is of another dtype than x
            outside autocast.
        RuntimeError: The chosen backend is not available.

    Examples:
        >>> fc1, fc2 = torch.nn.Linear(64, 256), torch.nn.Linear(256, 64)
        >>> gelu_mlp(torch.randn(2, 12, 64), fc1.weight, fc1.bias, fc2.weight, fc2.bias).shape
        torch.Size([2, 12, 64])
    """
    op = "gelu_mlp"
    if approximate not in ("none", "tanh"):
        raise ValueError(f"{op}: approximate is {approximate!r}; it may be 'none' or 'tanh'")
    check_tensor(op, "x", x)
    if x.dim() < 1:
        raise ValueError(f"{op}: x must be [..., D], got a scalar")
    check_weight(op, "w1", w1, x, "[hidden, D]", x.shape[-1])
    check_bias(op, "b1", b1, x, w1.shape[0])
    check_weight(op, "w2", w2, x, "[D_out, hidden]", w1.shape[0])
    check_bias(op, "b2", b2, x, w2.shape[0])
    dtype = linear_dtype(op, x, w1=w1, b1=b1, w2=w2, b2=b2)
    x, w1, w2 = cast(x, dtype), cast(w1, dtype), cast(w2, dtype)
    b1, b2 = None if b1 is None else cast(b1, dtype), None if b2 is None else cast(b2, dtype)
    table = EXACT_BACKENDS if approximate == "none" else BACKENDS
    chosen = backends.choose(op, table, x.device, backend, x, w1, b1, w2, b2)
    if chosen == "reference":
        return backends.plain(reference, x, w1, b1, w2, b2, approximate)
    return backends.apply(_GeluMLP, x, w1, b1, w2, b2, approximate == "none", chosen)
