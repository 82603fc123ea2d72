"""gate_residual_adaln: the kernels of adaln.py, with a branch to add first.

Forward, a program reads x and the branch once and writes the residual and y once; the residual is rounded before it is
normalised. Backward, it reads the gradient of the residual too, writes dbranch and adds up dgate: six activations pass
through memory, where the two ops one after the other take nine.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import adaln


def gate_residual_adaln_fwd(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    rms: bool,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor | None, ...]:
    return adaln.forward(x, branch, gate, shift, scale, weight, bias, rms, eps, out_dtype)


def gate_residual_adaln_bwd(
    dresidual: Tensor,
    dy: Tensor,
    residual: Tensor,
    branch: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    rms: bool,
) -> tuple[Tensor | None, ...]:
    gradients = adaln.backward(dresidual, dy, residual, branch, gate, shift, scale, weight, bias, mean, rstd, rms)
    return tuple(residual.new_empty(0) if gradient is None else gradient for gradient in gradients)
