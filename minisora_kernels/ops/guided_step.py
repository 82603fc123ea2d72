"""Classifier-free guidance and a sampler's update, in one pass over the latents.

    g  = null + w (cond - null)              on the first channels; g = cond on the others, and without null
    x' = a x + b g + c exp(s (v - 1)) z      v: the channels of a learned variance, which follow cond's; else 1

Solvers differ in the five coefficients (models/sampling/plans.py has them) and in z:

    Euler, DDIM          no z
    Heun, multistep      z is the state, or the prediction, of an earlier step
    ancestral            z is noise, c is its standard deviation; while v goes from 1 to -1, a learned variance falls
                         from c^2 to exp(-4 s) c^2

Source: Ho & Salimans 2022 (arXiv 2207.12598); learned variance: Nichol & Dhariwal 2021 (arXiv 2102.09672).

Sampling needs no derivatives, so the kernels have no backward. The reference serves a call that needs one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..backends import define, kernels, register_fake
from ..checks import check_tensor, gradient_refusal, kernel_refusal, number, whole
from ..shortcut import shortcut


class Coefficients(NamedTuple):
    """The coefficients of a step, by name: numbers, or tensors ``[]`` or ``[B]`` with one value per sample.

    Numbers are copied to the device in every call. A sampler packs the coefficients of all its steps ahead, as a tensor
    whose last axis has them in this order.
    """

    guidance: Tensor | float = 1.0
    """w, the scale of classifier-free guidance; read only with ``null``."""
    state: Tensor | float = 1.0
    """a, the factor of x."""
    prediction: Tensor | float = 0.0
    """b, the factor of the guided prediction."""
    noise: Tensor | float = 0.0
    """c, the factor of z; read only with ``z``."""
    variance: Tensor | float = 0.0
    """s, the weight of a learned variance; read only with ``z`` and a learned variance."""

    def packed(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """``[5]``, or ``[B, 5]`` where a coefficient has a value per sample."""
        parts = [
            torch.as_tensor(
                value if isinstance(value, Tensor) else number("guided_step", f"coefficients.{name}", value),
                dtype=dtype,
                device=device,
            )
            for name, value in zip(self._fields, self, strict=True)
        ]
        return torch.stack(torch.broadcast_tensors(*parts), dim=-1)


def reference(
    x: Tensor, cond: Tensor, null: Tensor | None, z: Tensor | None, coefficients: Tensor, channels: int
) -> Tensor:
    """The equations in plain PyTorch. ``coefficients`` is ``[B, 5]``; the first ``channels`` are guided."""
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


@shortcut
def guided_step(
    x: Tensor,
    cond: Tensor,
    coefficients: Tensor | Coefficients,
    *,
    null: Tensor | None = None,
    z: Tensor | None = None,
    channels: int | None = None,
    backend: backends.Name | None = None,
) -> Tensor:
    """Guidance and a sampler's update: ``x' = a x + b (null + w (cond - null)) + c exp(s (v - 1)) z``.

    The reference is differentiable; the kernels have no backward. The kernels compute in fp32, the reference in the
    wider dtype of x and the coefficients. Both round once.

    Source: Ho & Salimans 2022 (arXiv 2207.12598).

    Args:
        x: Latents ``[B, C, ...]``; float16, bfloat16, float32, or float64 on the reference.
        cond: Prediction of the model, ``[B, C, ...]``, or ``[B, 2 C, ...]`` with a learned variance v in the second
            half; any of these dtypes.
        coefficients: ``(w, a, b, c, s)`` by name, or packed in this order as a tensor ``[5]``, or ``[B, 5]`` with one
            row per sample. A packed tensor stays on the device; it is float32, or any of these dtypes on the reference.
        null: Prediction without the condition, of cond's shape and dtype; its variance is not read. None turns
            guidance off.
        z: Noise, or an earlier state, of x's shape and dtype; None drops the term.
        channels: Number of leading channels to guide, as Meta's DiT does; None guides all.
        backend: Backend to run, or None for the automatic choice.

    Returns:
        ``[B, C, ...]`` in x's dtype.

    Raises:
        ValueError: A shape, device or option does not fit, or the chosen backend refuses the call. A kernel refuses
            tensors that require a gradient, unless inside ``torch.no_grad()``.
        TypeError: An argument is not a dense floating-point tensor, or an option not a number.
        RuntimeError: The chosen backend is not available.

    Examples:
        An Euler step of a flow, from velocity, with a guidance of 4:

        >>> x, cond, null = torch.randn(3, 2, 4, 8, 8).unbind(0)
        >>> guided_step(x, cond, Coefficients(guidance=4.0, prediction=0.02), null=null).shape
        torch.Size([2, 4, 8, 8])
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
    if isinstance(coefficients, Coefficients):
        coefficients = coefficients.packed(torch.promote_types(x.dtype, torch.float32), x.device)
    check_tensor("guided_step", "coefficients", coefficients, x)
    if tuple(coefficients.shape) not in ((5,), (batch, 5)):
        raise ValueError(
            f"guided_step: coefficients have shape {tuple(coefficients.shape)}; they may be [5] or [B, 5] with B = "
            f"{batch}"
        )
    if channels is not None and null is None:
        raise ValueError(f"guided_step: channels is {channels}, but there is no null to guide with")
    channels = count if channels is None else whole("guided_step", "channels", channels)
    if not 1 <= channels <= max(count, 1):
        raise ValueError(f"guided_step: channels is {channels}; it may be 1..{count}, or None for all")
    coefficients = coefficients.contiguous().expand(batch, 5)
    chosen = backends.choose("guided_step", BACKENDS, x.device, backend, x, cond, null, z, coefficients)
    if chosen == "reference":
        return backends.plain(reference, x, cond, null, z, coefficients, channels)
    null, z = (None if tensor is None else tensor.contiguous() for tensor in (null, z))
    return kernels(chosen).guided_step_fwd(x.contiguous(), cond.contiguous(), null, z, coefficients, channels)
