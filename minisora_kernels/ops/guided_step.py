"""Classifier-free guidance and a sampler's update, in one pass over the latents.

    g  = null + w (cond - null)              on the first channels; cond on the others, and where there is no null
    x' = a x + b g + c exp(s (v - 1)) z      v: the channels of a learned variance, which follow cond's; else 1

Solvers differ in the five coefficients only (models/sampling/plans.py has them), and in what z is:

    Euler, DDIM          no z
    Heun, multistep      z = the state, or the prediction, of an earlier step
    ancestral            z = noise, c = its standard deviation; as v goes from 1 to -1, a learned variance falls from
                         c^2 to exp(-4 s) c^2

Source: Ho & Salimans 2022 (arXiv 2207.12598); learned variance: Nichol & Dhariwal 2021 (arXiv 2102.09672).

Sampling needs no derivatives, so the kernels have no backward: a call that wants one is served by the reference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from ..backends import define, kernels, register_fake
from ..checks import check_tensor, gradient_refusal, kernel_refusal


def reference(
    x: Tensor, cond: Tensor, null: Tensor | None, z: Tensor | None, coefficients: Tensor, channels: int
) -> Tensor:
    """The equations in plain PyTorch. ``coefficients``: ``[B, 5]``; ``channels``: how many are guided."""
    dtype, count = torch.promote_types(x.dtype, coefficients.dtype), x.shape[1]
    w, a, b, c, s = coefficients.to(dtype).reshape(-1, 5, *(1,) * (x.dim() - 1)).unbind(1)
    g, v = cond[:, :count].to(dtype), cond[:, count:].to(dtype)
    if null is not None:
        guided = torch.lerp(null[:, :channels].to(dtype), g[:, :channels], w)
        g = guided if channels == count else torch.cat((guided, g[:, channels:]), dim=1)
    y = a * x + b * g
    if z is not None:
        y = y + (c * (s * (v - 1)).exp() if v.shape[1] else c) * z
    return y.to(x.dtype)


define(
    "guided_step_fwd(Tensor x, Tensor cond, Tensor? null, Tensor? z, Tensor coefficients, SymInt channels) -> Tensor"
)


@register_fake("guided_step_fwd")
def _(x, cond, null, z, coefficients, channels):
    return x.new_empty(x.shape)


def _kernel(x, cond, null, z, coefficients):
    if coefficients.dtype != torch.float32:
        return f"coefficients have dtype {coefficients.dtype}; the kernels take float32"
    tensors = dict(x=x, cond=cond, null=null, z=z)
    return kernel_refusal(**tensors) or gradient_refusal(**tensors, coefficients=coefficients)


BACKENDS: backends.Table = {"reference": lambda *_: None, "cpu": _kernel, "triton": _kernel}


def guided_step(
    x: Tensor,
    cond: Tensor,
    coefficients: Tensor,
    *,
    null: Tensor | None = None,
    z: Tensor | None = None,
    channels: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """``a x + b (null + w (cond - null)) + c exp(s (v - 1)) z``. Differentiable on the reference backend only.

    Args:
        x: latents ``[B, C, ...]``; float16, bfloat16, float32 (float64: reference only).
        cond: the model's prediction ``[B, C, ...]``, or ``[B, 2 C, ...]`` with a learned variance; any of these dtypes.
        coefficients: ``(w, a, b, c, s)``: ``[5]``, or ``[B, 5]`` with a row a sample; float32 (others: reference only).
            They stay on the device. w is used with null only, c with z, s with z and a learned variance.
        null: the prediction without the condition, of cond's shape and dtype, whose variance is not read; None: no
            guidance.
        z: of x's shape and dtype; None: no such term.
        channels: guide the first so many channels only, as Meta's DiT does; None guides all.
        backend: ``None`` chooses; a name runs that backend or raises.

    Returns:
        ``[B, C, ...]`` in x's dtype; computed in fp32 by the kernels, in the wider dtype of x and coefficients by the
        reference, and rounded once.

    Raises:
        ValueError, TypeError, RuntimeError: as for :func:`minisora_kernels.adaln`. A kernel that is asked for by name
            refuses tensors that require a gradient, unless inside ``torch.no_grad()``.
    """
    check_tensor("guided_step", "x", x)
    if x.dim() < 2:
        raise ValueError(f"guided_step: x must be [B, C, ...], got shape {tuple(x.shape)}")
    batch, count = x.shape[:2]
    check_tensor("guided_step", "cond", cond, x)
    allowed = [(batch, factor * count, *x.shape[2:]) for factor in (1, 2)]
    if tuple(cond.shape) not in allowed:
        raise ValueError(
            f"guided_step: cond has shape {tuple(cond.shape)}; it may be {allowed[0]}, or with a learned variance "
            f"{allowed[1]}"
        )
    for name, tensor, like, like_name in (("null", null, cond, "cond"), ("z", z, x, "x")):
        if tensor is not None:
            check_tensor("guided_step", name, tensor, x)
            if tensor.shape != like.shape or tensor.dtype != like.dtype:
                raise ValueError(
                    f"guided_step: {name} is {tensor.dtype} of shape {tuple(tensor.shape)}; it must be as {like_name}: "
                    f"{like.dtype} of shape {tuple(like.shape)}"
                )
    check_tensor("guided_step", "coefficients", coefficients, x)
    if tuple(coefficients.shape) not in ((5,), (batch, 5)):
        raise ValueError(
            f"guided_step: coefficients have shape {tuple(coefficients.shape)}; they may be [5] or [B, 5] with B = "
            f"{batch}"
        )
    if channels is None:
        channels = count
    elif null is None:
        raise ValueError(f"guided_step: channels is {channels}, but there is no null to guide with")
    elif not 1 <= channels <= count:
        raise ValueError(f"guided_step: channels is {channels}; it may be 1..{count}, or None for all")
    coefficients = coefficients.contiguous().expand(batch, 5)
    chosen = backends.choose("guided_step", BACKENDS, x.device, backend, x, cond, null, z, coefficients)
    if chosen == "reference":
        return reference(x, cond, null, z, coefficients, channels)
    null, z = (None if tensor is None else tensor.contiguous() for tensor in (null, z))
    return kernels(chosen).guided_step_fwd(x.contiguous(), cond.contiguous(), null, z, coefficients, channels)
