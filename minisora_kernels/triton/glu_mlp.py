"""glu_mlp: the gated activation in one pass over h, its backward in one over h and da. The products are torch's.

A row of h has two halves, gate and value. Forward, a program takes some columns of some rows: it reads both halves
once and writes a. Backward, it takes some columns of a chunk of rows: it reads both halves and da once, writes a and
both halves of dh, of which the first holds da before, and sums dh over its rows in fp32; the chunks are then added in
order. So dh is not read again for db1, a is not kept, and da has no memory of its own. Both are bound by memory:
accesses are of 16 bytes, and sums stay in registers until the chunk ends.

a has memory of its own where h is not kept, too. Over the first half of h it would have another stride, and a product
may round in another way: a forward without gradients would differ from one that keeps h.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ._activations import activated, activated_and_slope
from ._common import load, store
from ._launch import Launch, dense, plan, signature
from ._mlp import chunks, last_linear, linear
from ._parts import sum_parts
from ._rows import given

ROWS, COLUMNS = 8, 128  # a tile: half of gelu_mlp's, for two halves of a row are in registers


@triton.jit(do_not_specialize=["size"])
def _fwd(
    h_ptr,
    a_ptr,
    size,
    FORM: tl.constexpr,
    GATE: tl.constexpr,
    HIDDEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    blocks: tl.constexpr = (HIDDEN + COLUMNS - 1) // COLUMNS
    rows = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    mask = (rows[:, None] < size) & (columns[None, :] < HIDDEN)
    halves = rows[:, None] * (2 * HIDDEN) + columns[None, :]
    g = load(h_ptr + halves + GATE, mask)
    u = load(h_ptr + halves + (HIDDEN - GATE), mask)
    store(a_ptr + rows[:, None] * HIDDEN + columns[None, :], activated(g, FORM, h_ptr.dtype.element_ty) * u, mask)


@triton.jit(do_not_specialize=["size", "chunk"])
def _bwd(
    h_ptr,
    grad_ptr,
    a_ptr,
    sums_ptr,
    size,
    chunk,
    FORM: tl.constexpr,
    GATE: tl.constexpr,
    HIDDEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    blocks: tl.constexpr = (HIDDEN + COLUMNS - 1) // COLUMNS
    part = (tl.program_id(0) // blocks).to(tl.int64)
    columns = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    of_gate = tl.zeros((ROWS, COLUMNS), tl.float32)
    of_value = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(part * chunk, tl.minimum(size, (part + 1) * chunk), ROWS):
        rows = first + tl.arange(0, ROWS)
        mask = (rows[:, None] < size) & (columns[None, :] < HIDDEN)
        halves = rows[:, None] * (2 * HIDDEN) + columns[None, :]
        g = load(h_ptr + halves + GATE, mask)
        u = load(h_ptr + halves + (HIDDEN - GATE), mask)
        da = load(grad_ptr + halves, mask)
        activation, slope = activated_and_slope(g, FORM, h_ptr.dtype.element_ty)
        if a_ptr is not None:
            store(a_ptr + rows[:, None] * HIDDEN + columns[None, :], activation * u, mask)
        dg = da * u * slope
        du = da * activation
        store(grad_ptr + halves + GATE, dg, mask)
        store(grad_ptr + halves + (HIDDEN - GATE), du, mask)
        if sums_ptr is not None:
            of_gate += dg
            of_value += du
    if sums_ptr is not None:
        sums = sums_ptr + part * (2 * HIDDEN) + columns
        tl.store(sums + GATE, tl.sum(of_gate, 0), columns < HIDDEN)
        tl.store(sums + (HIDDEN - GATE), tl.sum(of_value, 0), columns < HIDDEN)


@plan
def _forward_plan(h, activation, gate_first, device) -> Launch | None:
    """The launch; none for no columns, which no kernel can be made for."""
    h = dense("h", h)
    size, hidden = h.shape[0], h.shape[1] // 2
    grid = (triton.cdiv(size, ROWS) * triton.cdiv(hidden, COLUMNS),)
    numbers = (activation, 0 if gate_first else hidden, hidden, ROWS, COLUMNS)
    return Launch(_fwd, grid, size, *numbers) if hidden else None


def _activated(h: Tensor, activation: int, gate_first: bool) -> Tensor:
    a = h.new_empty(h.shape[0], h.shape[1] // 2)
    launch = _forward_plan(signature(h), activation, gate_first, h.get_device())
    if launch is not None:
        launch(h, a)
    return a


def glu_mlp_fwd(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w3: Tensor | None,
    b3: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: int,
    gate_first: bool,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    hidden = w2.shape[1]
    rows = x.view(math.prod(x.shape[:-1]), x.shape[-1])
    if w3 is None:
        h = F.linear(rows, w1, b1)
    else:
        h = x.new_empty(rows.shape[0], 2 * hidden)
        for half, w, b in ((h[:, :hidden], w1, b1), (h[:, hidden:], w3, b3)):
            linear(rows, w, b, half)
    return last_linear(x, _activated(h, activation, gate_first), w2, b2), h if keep else h.new_empty(0, 0)


@plan
def _backward_plan(h, activation, gate_first, device) -> tuple[int, Launch | None]:
    """The number of partial sums, and the launch; none for no columns, which no kernel can be made for."""
    h = dense("h", h)
    size, hidden = h.shape[0], h.shape[1] // 2
    blocks = max(triton.cdiv(hidden, COLUMNS), 1)
    chunk, parts = chunks(size, blocks, ROWS)
    numbers = (activation, 0 if gate_first else hidden, hidden, ROWS, COLUMNS)
    return parts, Launch(_bwd, (parts * blocks,), size, chunk, *numbers) if hidden else None


def glu_mlp_bwd(
    dy: Tensor,
    h: Tensor,
    w1: Tensor | None,
    w3: Tensor | None,
    w2: Tensor | None,
    activation: int,
    gate_first: bool,
    need_a: bool,
    need_dh: bool,
    need_b1: bool,
) -> tuple[Tensor, ...]:
    hidden = h.shape[1] // 2
    if w2 is None:
        return given(h, (None, _activated(h, activation, gate_first) if need_a else None, None, None))
    a = h.new_empty(h.shape[0], hidden) if need_a else None
    dh = torch.empty_like(h)
    torch.mm(dy, w2, out=dh[:, :hidden])
    parts, launch = _backward_plan(signature(h), activation, gate_first, h.get_device())
    db1 = h.new_empty(h.shape[1]) if need_b1 else None
    sums = h.new_empty(parts, h.shape[1], dtype=torch.float32) if need_b1 else None
    if launch is not None:
        launch(h, dh, a, sums)
    sum_parts(None if sums is None or db1 is None else (sums, db1))
    dx = None if w1 is None else dh[:, : w1.shape[0]] @ w1
    if dx is not None and w3 is not None:
        dx.addmm_(dh[:, hidden:], w3)
    return given(h, (dx, a, dh if need_dh else None, db1))
