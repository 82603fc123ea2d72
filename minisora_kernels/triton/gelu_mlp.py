"""gelu_mlp: the activation in one pass over h, and its backward in one pass over h and da. The products are torch's.

Forward, a program takes a stretch of h, read once, and writes the activation; over h itself where h is not kept.
Backward, a program takes some columns of a chunk of rows: it reads h and da once, writes a and dh (over da), and sums
dh over its rows in fp32; the chunks are then added in order. So dh is not read again for db1, and a is not kept.
Both are bound by memory: accesses are of 16 bytes, and sums stay in registers until the chunk ends.

The backend ``cuda`` leaves bias and GELU to cuBLASLt, which applies them at the end of a product.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ._activations import GELU, GELU_TANH, activated, activated_and_slope
from ._common import load, store
from ._launch import Launch, dense, plan, signature
from ._mlp import chunks, last_linear
from ._parts import sum_parts
from ._rows import given

BLOCK = 2048  # elements of h a program takes forward: 16 a thread
ROWS, COLUMNS = 8, 256  # a tile backward


@triton.jit
def _fwd(h_ptr, a_ptr, size, FORM: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size
    h = load(h_ptr + offsets, mask)
    store(a_ptr + offsets, activated(h, FORM, h_ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["size", "chunk"])
def _bwd(
    h_ptr,
    grad_ptr,
    a_ptr,
    sums_ptr,
    size,
    chunk,
    FORM: tl.constexpr,
    HIDDEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    blocks: tl.constexpr = (HIDDEN + COLUMNS - 1) // COLUMNS
    part = (tl.program_id(0) // blocks).to(tl.int64)
    columns = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(part * chunk, tl.minimum(size, (part + 1) * chunk), ROWS):
        rows = first + tl.arange(0, ROWS)
        offsets = rows[:, None] * HIDDEN + columns[None, :]
        mask = (rows[:, None] < size) & (columns[None, :] < HIDDEN)
        h = load(h_ptr + offsets, mask)
        da = load(grad_ptr + offsets, mask)
        activation, slope = activated_and_slope(h, FORM, h_ptr.dtype.element_ty)
        if a_ptr is not None:
            store(a_ptr + offsets, activation, mask)
        dh = da * slope
        store(grad_ptr + offsets, dh, mask)
        if sums_ptr is not None:
            sums += dh
    if sums_ptr is not None:
        tl.store(sums_ptr + part * HIDDEN + columns, tl.sum(sums, 0), columns < HIDDEN)


def _form(exact: bool) -> int:
    return (GELU if exact else GELU_TANH).value


@plan
def _forward_plan(size, dtype, exact, device) -> Launch:
    return Launch(_fwd, (triton.cdiv(size, BLOCK),), size, _form(exact), BLOCK)


def gelu_mlp_fwd(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, exact: bool, keep: bool
) -> tuple[Tensor, Tensor]:
    h = F.linear(x, w1, b1)
    a = torch.empty_like(h) if keep else h
    _forward_plan(h.numel(), h.dtype, exact, h.get_device())(h, a)
    return last_linear(x, a, w2, b2), h.view(math.prod(x.shape[:-1]), w1.shape[0]) if keep else h.new_empty(0, 0)


@plan
def _backward_plan(h, dtype, exact, device) -> tuple[int, Launch | None]:
    """The number of partial sums, and the launch; none for no columns, which no kernel can be made for."""
    h = dense("h", h)
    size, hidden = h.shape
    blocks = max(triton.cdiv(hidden, COLUMNS), 1)
    chunk, parts = chunks(size, blocks, ROWS)
    return parts, Launch(_bwd, (parts * blocks,), size, chunk, _form(exact), hidden, ROWS, COLUMNS) if hidden else None


def gelu_mlp_bwd(
    dy: Tensor,
    h: Tensor,
    w1: Tensor | None,
    w2: Tensor | None,
    exact: bool,
    need_a: bool,
    need_dh: bool,
    need_b1: bool,
) -> tuple[Tensor, ...]:
    a = torch.empty_like(h) if need_a else None
    if w2 is None:
        if a is not None:
            _forward_plan(h.numel(), h.dtype, exact, h.get_device())(h, a)
        return given(h, (None, a, None, None))
    dh = dy @ w2
    parts, launch = _backward_plan(signature(h), dh.dtype, exact, h.get_device())
    db1 = h.new_empty(h.shape[1]) if need_b1 else None
    sums = h.new_empty(parts, h.shape[1], dtype=torch.float32) if need_b1 else None
    if launch is not None:
        launch(h, dh, a, sums)
    sum_parts(None if sums is None or db1 is None else (sums, db1))
    return given(h, (None if w1 is None else dh @ w1, a, dh if need_dh else None, db1))
