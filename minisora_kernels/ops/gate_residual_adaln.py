"""Gated residual and the adaptive layer norm that reads it, in one pass: what joins two branches of a DiT block.

    x' = x + gate * branch
    y  = adaln(x', shift, scale)     rows, norms and affine weights as in ops/adaln.py

x' is rounded to x's dtype before it is normalised, as the unfused pair of ops does.

Backward: with g = dx' + (dx of adaln at x', dy),

    dx = g                           dbranch = gate * g             dgate = sum g * branch

and dshift, dscale, dweight, dbias as in ops/adaln.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import backends
from ..backends import define, kernels, register_fake
from ..checks import compute_dtype, kernel_refusal
from ..modulation import affine, check_norm, check_tokens, rows, triton_refusal
from . import adaln, gate_residual


def reference(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm: str = "layer",
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """The two references in a row. ``gate``, ``shift``, ``scale``: ``[B, R, D]``."""
    residual = gate_residual.reference(x, branch, gate)
    y = adaln.reference(residual, shift, scale, weight=weight, bias=bias, norm=norm, eps=eps)
    return residual, y.to(output_dtype(x, branch))


def output_dtype(x: Tensor, branch: Tensor) -> torch.dtype:
    """y feeds the next branch: autocast's dtype inside autocast, else the branch's."""
    in_autocast = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    return compute_dtype(x) if in_autocast else branch.dtype


define(
    "gate_residual_adaln_fwd(Tensor x, Tensor branch, Tensor gate, Tensor shift, Tensor scale, Tensor? weight, "
    "Tensor? bias, bool rms, float eps, ScalarType out_dtype) -> (Tensor residual, Tensor y, Tensor mean, Tensor rstd)"
)
define(
    "gate_residual_adaln_bwd(Tensor dresidual, Tensor dy, Tensor residual, Tensor branch, Tensor gate, Tensor shift, "
    "Tensor scale, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd, bool rms) -> (Tensor dx, Tensor dbranch, "
    "Tensor dgate, Tensor dshift, Tensor dscale, Tensor dweight, Tensor dbias)"
)


@register_fake("gate_residual_adaln_fwd")
def _(x, branch, gate, shift, scale, weight, bias, rms, eps, out_dtype):
    statistic = x.new_empty(x.shape[:2], dtype=torch.float32)
    return x.new_empty(x.shape), x.new_empty(x.shape, dtype=out_dtype), statistic, torch.empty_like(statistic)


@register_fake("gate_residual_adaln_bwd")
def _(dresidual, dy, residual, branch, gate, shift, scale, weight, bias, mean, rstd, rms):
    return (
        residual.new_empty(residual.shape),
        branch.new_empty(branch.shape),
        gate.new_empty(gate.shape),
        shift.new_empty(shift.shape),
        scale.new_empty(scale.shape),
        adaln._affine_gradient(weight, residual),
        adaln._affine_gradient(bias, residual),
    )


class _GateResidualAdaLN(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, branch, gate, shift, scale, weight, bias, rms, eps, out_dtype, backend):
        branch = branch.contiguous()
        ctx.rms, ctx.backend = rms, backend
        residual, y, mean, rstd = kernels(ctx.backend).gate_residual_adaln_fwd(
            x.contiguous(), branch, gate, shift, scale, weight, bias, rms, eps, out_dtype
        )
        ctx.save_for_backward(residual, branch, gate, shift, scale, weight, bias, mean, rstd)
        return residual, y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any):
        residual, branch, gate, shift, scale, weight, bias, mean, rstd = ctx.saved_tensors
        dresidual, dy = (gradient.contiguous() for gradient in gradients)
        *data, dweight, dbias = kernels(ctx.backend).gate_residual_adaln_bwd(
            dresidual, dy, residual, branch, gate, shift, scale, weight, bias, mean, rstd, ctx.rms
        )
        dweight = None if weight is None else dweight
        dbias = None if bias is None else dbias
        return *data, dweight, dbias, *(None,) * 4


def _kernels(x, branch, gate, shift, scale, weight, bias):
    return kernel_refusal(x=x, branch=branch, gate=gate, shift=shift, scale=scale, weight=weight, bias=bias)


def _triton(x, branch, gate, shift, scale, weight, bias):
    return triton_refusal(x, branch=branch, gate=gate, shift=shift, scale=scale, weight=weight, bias=bias)


BACKENDS: backends.Table = {"reference": lambda *_: None, "cpu": _kernels, "triton": _triton}


def gate_residual_adaln(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm: str = "layer",
    eps: float = 1e-6,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """``x' = x + gate * branch`` and ``y = adaln(x', shift, scale)``. Differentiable in every tensor.

    Args:
        x, branch: tokens ``[B, N, D]``, any D (Triton: up to 12288); float16, bfloat16, float32 (float64: reference
            only); dtypes may differ (an fp32 residual stream under bf16 branches).
        gate, shift, scale: ``[B, D]`` per sample, or ``[B, R, D]`` with R dividing N, each with its own R; strided
            views are read in place.
        weight, bias, norm, eps, backend: as for :func:`minisora_kernels.adaln`.

    Returns:
        ``(x', y)``, both ``[B, N, D]``: x' in x's dtype, y in the branch's; inside autocast y has autocast's dtype.

    Raises:
        ValueError, TypeError, RuntimeError: as for :func:`minisora_kernels.adaln`.
    """
    op = "gate_residual_adaln"
    check_tokens(op, "x", x)
    check_tokens(op, "branch", branch, like=x)
    check_norm(op, norm, bias)
    gate, shift, scale = rows(op, "gate", gate, x), rows(op, "shift", shift, x), rows(op, "scale", scale, x)
    weight, bias = affine(op, "weight", weight, x), affine(op, "bias", bias, x)
    chosen = backends.choose(op, BACKENDS, x.device, backend, x, branch, gate, shift, scale, weight, bias)
    if chosen == "reference":
        return reference(x, branch, gate, shift, scale, weight=weight, bias=bias, norm=norm, eps=eps)
    options = (norm == "rms", eps, output_dtype(x, branch), chosen)
    return backends.apply(_GateResidualAdaLN, x, branch, gate, shift, scale, weight, bias, *options)
