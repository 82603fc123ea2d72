"""Adaptive layer norm: normalise each token, then scale and shift it by rows that depend on the condition.

    h = norm(x)                      over D; "layer": (x - mean) / sqrt(var + eps), "rms": x / sqrt(mean(x^2) + eps)
    a = h * weight + bias            only with an affine weight (and bias)
    y = a * (1 + scale) + shift      token n reads row n // (N / R), or row index[n]

Source: Peebles & Xie 2022 (arXiv 2212.09748), adaLN-Zero; CogVideoX has the affine form (arXiv 2408.06072).

Backward. rstd is 1 / sqrt(var + eps). Sums are fp32; they run over the tokens of a row in a fixed order.

    dshift = sum dy                  dscale = sum dy * a            da = dy * (1 + scale)
    dweight = sum da * h             dbias = sum da                 dh = da * weight
    dx = rstd * (dh - mean(dh) - h * mean(dh * h))                  (without mean(dh) for "rms")
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from ..backends import define, kernels, register_fake
from ..checks import beside, compute_dtype, kernel_refusal, number
from ..derivatives import once
from ..modulation import (
    Norm,
    affine,
    asked_for,
    broadcast,
    check_norm,
    check_tokens,
    gradient_dtype,
    offset_gradients,
    remember,
    row_gradient,
    row_index,
    row_of_each,
    rows,
    triton_refusal,
)
from ..sharding import token_local
from ..shortcut import shortcut


def reference(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    index: Tensor | None = None,
    norm: Norm = "layer",
    eps: float = 1e-6,
) -> Tensor:
    """The equation in plain PyTorch. ``shift`` and ``scale`` are ``[B, R, D]`` or None, ``index`` int64 or None."""
    shift, scale = row_of_each(shift, index), row_of_each(scale, index)
    out_dtype = compute_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        cast = [None if p is None else p.to(x.dtype) for p in (weight, bias)]
        if norm == "layer":
            h = F.layer_norm(x, x.shape[-1:], cast[0], cast[1], eps)
        else:
            h = F.rms_norm(x, x.shape[-1:], cast[0], eps)
        if scale is not None:
            h, gain = broadcast(h, 1 + scale)
            h = (h * gain).flatten(1, 2)
        if shift is not None:
            h, offset = broadcast(h, shift)
            h = (h + offset).flatten(1, 2)
        return h.to(out_dtype)


define(
    "adaln_fwd(Tensor x, Tensor? shift, Tensor? scale, Tensor? weight, Tensor? bias, Tensor? index, bool rms, "
    "float eps, ScalarType out_dtype) -> (Tensor y, Tensor mean, Tensor rstd)"
)
# A gradient that is not asked for (False, no dtype) comes back without elements; what it alone reads may be None.
define(
    "adaln_bwd(Tensor dy, Tensor x, Tensor? scale, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd, "
    "Tensor? index, bool rms, bool need_x, ScalarType? dshift, SymInt shift_rows, ScalarType? dscale, "
    "SymInt scale_rows, ScalarType? dweight, ScalarType? dbias) "
    "-> (Tensor dx, Tensor dshift, Tensor dscale, Tensor dweight, Tensor dbias)"
)


token_local("adaln")


@register_fake("adaln_fwd")
def _(x, shift, scale, weight, bias, index, rms, eps, out_dtype):
    statistic = x.new_empty(x.shape[:2], dtype=torch.float32)
    return x.new_empty(x.shape, dtype=out_dtype), statistic, torch.empty_like(statistic)


@register_fake("adaln_bwd")
def _(dy, x, scale, weight, bias, mean, rstd, index, rms, need_x, *asked):
    return x.new_empty(x.shape if need_x else 0), *parameter_gradients(x, *asked)


def parameter_gradients(x: Tensor, shift, shift_rows, scale, scale_rows, weight, bias) -> list[Tensor]:
    """Empty tensors for the gradients that are asked for."""
    batch, _, width = x.shape
    rows = ((shift, (batch, shift_rows, width)), (scale, (batch, scale_rows, width)))
    return [
        x.new_empty(0) if dtype is None else x.new_empty(shape, dtype=dtype)
        for dtype, shape in (*rows, (weight, (width,)), (bias, (width,)))
    ]


class _AdaLN(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, shift, scale, weight, bias, index, rms, eps, out_dtype, backend):
        y, mean, rstd = kernels(backend).adaln_fwd(x, shift, scale, weight, bias, index, rms, eps, out_dtype)
        need_x, need_shift, need_scale, need_weight, need_bias = ctx.needs_input_grad[:5]
        if not (need_x or need_shift or need_scale or need_weight or need_bias):
            return y
        ctx.rms, ctx.backend = rms, backend
        ctx.rows = (*row_gradient(shift, need_shift), *row_gradient(scale, need_scale))
        ctx.affine = gradient_dtype(weight, need_weight), gradient_dtype(bias, need_bias)
        scaled = scale is not None and (need_x or need_weight or need_bias)
        divided = index is not None and (need_shift or need_scale or scaled)
        normed = need_x or need_scale or need_weight or divided
        ctx.save_for_backward(
            x if normed else None,
            scale if scaled else None,
            weight if need_x or need_scale else None,
            bias if need_scale else None,
            mean if normed else None,
            rstd if normed else None,
            index if divided else None,
        )
        return y

    @staticmethod
    @once
    def backward(ctx: Any, *gradients: Any):
        x, scale, weight, bias, mean, rstd, index = ctx.saved_tensors
        dy = gradients[0].contiguous()
        if x is None:
            dshift, dbias = offset_gradients(dy, scale, ctx.rows[:2], ctx.affine[1])
            return None, dshift, None, None, dbias, *(None,) * 5
        needs = ctx.needs_input_grad[:5]
        asked = (needs[0], *ctx.rows, *ctx.affine)
        found = kernels(ctx.backend).adaln_bwd(dy, x, scale, weight, bias, mean, rstd, index, ctx.rms, *asked)
        return *asked_for(needs, found), *(None,) * 5


def _kernels(x, shift, scale, weight, bias, index=None):
    return kernel_refusal(x=x, shift=shift, scale=scale, weight=weight, bias=bias)


def _triton(x, shift, scale, weight, bias, index=None):
    return triton_refusal(x, shift=shift, scale=scale, weight=weight, bias=bias)


BACKENDS: backends.Table = {"reference": lambda *_: None, "cpu": _kernels, "triton": _triton}


@shortcut
def adaln(
    x: Tensor,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    index: Tensor | None = None,
    norm: Norm = "layer",
    eps: float = 1e-6,
    backend: backends.Name | None = None,
) -> Tensor:
    """Adaptive layer norm: ``y = (norm(x) * weight + bias) * (1 + scale) + shift``.

    Every tensor is differentiable. The kernels compute statistics, ``1 + scale`` and sums in fp32 and round the result
    once; the reference rounds as eager PyTorch does.

    Source: Peebles & Xie 2022 (arXiv 2212.09748).

    Args:
        x: Tokens ``[B, N, D]``, any D (Triton: up to 8192); float16, bfloat16, float32, or
            float64 on the reference.
        shift: Offset after the norm: ``[B, D]`` has one row per sample; ``[B, R, D]`` has R rows, where R divides N:
            ``R = T`` is one row per frame, ``R = N`` one per token. With 1 in place of B all samples share the rows.
            Strided views are read in place. The dtype may differ from x's. None adds nothing.
        scale: Factor after the norm, less 1; the same shapes as ``shift``, with an R of its own. None multiplies by 1.
        weight: Affine weight ``[D]`` of the norm.
        bias: Affine bias ``[D]`` of the norm; only with ``norm="layer"``.
        index: The row of each token, ``[N]`` or ``[B, N]``, int64 or int32. ``shift`` and ``scale`` then have the same
            R, which may be any. No gradient of ``[B, N, D]`` is made on the way to theirs. Nobody looks at it on a
            GPU, where the kernels take the nearest row, or inside torch.compile.
        norm: ``"layer"`` or ``"rms"``.
        eps: Constant added to the variance, or to the mean square of ``"rms"``.
        backend: Backend to run, or None for the automatic choice.

    Returns:
        ``[B, N, D]`` in x's dtype; inside autocast in autocast's dtype.

    Raises:
        ValueError: A shape, device or option does not fit, ``index`` names a row that is not there, or the chosen
            backend refuses the call.
        TypeError: An argument is not a dense floating-point tensor, or an option not a number.
        RuntimeError: The chosen backend is not available.

    Examples:
        >>> x, c = torch.randn(2, 12, 64), torch.randn(2, 128)
        >>> shift, scale = c.chunk(2, dim=-1)
        >>> adaln(x, shift, scale).shape
        torch.Size([2, 12, 64])

        Row 0 for the four tokens of the first frame, which is given, row 1 for those that are noise:

        >>> shift, scale = torch.randn(2, 2, 128).chunk(2, dim=-1)
        >>> adaln(x, shift, scale, index=(torch.arange(12) >= 4).long()).shape
        torch.Size([2, 12, 64])
    """
    check_tokens("adaln", "x", x)
    check_norm("adaln", norm, bias)
    eps = number("adaln", "eps", eps, 0)
    made_of = (x, shift, scale, weight, bias, index)
    named = index is not None
    shift, scale = rows("adaln", "shift", shift, x, named), rows("adaln", "scale", scale, x, named)
    index = row_index("adaln", index, x, shift=shift, scale=scale)
    weight, bias = affine("adaln", "weight", weight, x), affine("adaln", "bias", bias, x)
    chosen = backends.choose("adaln", BACKENDS, x.device, backend, x, shift, scale, weight, bias, index)
    if chosen == "reference":
        y = backends.plain(reference, x, shift, scale, weight, bias, index, norm, eps)
    else:
        dtype = compute_dtype(x)
        options = (norm == "rms", eps, dtype, chosen)
        parameters = shift, scale, weight, bias, index
        y = backends.apply(_AdaLN, beside(x, dtype).contiguous(), *parameters, *options)
    remember(y, made_of, norm, eps)
    return y
