"""Gated residual: add a branch to the tokens; a gate that depends on the condition weights each channel.

    y = x + gate * branch            token n reads row n // (N / R)

Source: Peebles & Xie 2022 (arXiv 2212.09748), the alpha of adaLN-Zero.

Backward. The sum is fp32; it runs over the tokens of a row in a fixed order.

    dx = dy                          dbranch = gate * dy            dgate = sum dy * branch
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..backends import define, kernels, register_fake
from ..checks import beside, kernel_refusal
from ..derivatives import once
from ..modulation import asked_for, broadcast, check_tokens, gradient_dtype, row_gradient, rows, triton_refusal


def reference(x: Tensor, branch: Tensor, gate: Tensor | None) -> Tensor:
    """The equation in plain PyTorch. ``gate`` is ``[B, R, D]`` or None."""
    if gate is None:
        return (x + branch).to(x.dtype)
    branch_rows, gain = broadcast(branch, gate)
    return (x + (gain * branch_rows).flatten(1, 2)).to(x.dtype)


define("gate_residual_fwd(Tensor x, Tensor branch, Tensor? gate) -> Tensor")
# A gradient without a dtype is not asked for and comes back without elements; what it alone reads may be None.
define(
    "gate_residual_bwd(Tensor dy, Tensor? branch, Tensor? gate, ScalarType? dbranch, ScalarType? dgate, "
    "SymInt gate_rows) -> (Tensor dbranch, Tensor dgate)"
)


@register_fake("gate_residual_fwd")
def _(x, branch, gate):
    return x.new_empty(x.shape)


@register_fake("gate_residual_bwd")
def _(dy, branch, gate, dbranch, dgate, gate_rows):
    batch, _, width = dy.shape
    return (
        dy.new_empty(0) if dbranch is None else dy.new_empty(dy.shape, dtype=dbranch),
        dy.new_empty(0) if dgate is None else dy.new_empty((batch, gate_rows, width), dtype=dgate),
    )


class _GateResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, branch, gate, backend):
        y = kernels(backend).gate_residual_fwd(x, branch, gate)
        need_x, need_branch, need_gate = ctx.needs_input_grad[:3]
        if not (need_x or need_branch or need_gate):
            return y
        ctx.backend = backend
        ctx.asked = gradient_dtype(branch, need_branch), *row_gradient(gate, need_gate)
        ctx.save_for_backward(branch if need_gate else None, gate if need_branch else None)
        return y

    @staticmethod
    @once
    def backward(ctx: Any, *gradients: Any):
        branch, gate = ctx.saved_tensors
        dy, needs = gradients[0].contiguous(), ctx.needs_input_grad[:3]
        if branch is None and gate is None:  # the gradient of a sum
            return *asked_for(needs, (dy, dy if ctx.asked[0] is None else dy.to(ctx.asked[0]), dy)), None
        found = kernels(ctx.backend).gate_residual_bwd(dy, branch, gate, *ctx.asked)
        return *asked_for(needs, (dy, *found)), None


def _kernels(x, branch, gate):
    return kernel_refusal(x=x, branch=branch, gate=gate)


def _triton(x, branch, gate):
    return triton_refusal(x, branch=branch, gate=gate)


BACKENDS: backends.Table = {"reference": lambda *_: None, "cpu": _kernels, "triton": _triton}


def gate_residual(
    x: Tensor, branch: Tensor, gate: Tensor | None = None, *, backend: backends.Name | None = None
) -> Tensor:
    """Gated residual: ``y = x + gate * branch``.

    Every tensor is differentiable. The kernels compute in fp32 and round once.

    Source: Peebles & Xie 2022 (arXiv 2212.09748).

    Args:
        x: Tokens ``[B, N, D]``, any D (Triton: up to 8192); float16, bfloat16, float32, or
            float64 on the reference.
        branch: Output of the branch, ``[B, N, D]``; the dtype may differ from x's.
        gate: ``[B, D]`` has one row per sample; ``[B, R, D]`` has R rows, where R divides N. With 1 in place of B all
            samples share the rows. Strided views are read in place. The dtype may differ from x's. None adds the
            branch as it is.
        backend: Backend to run, or None for the automatic choice.

    Returns:
        ``[B, N, D]`` in x's dtype.

    Raises:
        ValueError: A shape or device does not fit, or the chosen backend refuses the call.
        TypeError: An argument is not a dense floating-point tensor, or an option not a number.
        RuntimeError: The chosen backend is not available.

    Examples:
        >>> x, branch, gate = torch.ones(1, 4, 8), torch.ones(1, 4, 8), torch.full((1, 8), 0.5)
        >>> gate_residual(x, branch, gate)[0, 0, 0]
        tensor(1.5000)
    """
    check_tokens("gate_residual", "x", x)
    check_tokens("gate_residual", "branch", branch, like=x)
    gate = rows("gate_residual", "gate", gate, x)
    chosen = backends.choose("gate_residual", BACKENDS, x.device, backend, x, branch, gate)
    if chosen == "reference":
        return reference(x, branch, gate)
    return backends.apply(_GateResidual, x.contiguous(), beside(branch, x.dtype).contiguous(), gate, chosen)
