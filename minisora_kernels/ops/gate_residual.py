"""Gated residual: add a branch to the tokens, each channel weighted by a gate computed from the condition.

    y = x + gate * branch            row of token n: n // (N / R)

Source: Peebles & Xie 2022 (arXiv 2212.09748), the alpha of adaLN-Zero.

Backward, the sum in fp32 over the tokens of a row, in a fixed order:

    dx = dy                          dbranch = gate * dy            dgate = sum dy * branch
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import backends
from ..backends import define, kernels, register_fake
from ..checks import kernel_refusal
from ..modulation import check_tokens, rows, spread, triton_refusal


def reference(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    """The equation in plain PyTorch. ``gate``: ``[B, R, D]``."""
    spread_branch, gain = spread(branch, gate)
    return (x + (gain * spread_branch).flatten(1, 2)).to(x.dtype)


define("gate_residual_fwd(Tensor x, Tensor branch, Tensor gate) -> Tensor")
define("gate_residual_bwd(Tensor dy, Tensor branch, Tensor gate) -> (Tensor dbranch, Tensor dgate)")


@register_fake("gate_residual_fwd")
def _(x, branch, gate):
    return x.new_empty(x.shape)


@register_fake("gate_residual_bwd")
def _(dy, branch, gate):
    return branch.new_empty(branch.shape), gate.new_empty(gate.shape)


class _GateResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, branch, gate, backend):
        branch = branch.contiguous()
        ctx.backend = backend
        ctx.save_for_backward(branch, gate)
        return kernels(ctx.backend).gate_residual_fwd(x.contiguous(), branch, gate)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any):
        dy = gradients[0].contiguous()
        dbranch, dgate = kernels(ctx.backend).gate_residual_bwd(dy, *ctx.saved_tensors)
        return dy, dbranch, dgate, None


def _kernels(x, branch, gate):
    return kernel_refusal(x=x, branch=branch, gate=gate)


def _triton(x, branch, gate):
    return triton_refusal(x, branch=branch, gate=gate)


BACKENDS: backends.Table = {"reference": lambda *_: None, "cpu": _kernels, "triton": _triton}


def gate_residual(x: Tensor, branch: Tensor, gate: Tensor, *, backend: str | None = None) -> Tensor:
    """``x + gate * branch``. Differentiable in every tensor.

    Args:
        x, branch: tokens ``[B, N, D]``, any D (Triton: up to 12288); float16, bfloat16, float32 (float64: reference
            only); dtypes may differ.
        gate: ``[B, D]`` per sample, or ``[B, R, D]`` with R dividing N; strided views are read in place.
        backend: ``None`` chooses; a name runs that backend or raises.

    Returns:
        ``[B, N, D]`` in x's dtype; on the kernels computed in fp32 and rounded once.

    Raises:
        ValueError, TypeError, RuntimeError: as for :func:`minisora_kernels.adaln`.
    """
    check_tokens("gate_residual", "x", x)
    check_tokens("gate_residual", "branch", branch, like=x)
    gate = rows("gate_residual", "gate", gate, x)
    chosen = backends.choose("gate_residual", BACKENDS, x.device, backend, x, branch, gate)
    if chosen == "reference":
        return reference(x, branch, gate)
    return backends.apply(_GateResidual, x, branch, gate, chosen)
