"""What the launchers of both MLPs share."""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

# Programs of a backward, which leave partial sums: several for each multiprocessor of a large GPU. The partial sums
# stay small beside the tokens.
PROGRAMS = 2048


def chunks(size: int, blocks: int, rows: int) -> tuple[int, int]:
    """How many of ``size`` tokens a program sums in a backward, in tiles of ``rows``, where ``blocks`` programs share
    the columns; and the number of partial sums.
    """
    chunk = triton.cdiv(triton.cdiv(size, rows), max(PROGRAMS // blocks, 1)) * rows
    return chunk, triton.cdiv(size, max(chunk, 1))


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """``out = rows weight^T + bias``, all matrices but the bias."""
    if bias is None:
        torch.mm(rows, weight.t(), out=out)
    else:
        torch.addmm(bias, rows, weight.t(), out=out)


def last_linear(x: Tensor, a: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``a weight^T + bias`` in the shape of x. It is no view: autograd lets a caller write to it in place."""
    rows, width = math.prod(x.shape[:-1]), weight.shape[0]
    y = x.new_empty(*x.shape[:-1], width)
    linear(a.view(rows, weight.shape[1]), weight, bias, y.view(rows, width))
    return y
