"""Gated residual, then adaptive layer norm, in one pass: what joins two branches of a DiT block.

    x' = x + gate * (branch + branch_bias)
    y  = adaln(x', shift, scale)     rows, norms and affine weights as in ops/adaln.py

x' is rounded to x's dtype before the norm reads it, as the two separate ops do.

Backward. g is dx' plus the dx of adaln at (x', dy).

    dx = g                           dbranch = gate * g
    dgate = sum g * (branch + branch_bias)                          dbranch_bias = sum gate * g

dshift, dscale, dweight and dbias follow as in ops/adaln.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..backends import define, kernels, register_fake
from ..checks import beside, compute_dtype, kernel_refusal, number
from ..derivatives import once
from ..modulation import (
    Norm,
    affine,
    asked_for,
    check_norm,
    check_tokens,
    gradient_dtype,
    offset_gradients,
    remember,
    row_gradient,
    row_index,
    rows,
    triton_refusal,
)
from ..sharding import token_local
from ..shortcut import shortcut
from . import adaln, gate_residual


def reference(
    x: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    branch_bias: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    index: Tensor | None = None,
    norm: Norm = "layer",
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """The two references, one after the other. ``gate``, ``shift`` and ``scale`` are ``[B, R, D]`` or None."""
    residual = gate_residual.reference(x, branch, gate, branch_bias, index)
    y = adaln.reference(residual, shift, scale, weight, bias, index, norm, eps)
    return residual, y.to(output_dtype(x, branch))


def output_dtype(x: Tensor, branch: Tensor) -> torch.dtype:
    """The dtype of y, which the next branch reads: autocast's inside autocast, else the branch's."""
    in_autocast = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    return compute_dtype(x) if in_autocast else branch.dtype


define(
    "gate_residual_adaln_fwd(Tensor x, Tensor branch, Tensor? gate, Tensor? branch_bias, Tensor? shift, Tensor? scale, "
    "Tensor? weight, Tensor? bias, Tensor? index, bool rms, float eps, ScalarType out_dtype) "
    "-> (Tensor residual, Tensor y, Tensor mean, Tensor rstd)"
)
# A gradient that is not asked for (False, no dtype) comes back without elements; what it alone reads may be None.
define(
    "gate_residual_adaln_bwd(Tensor dresidual, Tensor dy, Tensor residual, Tensor? branch, Tensor? gate, "
    "Tensor? branch_bias, Tensor? scale, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd, "
    "Tensor? index, bool rms, bool need_x, ScalarType? dbranch, ScalarType? dgate, SymInt gate_rows, "
    "ScalarType? dbranch_bias, ScalarType? dshift, SymInt shift_rows, ScalarType? dscale, SymInt scale_rows, "
    "ScalarType? dweight, ScalarType? dbias) -> (Tensor dx, Tensor dbranch, Tensor dgate, "
    "Tensor dbranch_bias, Tensor dshift, Tensor dscale, Tensor dweight, Tensor dbias)"
)


token_local("gate_residual_adaln")


@register_fake("gate_residual_adaln_fwd")
def _(x, branch, gate, branch_bias, shift, scale, weight, bias, index, rms, eps, out_dtype):
    statistic = x.new_empty(x.shape[:2], dtype=torch.float32)
    return x.new_empty(x.shape), x.new_empty(x.shape, dtype=out_dtype), statistic, torch.empty_like(statistic)


@register_fake("gate_residual_adaln_bwd")
def _(
    dresidual,
    dy,
    residual,
    branch,
    gate,
    branch_bias,
    scale,
    weight,
    bias,
    mean,
    rstd,
    index,
    rms,
    need_x,
    *asked,
):
    return (
        residual.new_empty(residual.shape if need_x else 0),
        *gate_residual.gate_gradients(residual, *asked[:4]),
        *adaln.parameter_gradients(residual, *asked[4:]),
    )


class _GateResidualAdaLN(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x, branch, gate, branch_bias, shift, scale, weight, bias, index, rms, eps, out_dtype, backend
    ):
        residual, y, mean, rstd = kernels(backend).gate_residual_adaln_fwd(
            x, branch, gate, branch_bias, shift, scale, weight, bias, index, rms, eps, out_dtype
        )
        need_x, need_branch, need_gate, need_branch_bias = ctx.needs_input_grad[:4]
        need_shift, need_scale, need_weight, need_bias = ctx.needs_input_grad[4:8]
        through = need_x or need_branch or need_gate or need_branch_bias
        if not (through or need_shift or need_scale or need_weight or need_bias):
            return residual, y
        if not through:
            ctx.mark_non_differentiable(residual)
        ctx.rms, ctx.backend = rms, backend
        ctx.branch = gradient_dtype(branch, need_branch)
        ctx.gate = *row_gradient(gate, need_gate), gradient_dtype(branch_bias, need_branch_bias)
        ctx.rows = (*row_gradient(shift, need_shift), *row_gradient(scale, need_scale))
        ctx.affine = gradient_dtype(weight, need_weight), gradient_dtype(bias, need_bias)
        gated = gate is not None and (need_branch or need_branch_bias)
        scaled = scale is not None and (through or need_weight or need_bias)
        divided = index is not None and (need_gate or need_shift or need_scale or gated or scaled)
        normed = through or need_scale or need_weight or divided
        ctx.save_for_backward(
            residual if normed else None,
            branch if need_gate else None,
            gate if gated else None,
            branch_bias if need_gate else None,
            scale if scaled else None,
            weight if through or need_scale else None,
            bias if need_scale else None,
            mean if normed else None,
            rstd if normed else None,
            index if divided else None,
        )
        return residual, y

    @staticmethod
    @once
    def backward(ctx: Any, *gradients: Any):
        residual, branch, gate, branch_bias, scale, weight, bias, mean, rstd, index = ctx.saved_tensors
        dresidual, dy = (gradient.contiguous() for gradient in gradients)
        if type(dresidual) is not type(dy):  # for what nobody read, autograd makes plain zeros, of a DTensor too
            dresidual = torch.zeros_like(dy, dtype=dresidual.dtype) if type(dresidual) is Tensor else dresidual
            dy = torch.zeros_like(dresidual, dtype=dy.dtype) if type(dy) is Tensor else dy
        if residual is None:
            dshift, dbias = offset_gradients(dy, scale, ctx.rows[:2], ctx.affine[1])
            return *(None,) * 4, dshift, None, None, dbias, *(None,) * 5
        needs, branch_dtype = ctx.needs_input_grad[:8], ctx.branch
        ungated = branch_dtype is not None and gate is None  # its gradient is that of x
        dx, dbranch, *parameters = kernels(ctx.backend).gate_residual_adaln_bwd(
            dresidual, dy, residual, branch, gate, branch_bias, scale, weight, bias, mean, rstd, index, ctx.rms,
            needs[0] or ungated, None if ungated else branch_dtype, *ctx.gate, *ctx.rows, *ctx.affine,
        )  # fmt: skip
        dbranch = dx.to(branch_dtype) if ungated else dbranch
        return *asked_for(needs, (dx, dbranch, *parameters)), *(None,) * 5


def _kernels(x, branch, gate, shift, scale, weight, bias, branch_bias=None, index=None):
    tensors = dict(branch=branch, gate=gate, branch_bias=branch_bias, shift=shift, scale=scale)
    return kernel_refusal(x=x, **tensors, weight=weight, bias=bias)


def _triton(x, branch, gate, shift, scale, weight, bias, branch_bias=None, index=None):
    tensors = dict(branch=branch, gate=gate, branch_bias=branch_bias, shift=shift, scale=scale)
    return triton_refusal(x, **tensors, weight=weight, bias=bias)


BACKENDS: backends.Table = {"reference": lambda *_: None, "cpu": _kernels, "triton": _triton}


@shortcut
def gate_residual_adaln(
    x: Tensor,
    branch: Tensor,
    gate: Tensor | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    branch_bias: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    index: Tensor | None = None,
    norm: Norm = "layer",
    eps: float = 1e-6,
    backend: backends.Name | None = None,
) -> tuple[Tensor, Tensor]:
    """Gated residual and the norm that reads it: ``x' = x + gate * (branch + branch_bias)``, ``y = adaln(x', ...)``.

    Every tensor is differentiable. x' is rounded to x's dtype before the norm reads it.

    Source: Peebles & Xie 2022 (arXiv 2212.09748).

    Args:
        x: Tokens ``[B, N, D]``, any D (Triton: up to 8192); float16, bfloat16, float32, or
            float64 on the reference.
        branch: Output of the branch, ``[B, N, D]``. The dtype may differ from x's: an fp32 residual stream under bf16
            branches.
        gate: Factor of the branch: ``[B, D]`` has one row per sample; ``[B, R, D]`` has R rows, where R divides N.
            With 1 in place of B all samples share the rows. Strided views are read in place. None adds the branch as
            it is.
        shift: Offset after the norm; the same shapes, with an R of its own. None adds nothing.
        scale: Factor after the norm, less 1; the same shapes, with an R of its own. None multiplies by 1.
        branch_bias: Bias ``[D]`` of the Linear that made ``branch``, as in :func:`gate_residual`.
        weight: Affine weight ``[D]`` of the norm.
        bias: Affine bias ``[D]`` of the norm; only with ``norm="layer"``.
        index: The row of each token in ``gate``, ``shift`` and ``scale``, ``[N]`` or ``[B, N]``, int64 or int32. They
            then have the same R, which may be any.
        norm: ``"layer"`` or ``"rms"``.
        eps: Constant added to the variance, or to the mean square of ``"rms"``.
        backend: Backend to run, or None for the automatic choice.

    Returns:
        ``(x', y)``, both ``[B, N, D]``. x' has x's dtype; y has the branch's, or autocast's inside autocast.

    Raises:
        ValueError: A shape, device or option does not fit, ``index`` names a row that is not there, or the chosen
            backend refuses the call.
        TypeError: An argument is not a dense floating-point tensor, or an option not a number.
        RuntimeError: The chosen backend is not available.

    Examples:
        >>> x, branch = torch.randn(2, 12, 64), torch.randn(2, 12, 64)
        >>> gate, shift, scale = torch.randn(2, 3 * 64).chunk(3, dim=-1)
        >>> x, y = gate_residual_adaln(x, branch, gate, shift, scale)
        >>> y.shape
        torch.Size([2, 12, 64])

        Four tokens of text and eight of video, with rows of their own:

        >>> gate, shift, scale = torch.randn(2, 2, 3 * 64).chunk(3, dim=-1)
        >>> kind = torch.tensor([0] * 4 + [1] * 8)
        >>> x, y = gate_residual_adaln(x, branch, gate, shift, scale, index=kind)
    """
    op = "gate_residual_adaln"
    check_tokens(op, "x", x)
    check_tokens(op, "branch", branch, like=x)
    check_norm(op, norm, bias)
    eps = number(op, "eps", eps, 0)
    made_of = (shift, scale, weight, bias, index)
    gate, shift, scale = (
        rows(op, name, parameter, x, index is not None)
        for name, parameter in (("gate", gate), ("shift", shift), ("scale", scale))
    )
    index = row_index(op, index, x, gate=gate, shift=shift, scale=scale)
    branch_bias = affine(op, "branch_bias", branch_bias, x)
    weight, bias = affine(op, "weight", weight, x), affine(op, "bias", bias, x)
    call = x, branch, gate, shift, scale, weight, bias, branch_bias, index
    chosen = backends.choose(op, BACKENDS, x.device, backend, *call)
    if chosen == "reference":
        tensors = x, branch, gate, shift, scale, branch_bias, weight, bias, index
        residual, y = backends.plain(reference, *tensors, norm, eps)
    else:
        options = (norm == "rms", eps, output_dtype(x, branch), chosen)
        tokens = x.contiguous(), beside(branch, x.dtype).contiguous()
        parameters = gate, branch_bias, shift, scale, weight, bias, index
        residual, y = backends.apply(_GateResidualAdaLN, *tokens, *parameters, *options)
    remember(y, (residual, *made_of), norm, eps)
    return residual, y
