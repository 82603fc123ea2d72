"""gate_residual_adaln: the kernels of adaln.py, with a branch to add first.

Forward, a program reads x and the branch once and writes the residual and y once; the residual is rounded before it is
normalised. Backward, it reads the gradient of the residual too, writes dbranch and adds up dgate and dbranch_bias: six
activations pass through memory, where the two ops one after the other take nine.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import adaln
from ._rows import given


def gate_residual_adaln_fwd(
    x: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    branch_bias: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    index: Tensor | None,
    rms: bool,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor | None, ...]:
    return adaln.forward(x, branch, gate, branch_bias, shift, scale, weight, bias, index, rms, eps, out_dtype)


def gate_residual_adaln_bwd(
    dresidual: Tensor,
    dy: Tensor,
    residual: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    branch_bias: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    index: Tensor | None,
    rms: bool,
    *asked: Any,
) -> tuple[Tensor, ...]:
    wanted = adaln.Asked(*asked)
    tensors = (dresidual, dy, residual, branch, gate, branch_bias, scale, weight, bias, mean, rstd, index)
    return given(residual, adaln.backward(*tensors, rms, wanted))
