"""new_op: in one sentence, what it computes and where a model has it.

    y = scale * x

Source: the paper, with its arXiv number.

Backward:

    dx = scale * dy
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..backends import define, kernels, register_fake
from ..checks import check_tensor, kernel_refusal, number
from ..derivatives import once
from ..shortcut import shortcut


def reference(x: Tensor, scale: float) -> Tensor:
    """The equation in plain PyTorch."""
    return x * scale


define("new_op_fwd(Tensor x, float scale) -> Tensor y")
define("new_op_bwd(Tensor dy, float scale) -> Tensor dx")


@register_fake("new_op_fwd")
def _(x, scale):
    return x.new_empty(x.shape)


@register_fake("new_op_bwd")
def _(dy, scale):
    return dy.new_empty(dy.shape)


class _NewOp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, scale, backend):
        ctx.scale, ctx.backend = scale, backend
        return kernels(backend).new_op_fwd(x, scale)

    @staticmethod
    @once
    def backward(ctx: Any, *gradients: Any):
        return kernels(ctx.backend).new_op_bwd(gradients[0].contiguous(), ctx.scale), None, None


def _kernels(x):
    return kernel_refusal(x=x)


BACKENDS: backends.Table = {"reference": lambda *_: None, "cpu": _kernels, "triton": _kernels}


@shortcut
def new_op(x: Tensor, scale: float, *, backend: backends.Name | None = None) -> Tensor:
    """``scale * x``. Differentiable in x.

    Args:
        x: any shape; float16, bfloat16, float32 (float64: reference only).
        scale: a number.
        backend: ``None`` chooses; a name runs that backend or raises.

    Returns:
        As x; on the kernels computed in fp32 and rounded once.

    Raises:
        ValueError, TypeError, RuntimeError: as for :func:`minisora_kernels.adaln`.
    """
    check_tensor("new_op", "x", x)
    scale = number("new_op", "scale", scale)
    chosen = backends.choose("new_op", BACKENDS, x.device, backend, x)
    if chosen == "reference":
        return reference(x, scale)
    return backends.apply(_NewOp, x.contiguous(), scale, chosen)
