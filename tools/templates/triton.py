"""new_op: equation in minisora_kernels/ops/new_op.py.

A program takes a stretch of x, reads it once and writes it once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import load, store
from ._launch import Launch, dense, plan, signature

ELEMENTS = 2048  # 16 a thread: two vectors of 16 bytes in 16 bits


@triton.jit(do_not_specialize=["size", "scale"])
def _scaled(in_ptr, out_ptr, size, scale, ELEMENTS: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    mask = i < size
    store(out_ptr + i, load(in_ptr + i, mask) * scale, mask)


@plan
def _plan(x, scale, device) -> Launch:
    size = dense("x", x).shape.numel()
    return Launch(_scaled, (triton.cdiv(size, ELEMENTS),), size, scale, ELEMENTS)


def new_op_fwd(x: Tensor, scale: float) -> Tensor:
    out = torch.empty_like(x)
    if x.numel():
        _plan(signature(x), scale, x.get_device())(x, out)
    return out


new_op_bwd = new_op_fwd  # of dy
