"""Global response normalisation: a channel that is stronger than the mean channel of its frame grows, others shrink.

    a = x, or gelu(x) = x * Phi(x)             Phi: the normal distribution; the exact form of GELU
    G = sqrt(sum a^2)                          per channel, over the N sites of a frame
    s = G / (mean(G) + eps)                    mean over the C channels of the frame
    y = a * (1 + weight * s) + bias            = weight * (a * s) + bias + a

Source: Woo et al. 2023 (arXiv 2301.00808), ConvNeXt V2. The ResBlock of StableCascade has the GELU before it
(Pernias et al. 2023, arXiv 2306.00637).

Backward. G couples the sites, and its mean couples the channels. P = sum dy * a runs over the sites, and
r = 1 / (mean(G) + eps). The gradient of s is weight * P. s_c depends on G_c through r, and on every G through the mean:

    dbias = sum dy                   dweight = sum over frames s * P
    dG = r * (weight * P - mean(weight * P * s))         mean over C
    da = dy * (1 + weight * s) + a * dG / G              the second term is 0 where G is 0
    dx = da, or da * gelu'(x)                            gelu'(x) = Phi(x) + x * phi(x), phi: the density

So the backward needs x and G only. The pass that reads x computes a again.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from ..backends import define, kernels, register_fake
from ..checks import beside, check_tensor, compute_dtype, kernel_refusal, number, whole
from ..derivatives import once
from ..modulation import asked_for, check_tokens, gradient_dtype
from ..shortcut import shortcut


def reference(x: Tensor, weight: Tensor, bias: Tensor, gelu: bool = False, eps: float = 1e-6) -> Tensor:
    """The equation in plain PyTorch. ``x`` is frames ``[F, N, C]``."""
    out_dtype = compute_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        a = F.gelu(x) if gelu else x
        statistic = torch.promote_types(x.dtype, torch.float32)
        # vector_norm is slower. The bound keeps the derivative of the root finite where a whole channel is 0.
        norms = a.to(statistic).square().sum(1, keepdim=True).clamp_min(torch.finfo(statistic).tiny).sqrt()
        gain = 1 + weight.to(statistic) * (norms / (norms.mean(-1, keepdim=True) + eps))
        return torch.addcmul(bias.to(x.dtype), a, gain.to(x.dtype)).to(out_dtype)


define(
    "grn_fwd(Tensor x, Tensor weight, Tensor bias, bool gelu, float eps, ScalarType out_dtype) -> "
    "(Tensor y, Tensor norms)"
)
# A gradient without a dtype is not asked for and comes back without elements; dx alone reads the weight.
define(
    "grn_bwd(Tensor dy, Tensor x, Tensor? weight, Tensor norms, bool gelu, float eps, bool need_x, ScalarType? dweight,"
    " ScalarType? dbias) -> (Tensor dx, Tensor dweight, Tensor dbias)"
)


@register_fake("grn_fwd")
def _(x, weight, bias, gelu, eps, out_dtype):
    frames, _, width = x.shape
    return x.new_empty(x.shape, dtype=out_dtype), x.new_empty((frames, width), dtype=torch.float32)


@register_fake("grn_bwd")
def _(dy, x, weight, norms, gelu, eps, need_x, dweight, dbias):
    affine = (x.new_empty(0) if dtype is None else x.new_empty(x.shape[2], dtype=dtype) for dtype in (dweight, dbias))
    return x.new_empty(x.shape if need_x else 0), *affine


class _GRN(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, weight, bias, gelu, eps, out_dtype, backend):
        y, norms = kernels(backend).grn_fwd(x, weight, bias, gelu, eps, out_dtype)
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        if not (need_x or need_weight or need_bias):
            return y
        ctx.gelu, ctx.eps, ctx.backend = gelu, eps, backend
        ctx.affine = gradient_dtype(weight, need_weight), gradient_dtype(bias, need_bias)
        normed = need_x or need_weight
        ctx.save_for_backward(x if normed else None, weight if need_x else None, norms if normed else None)
        return y

    @staticmethod
    @once
    def backward(ctx: Any, *gradients: Any):
        x, weight, norms = ctx.saved_tensors
        dy, needs = gradients[0].contiguous(), ctx.needs_input_grad[:3]
        if x is None:  # a sum of dy, which needs no tokens
            return None, None, dy.sum((0, 1), dtype=torch.float32).to(ctx.affine[1]), *(None,) * 4
        found = kernels(ctx.backend).grn_bwd(dy, x, weight, norms, ctx.gelu, ctx.eps, needs[0], *ctx.affine)
        return *asked_for(needs, found), *(None,) * 4


def _kernels(x, weight, bias):
    return kernel_refusal(x=x, weight=weight, bias=bias)


BACKENDS: backends.Table = {"reference": lambda *_: None, "cpu": _kernels, "triton": _kernels}


@shortcut
def grn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    groups: int = 1,
    activation: Literal["gelu"] | None = None,
    eps: float = 1e-6,
    backend: backends.Name | None = None,
) -> Tensor:
    """Global response normalisation: ``y = a * (1 + weight * s) + bias`` with ``s = G / (mean(G) + eps)``.

    ``a`` is x or its GELU. ``G`` has one norm per channel, over the sites of a frame. Every tensor is differentiable;
    the op saves x and G. The kernels compute in fp32 and round once; the reference rounds as eager PyTorch does.

    Source: Woo et al. 2023 (arXiv 2301.00808).

    Args:
        x: Tokens ``[B, N, C]``, channels last; float16, bfloat16, float32, or float64 on the reference.
        weight: ``[C]``; the dtype may differ from x's.
        bias: ``[C]``; the dtype may differ from x's.
        groups: Number of frames; the N tokens are this many runs of neighbours, and each is normalised by itself. It
            must divide N.
        activation: ``"gelu"`` applies GELU first, in the same passes, in its exact form (torch's
            ``approximate="none"``); None applies nothing.
        eps: Constant added to the mean norm of a frame.
        backend: Backend to run, or None for the automatic choice.

    Returns:
        ``[B, N, C]`` in x's dtype; inside autocast in autocast's dtype.

    Raises:
        ValueError: A shape, device or option does not fit, or the chosen backend refuses the call.
        TypeError: An argument is not a dense floating-point tensor, or an option not a number.
        RuntimeError: The chosen backend is not available.

    Examples:
        >>> x = torch.randn(1, 4 * 9, 16)  # 4 frames of 3 x 3 sites
        >>> grn(x, torch.ones(16), torch.zeros(16), groups=4, activation="gelu").shape
        torch.Size([1, 36, 16])
    """
    check_tokens("grn", "x", x)
    batch, tokens, width = x.shape
    for name, parameter in (("weight", weight), ("bias", bias)):
        check_tensor("grn", name, parameter, x)
        if tuple(parameter.shape) != (width,):
            raise ValueError(f"grn: {name} has shape {tuple(parameter.shape)}; it must be [C] with C = {width}")
    eps, groups = number("grn", "eps", eps), whole("grn", "groups", groups)
    if not eps > 0:
        raise ValueError(f"grn: eps is {eps}; it must be positive, because a frame may be all zeros")
    if activation not in (None, "gelu"):
        raise ValueError(f"grn: activation is {activation!r}; it may be None or 'gelu'")
    if groups < 1 or tokens % groups:
        raise ValueError(f"grn: groups is {groups}; it must be positive and divide the {tokens} tokens of x")
    chosen = backends.choose("grn", BACKENDS, x.device, backend, x, weight, bias)
    frames = x.reshape(batch * groups, tokens // groups, width)
    if chosen == "reference":
        y = backends.plain(reference, frames, weight, bias, activation == "gelu", eps)
    else:
        dtype = compute_dtype(x)
        tensors = beside(frames, dtype).contiguous(), weight.contiguous(), bias.contiguous()
        y = backends.apply(_GRN, *tensors, activation == "gelu", eps, dtype, chosen)
    return y.view(x.shape)
