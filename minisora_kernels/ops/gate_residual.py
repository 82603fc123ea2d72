"""Gated residual: add a branch to the tokens; a gate that depends on the condition weights each channel.

    y = x + gate * (branch + branch_bias)            token n reads row n // (N / R), or row index[n]

Source: Peebles & Xie 2022 (arXiv 2212.09748), the alpha of adaLN-Zero.

The branch ends in a Linear. Where its bias comes here as ``branch_bias`` and the Linear is called without, no pass of
its own reads the gradient of the branch for the gradient of the bias.

Backward. Sums are fp32; they run over the tokens of a row, or over all of them, in a fixed order.

    dx = dy                          dbranch = gate * dy
    dgate = sum dy * (branch + branch_bias)                         dbranch_bias = sum gate * dy
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..backends import define, kernels, register_fake
from ..checks import beside, kernel_refusal
from ..derivatives import once
from ..modulation import (
    affine,
    asked_for,
    broadcast,
    check_tokens,
    gradient_dtype,
    row_gradient,
    row_index,
    row_of_each,
    row_sums,
    rows,
    triton_refusal,
)
from ..sharding import token_local
from ..shortcut import shortcut


def reference(
    x: Tensor, branch: Tensor, gate: Tensor | None, branch_bias: Tensor | None = None, index: Tensor | None = None
) -> Tensor:
    """The equation in plain PyTorch. ``gate`` is ``[B, R, D]`` or None, ``index`` int64 or None."""
    gate = row_of_each(gate, index)
    if branch_bias is not None:
        branch = (branch + branch_bias).to(branch.dtype)
    if gate is None:
        return (x + branch).to(x.dtype)
    branch_rows, gain = broadcast(branch, gate)
    return (x + (gain * branch_rows).flatten(1, 2)).to(x.dtype)


define("gate_residual_fwd(Tensor x, Tensor branch, Tensor? gate, Tensor? branch_bias, Tensor? index) -> (Tensor y)")
# A gradient without a dtype is not asked for and comes back without elements; what it alone reads may be None.
define(
    "gate_residual_bwd(Tensor dy, Tensor? branch, Tensor? gate, Tensor? branch_bias, Tensor? index, "
    "ScalarType? dbranch, ScalarType? dgate, SymInt gate_rows, ScalarType? dbranch_bias) "
    "-> (Tensor dbranch, Tensor dgate, Tensor dbranch_bias)"
)


token_local("gate_residual")


@register_fake("gate_residual_fwd")
def _(x, branch, gate, branch_bias, index):
    return x.new_empty(x.shape)


@register_fake("gate_residual_bwd")
def _(dy, branch, gate, branch_bias, index, *asked):
    return tuple(gate_gradients(dy, *asked))


def gate_gradients(x: Tensor, branch, gate, gate_rows, branch_bias) -> list[Tensor]:
    """Empty tensors for the gradients that are asked for."""
    batch, _, width = x.shape
    shapes = ((branch, x.shape), (gate, (batch, gate_rows, width)), (branch_bias, (width,)))
    return [x.new_empty(0) if dtype is None else x.new_empty(shape, dtype=dtype) for dtype, shape in shapes]


class _GateResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, branch, gate, branch_bias, index, backend):
        y = kernels(backend).gate_residual_fwd(x, branch, gate, branch_bias, index)
        need_x, need_branch, need_gate, need_bias = ctx.needs_input_grad[:4]
        if not (need_x or need_branch or need_gate or need_bias):
            return y
        ctx.backend = backend
        ctx.asked = gradient_dtype(branch, need_branch), *row_gradient(gate, need_gate)
        ctx.bias = gradient_dtype(branch_bias, need_bias)
        ctx.save_for_backward(
            branch if need_gate else None,
            gate if need_branch or need_bias else None,
            branch_bias if need_gate else None,
            index if need_gate or need_branch or need_bias else None,
        )
        return y

    @staticmethod
    @once
    def backward(ctx: Any, *gradients: Any):
        branch, gate, branch_bias, index = ctx.saved_tensors
        dy, needs = gradients[0].contiguous(), ctx.needs_input_grad[:4]
        if branch is None and gate is None:  # the gradient of a sum
            dbranch = None if ctx.asked[0] is None else dy.to(ctx.asked[0])
            dbias = None if ctx.bias is None else row_sums(dy, 1).sum((0, 1)).to(ctx.bias)
            return *asked_for(needs, (dy, dbranch, None, dbias)), None, None
        found = kernels(ctx.backend).gate_residual_bwd(dy, branch, gate, branch_bias, index, *ctx.asked, ctx.bias)
        return *asked_for(needs, (dy, *found)), None, None


def _kernels(x, branch, gate, branch_bias=None, index=None):
    return kernel_refusal(x=x, branch=branch, gate=gate, branch_bias=branch_bias)


def _triton(x, branch, gate, branch_bias=None, index=None):
    return triton_refusal(x, branch=branch, gate=gate, branch_bias=branch_bias)


BACKENDS: backends.Table = {"reference": lambda *_: None, "cpu": _kernels, "triton": _triton}


@shortcut
def gate_residual(
    x: Tensor,
    branch: Tensor,
    gate: Tensor | None = None,
    *,
    branch_bias: Tensor | None = None,
    index: Tensor | None = None,
    backend: backends.Name | None = None,
) -> Tensor:
    """Gated residual: ``y = x + gate * (branch + branch_bias)``.

    Every tensor is differentiable. The kernels compute in fp32 and round once.

    Source: Peebles & Xie 2022 (arXiv 2212.09748).

    Args:
        x: Tokens ``[B, N, D]``, any D (Triton: up to 8192); float16, bfloat16, float32, or
            float64 on the reference.
        branch: Output of the branch, ``[B, N, D]``; the dtype may differ from x's.
        gate: ``[B, D]`` has one row per sample; ``[B, R, D]`` has R rows, where R divides N. With 1 in place of B all
            samples share the rows. Strided views are read in place. The dtype may differ from x's. None adds the
            branch as it is.
        branch_bias: Bias ``[D]`` of the Linear that made ``branch``, which is then called without. Its gradient comes
            from the pass over the gradient of y, where the Linear would make one of its own. The dtype may differ.
        index: The row of each token in ``gate``, ``[N]`` or ``[B, N]``, int64 or int32. R may then be any.
        backend: Backend to run, or None for the automatic choice.

    Returns:
        ``[B, N, D]`` in x's dtype.

    Raises:
        ValueError: A shape or device does not fit, ``index`` names a row that is not there, or the chosen backend
            refuses the call.
        TypeError: An argument is not a dense floating-point tensor, or an option not a number.
        RuntimeError: The chosen backend is not available.

    Examples:
        >>> x, branch, gate = torch.ones(1, 4, 8), torch.ones(1, 4, 8), torch.full((1, 8), 0.5)
        >>> gate_residual(x, branch, gate)[0, 0, 0]
        tensor(1.5000)

        The last bias of an MLP, handed on:

        >>> fc1, fc2 = torch.nn.Linear(8, 16), torch.nn.Linear(16, 8)
        >>> from minisora_kernels import gelu_mlp
        >>> branch = gelu_mlp(x, fc1.weight, fc1.bias, fc2.weight, None)
        >>> gate_residual(x, branch, gate, branch_bias=fc2.bias).shape
        torch.Size([1, 4, 8])
    """
    check_tokens("gate_residual", "x", x)
    check_tokens("gate_residual", "branch", branch, like=x)
    gate = rows("gate_residual", "gate", gate, x, index is not None)
    index = row_index("gate_residual", index, x, gate=gate)
    branch_bias = affine("gate_residual", "branch_bias", branch_bias, x)
    chosen = backends.choose("gate_residual", BACKENDS, x.device, backend, x, branch, gate, branch_bias, index)
    if chosen == "reference":
        return backends.plain(reference, x, branch, gate, branch_bias, index)
    tokens = x.contiguous(), beside(branch, x.dtype).contiguous()
    return backends.apply(_GateResidual, *tokens, gate, branch_bias, index, chosen)
