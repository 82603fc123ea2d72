"""grn: equation and derivation in minisora_kernels/ops/grn.py.

Forward: a program sums the squares of some columns over a part of the sites of a frame; one program a frame adds the
parts up, takes the roots and their mean over the channels; the last kernel reads x again and writes y. Backward: the
same with the sums of dy * a and dy, then dx; dweight and dbias are added up over the frames. So x (and dy) is read
twice. Sums are in fp32 and their order depends on the shapes alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import load, store
from ._launch import Launch, dense, plan, signature
from ._rows import given

ROWS, COLUMNS = 8, 256  # sites and channels of a tile: 16 elements a thread
# Sites that a program takes: enough programs for one frame of 24x24 sites and 8192 channels to fill a large GPU, while
# the partial sums are 3% of x in bfloat16.
PART = 64
DEPTH = 16  # parts that are added up at a time
FRAMES, CHANNELS = 32, 32  # a tile of the sums over the frames, which are in float64


@triton.jit
def _distribution(h):
    """Phi(h), the normal distribution."""
    return 0.5 + 0.5 * tl.erf(h * 0.7071067811865476)


@triton.jit
def _activated(ptr, mask, GELU: tl.constexpr):
    a = load(ptr, mask)
    if GELU:
        a *= _distribution(a)
    return a


@triton.jit
def _place(sites, WIDTH: tl.constexpr, PART: tl.constexpr, COLUMNS: tl.constexpr):
    """This program's part, over all frames; its frame, first site and the one after its last, and its columns."""
    blocks: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    part = (tl.program_id(0) // blocks).to(tl.int64)
    columns = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    parts = tl.cdiv(sites, PART)
    begin = part % parts * PART
    return part, part // parts, begin, tl.minimum(begin + PART, sites), columns


@triton.jit
def _tile(frame, site, end, columns, sites, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """Offsets of ROWS sites from ``site`` on, and which of them there are."""
    rows = site + tl.arange(0, ROWS)[:, None]
    return (frame * sites + rows) * WIDTH + columns[None, :], (rows < end) & (columns[None, :] < WIDTH)


@triton.jit(do_not_specialize=["sites"])
def _squares(
    x_ptr,
    squares_ptr,
    sites,
    GELU: tl.constexpr,
    WIDTH: tl.constexpr,
    PART: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    part, frame, begin, end, columns = _place(sites, WIDTH, PART, COLUMNS)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for site in range(begin, end, ROWS):
        at, mask = _tile(frame, site, end, columns, sites, WIDTH, ROWS)
        a = _activated(x_ptr + at, mask, GELU)
        sums += a * a
    tl.store(squares_ptr + part * WIDTH + columns, tl.sum(sums, 0), columns < WIDTH)


@triton.jit
def _add_parts(parts_ptr, first, count, columns, WIDTH: tl.constexpr, DEPTH: tl.constexpr):
    """The sum of ``count`` rows from ``first`` on."""
    sums = tl.zeros((DEPTH, columns.shape[0]), tl.float32)
    for begin in range(0, count, DEPTH):
        rows = begin + tl.arange(0, DEPTH)[:, None]
        mask = (rows < count) & (columns[None, :] < WIDTH)
        sums += load(parts_ptr + (first + rows) * WIDTH + columns[None, :], mask)
    return tl.sum(sums, 0)


@triton.jit(do_not_specialize=["parts"])
def _norms(
    squares_ptr,
    norms_ptr,
    inverse_ptr,
    parts,
    eps,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """G, and 1 / (mean(G) + eps), of a frame."""
    frame = tl.program_id(0).to(tl.int64)
    sums = tl.zeros((COLUMNS,), tl.float32)
    for first in range(0, WIDTH, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        norms = tl.sqrt_rn(_add_parts(squares_ptr, frame * parts, parts, columns, WIDTH, DEPTH))
        store(norms_ptr + frame * WIDTH + columns, norms, columns < WIDTH)
        sums += norms
    tl.store(inverse_ptr + frame, tl.div_rn(1.0, tl.div_rn(tl.sum(sums, 0), WIDTH) + eps))


@triton.jit(do_not_specialize=["sites"])
def _fwd(
    x_ptr,
    weight_ptr,
    bias_ptr,
    norms_ptr,
    inverse_ptr,
    y_ptr,
    sites,
    GELU: tl.constexpr,
    WIDTH: tl.constexpr,
    PART: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    _, frame, begin, end, columns = _place(sites, WIDTH, PART, COLUMNS)
    there = columns < WIDTH
    norms = load(norms_ptr + frame * WIDTH + columns, there)
    gain = 1 + load(weight_ptr + columns, there) * norms * tl.load(inverse_ptr + frame)
    bias = load(bias_ptr + columns, there)
    for site in range(begin, end, ROWS):
        at, mask = _tile(frame, site, end, columns, sites, WIDTH, ROWS)
        store(y_ptr + at, _activated(x_ptr + at, mask, GELU) * gain[None, :] + bias[None, :], mask)


@triton.jit(do_not_specialize=["sites"])
def _products(
    dy_ptr,
    x_ptr,
    products_ptr,
    sums_ptr,
    sites,
    GELU: tl.constexpr,
    WIDTH: tl.constexpr,
    PART: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    part, frame, begin, end, columns = _place(sites, WIDTH, PART, COLUMNS)
    products = tl.zeros((ROWS, COLUMNS), tl.float32)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for site in range(begin, end, ROWS):
        at, mask = _tile(frame, site, end, columns, sites, WIDTH, ROWS)
        dy = load(dy_ptr + at, mask)
        products += dy * _activated(x_ptr + at, mask, GELU)
        if sums_ptr is not None:
            sums += dy
    out = part * WIDTH + columns
    tl.store(products_ptr + out, tl.sum(products, 0), columns < WIDTH)
    if sums_ptr is not None:
        tl.store(sums_ptr + out, tl.sum(sums, 0), columns < WIDTH)


@triton.jit(do_not_specialize=["parts"])
def _frames(
    products_ptr,
    sums_ptr,
    weight_ptr,
    norms_ptr,
    frame_products_ptr,
    frame_sums_ptr,
    inverse_ptr,
    shared_ptr,
    parts,
    eps,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The sums of a frame, 1 / (mean(G) + eps), and mean(weight * P * s), which without a weight nothing reads."""
    frame = tl.program_id(0).to(tl.int64)
    norm_sums = tl.zeros((COLUMNS,), tl.float32)
    shared_sums = tl.zeros((COLUMNS,), tl.float32)
    for first in range(0, WIDTH, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        there = columns < WIDTH
        products = _add_parts(products_ptr, frame * parts, parts, columns, WIDTH, DEPTH)
        norms = load(norms_ptr + frame * WIDTH + columns, there)
        norm_sums += norms
        if weight_ptr is not None:
            shared_sums += load(weight_ptr + columns, there) * products * norms
        store(frame_products_ptr + frame * WIDTH + columns, products, there)
        if sums_ptr is not None:
            sums = _add_parts(sums_ptr, frame * parts, parts, columns, WIDTH, DEPTH)
            store(frame_sums_ptr + frame * WIDTH + columns, sums, there)
    inverse = tl.div_rn(1.0, tl.div_rn(tl.sum(norm_sums, 0), WIDTH) + eps)
    tl.store(inverse_ptr + frame, inverse)
    tl.store(shared_ptr + frame, tl.div_rn(inverse * tl.sum(shared_sums, 0), WIDTH))


@triton.jit(do_not_specialize=["sites"])
def _bwd(
    dy_ptr,
    x_ptr,
    weight_ptr,
    norms_ptr,
    products_ptr,
    inverse_ptr,
    shared_ptr,
    dx_ptr,
    sites,
    GELU: tl.constexpr,
    WIDTH: tl.constexpr,
    PART: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    _, frame, begin, end, columns = _place(sites, WIDTH, PART, COLUMNS)
    there = columns < WIDTH
    weight = load(weight_ptr + columns, there)
    norms = load(norms_ptr + frame * WIDTH + columns, there)
    inverse = tl.load(inverse_ptr + frame)
    gain = 1 + weight * norms * inverse
    dnorm = inverse * (weight * load(products_ptr + frame * WIDTH + columns, there) - tl.load(shared_ptr + frame))
    pull = tl.where(norms > 0, tl.div_rn(dnorm, tl.where(norms > 0, norms, 1.0)), 0.0)  # dG / G
    for site in range(begin, end, ROWS):
        at, mask = _tile(frame, site, end, columns, sites, WIDTH, ROWS)
        dy = load(dy_ptr + at, mask)
        x = load(x_ptr + at, mask)
        if GELU:
            distribution = _distribution(x)
            density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
            dx = (dy * gain[None, :] + x * distribution * pull[None, :]) * (distribution + x * density)
        else:
            dx = dy * gain[None, :] + x * pull[None, :]
        store(dx_ptr + at, dx, mask)


@triton.jit(do_not_specialize=["frames"])
def _parameters(
    products_ptr,
    sums_ptr,
    norms_ptr,
    inverse_ptr,
    dweight_ptr,
    dbias_ptr,
    frames,
    WIDTH: tl.constexpr,
    FRAMES: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """dweight and dbias: over the frames, in float64, for a batch of clips has thousands of them."""
    columns = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    dweight = tl.zeros((FRAMES, CHANNELS), tl.float64)
    dbias = tl.zeros((FRAMES, CHANNELS), tl.float64)
    for first in range(0, frames, FRAMES):
        frame = first + tl.arange(0, FRAMES).to(tl.int64)[:, None]
        mask = (frame < frames) & (columns[None, :] < WIDTH)
        at = frame * WIDTH + columns[None, :]
        if dweight_ptr is not None:
            s = load(norms_ptr + at, mask) * load(inverse_ptr + frame, frame < frames)
            dweight += s * load(products_ptr + at, mask)
        if dbias_ptr is not None:
            dbias += load(sums_ptr + at, mask)
    if dweight_ptr is not None:
        store(dweight_ptr + columns, tl.sum(dweight, 0).to(tl.float32), columns < WIDTH)
    if dbias_ptr is not None:
        store(dbias_ptr + columns, tl.sum(dbias, 0).to(tl.float32), columns < WIDTH)


@plan
def _forward_plan(x, weight, bias, out_dtype, gelu, eps, device) -> tuple[int, Launch, Launch, Launch]:
    """The number of partial sums, and the launches."""
    x = dense("x", x)
    dense("weight", weight), dense("bias", bias)
    frames, sites, width = x.shape
    parts = triton.cdiv(sites, PART)
    grid = (frames * parts * triton.cdiv(width, COLUMNS),)
    numbers = (sites, gelu, width, PART, ROWS, COLUMNS)
    return (
        frames * parts,
        Launch(_squares, grid, *numbers),
        Launch(_norms, (frames,), parts, eps, width, DEPTH, COLUMNS),
        Launch(_fwd, grid, *numbers),
    )


def grn_fwd(
    x: Tensor, weight: Tensor, bias: Tensor, gelu: bool, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    frames, _, width = x.shape
    y = torch.empty_like(x, dtype=out_dtype)
    norms = x.new_empty((frames, width), dtype=torch.float32)
    if x.numel() == 0:
        return y, norms.zero_()
    key = (signature(x), signature(weight), signature(bias), out_dtype, gelu, eps, x.get_device())
    parts, squares, norm, forward = _forward_plan(*key)
    scratch = x.new_empty((parts, width), dtype=torch.float32)
    inverse = x.new_empty(frames, dtype=torch.float32)
    squares(x, scratch)
    norm(scratch, norms, inverse)
    forward(x, weight, bias, norms, inverse, y)
    return y, norms


@plan
def _backward_plan(dy, x, weight, norms, gelu, eps, device) -> tuple[int, Launch, Launch, Launch, Launch]:
    """The number of partial sums, and the launches."""
    x = dense("x", x)
    for name, tensor in (("dy", dy), ("weight", weight), ("norms", norms)):
        dense(name, tensor)
    frames, sites, width = x.shape
    parts = triton.cdiv(sites, PART)
    grid = (frames * parts * triton.cdiv(width, COLUMNS),)
    numbers = (sites, gelu, width, PART, ROWS, COLUMNS)
    return (
        frames * parts,
        Launch(_products, grid, *numbers),
        Launch(_frames, (frames,), parts, eps, width, DEPTH, COLUMNS),
        Launch(_bwd, grid, *numbers),
        Launch(_parameters, (triton.cdiv(width, CHANNELS),), frames, width, FRAMES, CHANNELS),
    )


def grn_bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    norms: Tensor,
    gelu: bool,
    eps: float,
    need_x: bool,
    weight_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor, ...]:
    dx = torch.empty_like(x) if need_x else None
    gradients = [
        None if dtype is None else x.new_empty(x.shape[2], dtype=dtype) for dtype in (weight_dtype, bias_dtype)
    ]
    if x.numel() == 0:
        return given(x, (dx, *(None if gradient is None else gradient.zero_() for gradient in gradients)))
    inputs = (dy, x, weight, norms)
    parts, products, frames, backward, parameters = _backward_plan(*map(signature, inputs), gelu, eps, x.get_device())
    kinds = (True, bias_dtype is not None)  # sums of dy * a, and of dy, for the bias alone
    partial = [x.new_empty((parts, x.shape[2]), dtype=torch.float32) if kind else None for kind in kinds]
    sums = [torch.empty_like(norms) if kind else None for kind in kinds]
    inverse, shared = (x.new_empty(x.shape[0], dtype=torch.float32) for _ in range(2))
    products(dy, x, *partial)
    frames(*partial, weight, norms, *sums, inverse, shared)
    if dx is not None:
        backward(dy, x, weight, norms, sums[0], inverse, shared, dx)
    if weight_dtype is not None or bias_dtype is not None:
        parameters(*sums, norms, inverse, *gradients)
    return given(x, (dx, *gradients))
