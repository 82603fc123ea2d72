"""Gated residual, then adaptive layer norm, in one pass: what joins two branches of a DiT block.

    x' = x + gate * branch
    y  = adaln(x', shift, scale)     rows, norms and affine weights as in ops/adaln.py

x' is rounded to x's dtype before the norm reads it, as the two separate ops do.

Backward. g is dx' plus the dx of adaln at (x', dy).

    dx = g                           dbranch = gate * g             dgate = sum g * branch

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
from ..modulation import affine, check_norm, check_tokens, remember, rows, triton_refusal
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
    """The two references, one after the other. ``gate``, ``shift`` and ``scale`` are ``[B, R, D]``."""
    residual = gate_residual.reference(x, branch, gate)
    y = adaln.reference(residual, shift, scale, weight=weight, bias=bias, norm=norm, eps=eps)
    return residual, y.to(output_dtype(x, branch))


def output_dtype(x: Tensor, branch: Tensor) -> torch.dtype:
    """The dtype of y, which the next branch reads: autocast's inside autocast, else the branch's."""
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
        ctx.rms, ctx.backend = rms, backend
        residual, y, mean, rstd = kernels(ctx.backend).gate_residual_adaln_fwd(
            x, branch, gate, shift, scale, weight, bias, rms, eps, out_dtype
        )
        ctx.save_for_backward(residual, branch, gate, shift, scale, weight, bias, mean, rstd)
        return residual, y

    @staticmethod
    @once
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
    """Gated residual and the norm that reads it: ``x' = x + gate * branch``, ``y = adaln(x', shift, scale)``.

    Every tensor is differentiable. x' is rounded to x's dtype before the norm reads it.

    Source: Peebles & Xie 2022 (arXiv 2212.09748).

    Args:
        x: Tokens ``[B, N, D]``, any D (Triton: up to 8192); float16, bfloat16, float32, or
            float64 on the reference.
        branch: Output of the branch, ``[B, N, D]``. The dtype may differ from x's: an fp32 residual stream under bf16
            branches.
        gate: Factor of the branch: ``[B, D]`` has one row per sample; ``[B, R, D]`` has R rows, where R divides N.
            Strided views are read in place.
        shift: Offset after the norm; the same shapes, with an R of its own.
        scale: Factor after the norm, less 1; the same shapes, with an R of its own.
        weight: Affine weight ``[D]`` of the norm.
        bias: Affine bias ``[D]`` of the norm; only with ``norm="layer"``.
        norm: ``"layer"`` or ``"rms"``.
        eps: Constant added to the variance, or to the mean square of ``"rms"``.
        backend: Backend to run, or None for the automatic choice.

    Returns:
        ``(x', y)``, both ``[B, N, D]``. x' has x's dtype; y has the branch's, or autocast's inside autocast.

    Raises:
        ValueError: A shape, device or option does not fit, or the chosen backend refuses the call.
        TypeError: An argument is not a dense floating-point tensor, or an option not a number.
        RuntimeError: The chosen backend is not available.

    Examples:
        >>> x, branch = torch.randn(2, 12, 64), torch.randn(2, 12, 64)
        >>> gate, shift, scale = torch.randn(2, 3 * 64).chunk(3, dim=-1)
        >>> x, y = gate_residual_adaln(x, branch, gate, shift, scale)
        >>> y.shape
        torch.Size([2, 12, 64])
    """
    op = "gate_residual_adaln"
    check_tokens(op, "x", x)
    check_tokens(op, "branch", branch, like=x)
    check_norm(op, norm, bias)
    eps = number(op, "eps", eps, 0)
    made_of = (shift, scale, weight, bias)
    gate, shift, scale = rows(op, "gate", gate, x), rows(op, "shift", shift, x), rows(op, "scale", scale, x)
    weight, bias = affine(op, "weight", weight, x), affine(op, "bias", bias, x)
    chosen = backends.choose(op, BACKENDS, x.device, backend, x, branch, gate, shift, scale, weight, bias)
    if chosen == "reference":
        residual, y = reference(x, branch, gate, shift, scale, weight=weight, bias=bias, norm=norm, eps=eps)
    else:
        options = (norm == "rms", eps, output_dtype(x, branch), chosen)
        tokens = x.contiguous(), beside(branch, x.dtype).contiguous()
        residual, y = backends.apply(_GateResidualAdaLN, *tokens, gate, shift, scale, weight, bias, *options)
    remember(y, (residual, *made_of), norm, eps)
    return residual, y
