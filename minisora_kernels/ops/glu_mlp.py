"""The MLP with a gated linear unit: SwiGLU, or GEGLU. It saves the pre-activations only.

    [g | u] = x w1^T + b1            or g = x w1^T + b1 and u = x w3^T + b3, each a weight of its own
    a = act(g) * u                   act is silu, gelu, or gelu in its tanh form
    y = a w2^T + b2

The backward computes a from h = [g | u] again, in the pass that computes dh. So it needs neither a nor act(g):

    da = dy w2        dg = da * u * act'(g)        du = da * act(g)        dh = [dg | du]
    dx = dh w1        dw1 = dh^T x                 db1 = sum dh            dw2 = dy^T a        db2 = sum dy

Two weights write the halves of one h, and each gets its gradient from a half of dh.

Source: Shazeer 2020 (arXiv 2002.05202).
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from ..backends import define, kernels, register_fake
from ..checks import (
    as_matrix,
    cast,
    check_bias,
    check_flag,
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

Activation = Literal["silu", "gelu", "gelu_tanh"]
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)  # the raw ops take the place


def gated(first: Tensor, second: Tensor, activation: Activation, gate_first: bool) -> Tensor:
    """``act(g) * u`` in plain PyTorch, of the two halves in their order."""
    gate, value = (first, second) if gate_first else (second, first)
    if activation == "silu":
        return F.silu(gate) * value
    return F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none") * value


def reference(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    w3: Tensor | None = None,
    b3: Tensor | None = None,
    activation: Activation = "silu",
    gate_first: bool = True,
) -> Tensor:
    """The equation in plain PyTorch."""
    first, second = F.linear(x, w1, b1).chunk(2, dim=-1) if w3 is None else (F.linear(x, w1, b1), F.linear(x, w3, b3))
    return F.linear(gated(first, second, activation, gate_first), w2, b2)


define(
    "glu_mlp_fwd(Tensor x, Tensor w1, Tensor? b1, Tensor? w3, Tensor? b3, Tensor w2, Tensor? b2, int activation, "
    "bool gate_first, bool keep) -> (Tensor y, Tensor h)"
)
# x is [..., D], h is [tokens, 2 * hidden].
# What is not asked for comes back without elements: dx without w1; dh and db1, which is of both biases, without w2.
define(
    "glu_mlp_bwd(Tensor dy, Tensor h, Tensor? w1, Tensor? w3, Tensor? w2, int activation, bool gate_first, "
    "bool need_a, bool need_dh, bool need_b1) -> (Tensor dx, Tensor a, Tensor dh, Tensor db1)"
)


token_local("glu_mlp", matrix=True)


@register_fake("glu_mlp_fwd")
def _(x, w1, b1, w3, b3, w2, b2, activation, gate_first, keep):
    tokens = x.shape[:-1]
    h = (math.prod(tokens), 2 * w2.shape[1]) if keep else (0, 0)
    return x.new_empty(*tokens, w2.shape[0]), x.new_empty(h)


@register_fake("glu_mlp_bwd")
def _(dy, h, w1, w3, w2, activation, gate_first, need_a, need_dh, need_b1):
    return (
        dy.new_empty(0) if w1 is None else dy.new_empty(dy.shape[0], w1.shape[1]),
        h.new_empty((h.shape[0], h.shape[1] // 2) if need_a else 0),
        h.new_empty(h.shape if need_dh else 0),
        h.new_empty(h.shape[1] if need_b1 else 0),
    )


@formula("glu_mlp_fwd")
def _(x, w1, b1, w3, b3, w2, *options, **out):
    return 2 * math.prod(x[:-1]) * w2[1] * (2 * w1[1] + w2[0])


@formula("glu_mlp_bwd")
def _(dy, h, w1, w3, w2, *options, **out):
    return h[0] * h[1] * ((0 if w1 is None else 2 * w1[1]) + (0 if w2 is None else dy[1]))


@scratch("glu_mlp_fwd")
def _(x, w1, b1, w3, b3, w2, b2, activation, gate_first, keep):
    a = math.prod(x.shape[:-1]) * w2.shape[1] * x.element_size()
    return a if keep else 3 * a  # a, and h if it is not kept; on a CPU of a chunk of tokens


@scratch("glu_mlp_bwd")
def _(dy, h, w1, w3, w2, activation, gate_first, need_a, need_dh, need_b1):
    return 0 if need_dh or w2 is None else h.numel() * h.element_size()  # dh; on a CPU of a chunk of tokens


class _GluMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, w1, b1, w3, b3, w2, b2, activation, gate_first, backend):
        need_x, need_w1, need_b1, need_w3, need_b3, need_w2, _ = ctx.needs_input_grad[:7]
        inner = need_x or need_w1 or need_b1 or need_w3 or need_b3
        keep = inner or need_w2
        y, h = kernels(backend).glu_mlp_fwd(
            x.contiguous(), w1, b1, w3, b3, w2, b2, ACTIVATIONS.index(activation), gate_first, keep
        )
        ctx.backend, ctx.shape, ctx.made = backend, x.shape, w1.shape[0]
        ctx.options = ACTIVATIONS.index(activation), gate_first
        ctx.save_for_backward(
            x if need_w1 or need_w3 else None,
            w1 if need_x else None,
            w3 if need_x else None,
            w2 if inner else None,
            h if keep else None,
        )
        return y

    @staticmethod
    @once
    def backward(ctx: Any, *gradients: Any):
        x, w1, w3, w2, h = ctx.saved_tensors
        need_x, need_w1, need_b1, need_w3, need_b3, need_w2, need_b2 = ctx.needs_input_grad[:7]
        dy = as_matrix(gradients[0]).contiguous()
        if h is None:
            return None, None, None, None, None, None, dy.sum(0), None, None, None
        asked = (*ctx.options, need_w2, need_w1 or need_w3, need_b1 or need_b3)
        dx, a, dh, db1 = kernels(ctx.backend).glu_mlp_bwd(dy, h, w1, w3, w2, *asked)
        return (
            dx.view(ctx.shape) if need_x else None,
            dh[:, : ctx.made].t() @ as_matrix(x) if need_w1 else None,
            db1[: ctx.made] if need_b1 else None,
            dh[:, ctx.made :].t() @ as_matrix(x) if need_w3 else None,
            db1[ctx.made :] if need_b3 else None,
            dy.t() @ a if need_w2 else None,
            dy.sum(0) if need_b2 else None,
            None,
            None,
            None,
        )


def _kernels(x, *_):
    return kernel_refusal(x=x)  # the others have its dtype


BACKENDS: backends.Table = {"reference": lambda *_: None, "cpu": _kernels, "triton": _kernels}


@shortcut
def glu_mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    w3: Tensor | None = None,
    b3: Tensor | None = None,
    activation: Activation = "silu",
    gate_first: bool = True,
    backend: backends.Name | None = None,
) -> Tensor:
    """The MLP with a gated linear unit: ``y = (act(g) * u) w2^T + b2``. It saves the pre-activations only.

    g and u are the two halves of ``x w1^T + b1``. With ``w3`` each half has a weight of its own, ``x w1^T + b1`` and
    ``x w3^T + b3``.

    Every tensor is differentiable. Torch computes the matrix products on every backend; the kernels compute what lies
    between them, forward and backward. On a CPU a chunk of tokens goes through all products at a time, which
    bounds the memory of the activation. The kernels give the same bits for any number of threads. Torch's products
    repeat for the same number of threads.

    Source: Shazeer 2020 (arXiv 2002.05202).

    Args:
        x: ``[..., D]``; float16, bfloat16, float32, or float64 on the reference.
        w1: First weight, ``[2 * hidden, D]``, as nn.Linear stores it; with w3 that of the first half, ``[hidden, D]``.
        b1: Its bias, ``[2 * hidden]`` or ``[hidden]``, or None.
        w2: Last weight, ``[D_out, hidden]``.
        b2: Last bias, ``[D_out]``, or None. A gated residual that reads y may take it instead: ``branch_bias`` of
            :func:`gate_residual`.
        w3: Weight of the second half, ``[hidden, D]``, or None if w1 has both.
        b3: Its bias, ``[hidden]``, or None.
        activation: What the gate goes through: ``"silu"``, or ``"gelu"`` in its exact form, or ``"gelu_tanh"``.
        gate_first: Whether the gate is the first half, as in Flux2 and Llama, or the second, as in diffusers' GEGLU and
            SwiGLU.
        backend: Backend to run, or None for the automatic choice.

    Returns:
        ``[..., D_out]`` in x's dtype; inside autocast in autocast's dtype.

    Raises:
        ValueError: A shape, device or option does not fit, or the chosen backend refuses the call.
        TypeError: An argument is not a dense floating-point tensor, gate_first is no bool, or a weight is of another
            dtype than x outside autocast.
        RuntimeError: The chosen backend is not available.

    Examples:
        >>> fc1, fc2 = torch.nn.Linear(64, 2 * 128), torch.nn.Linear(128, 64)
        >>> glu_mlp(torch.randn(2, 12, 64), fc1.weight, fc1.bias, fc2.weight, fc2.bias).shape
        torch.Size([2, 12, 64])
    """
    op = "glu_mlp"
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation is {activation!r}; it may be {', '.join(map(repr, ACTIVATIONS))}")
    check_flag(op, "gate_first", gate_first)
    check_tensor(op, "x", x)
    if x.dim() < 1:
        raise ValueError(f"{op}: x must be [..., D], got a scalar")
    width = x.shape[-1]
    check_weight(op, "w1", w1, x, "[2 * hidden, D]" if w3 is None else "[hidden, D]", width)
    hidden = w1.shape[0]
    if w3 is None:
        if hidden % 2:
            raise ValueError(f"{op}: w1 has shape {tuple(w1.shape)}; it must be [2 * hidden, D], or w3 must be given")
        if b3 is not None:
            raise ValueError(f"{op}: b3 is given without w3; it may be given with w3 only")
        hidden //= 2
    else:
        check_weight(op, "w3", w3, x, "[hidden, D]", width)
        if w3.shape[0] != hidden:
            raise ValueError(f"{op}: w3 has shape {tuple(w3.shape)}; it must be [hidden, D] with hidden = {hidden}")
        check_bias(op, "b3", b3, x, hidden)
    check_bias(op, "b1", b1, x, w1.shape[0])
    check_weight(op, "w2", w2, x, "[D_out, hidden]", hidden)
    check_bias(op, "b2", b2, x, w2.shape[0])
    dtype = linear_dtype(op, x, w1=w1, b1=b1, w3=w3, b3=b3, w2=w2, b2=b2)
    tensors = [None if each is None else cast(each, dtype) for each in (x, w1, b1, w3, b3, w2, b2)]
    x, w1, b1, w3, b3, w2, b2 = tensors  # type: ignore[assignment]
    chosen = backends.choose(op, BACKENDS, x.device, backend, x, w1, b1, w3, b3, w2, b2)
    if chosen == "reference":
        return backends.plain(reference, x, w1, b1, w2, b2, w3, b3, activation, gate_first)
    return backends.apply(_GluMLP, x, w1, b1, w3, b3, w2, b2, activation, gate_first, chosen)
