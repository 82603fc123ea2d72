"""grn: equation and derivation in minisora_kernels/ops/grn.py.

Forward: a program sums the squares of some columns over a part of the sites of a frame; the next kernel adds the parts
up and takes the roots, a program for some channels of a frame, which leaves their sum too; the last kernel adds those
sums up for the mean, reads x again and writes y. Backward: the same with the sums of dy * a and dy, then dx; dweight
and dbias are added up over the frames. So x (and dy) is read twice. Sums are in fp32 and their order depends on the
shapes alone.
"""

from __future__ import annotations

from typing import NamedTuple

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
# A tile of the second stages: parts that are added up at a time, and channels, few enough that one frame of 2560
# channels makes programs for a quarter of a large GPU's multiprocessors.
DEPTH, CHANNELS = 32, 64
FRAMES, FEW = 128, 8  # frames and channels of a tile of the sums over the frames, which are in float64


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


@triton.jit
def _block(WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """This program's frame, its block of channels over all frames, and its channels."""
    blocks: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    block = tl.program_id(0).to(tl.int64)
    return block // blocks, block, tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)


@triton.constexpr_function
def _power_of_2(count):
    return triton.next_power_of_2(count)


@triton.jit
def _mean(sums_ptr, frame, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """Over the channels of a frame, from the sums of each block of them."""
    blocks: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    block = tl.arange(0, _power_of_2(blocks))
    return tl.div_rn(tl.sum(load(sums_ptr + frame * blocks + block, block < blocks), 0), WIDTH)


@triton.jit(do_not_specialize=["parts"])
def _norms(
    squares_ptr,
    norms_ptr,
    norm_sums_ptr,
    parts,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """G, and its sum, of some channels of a frame."""
    frame, block, columns = _block(WIDTH, COLUMNS)
    norms = tl.sqrt_rn(_add_parts(squares_ptr, frame * parts, parts, columns, WIDTH, DEPTH))
    store(norms_ptr + frame * WIDTH + columns, norms, columns < WIDTH)
    tl.store(norm_sums_ptr + block, tl.sum(norms, 0))


@triton.jit(do_not_specialize=["sites"])
def _fwd(
    x_ptr,
    weight_ptr,
    bias_ptr,
    norms_ptr,
    norm_sums_ptr,
    y_ptr,
    sites,
    eps,
    GELU: tl.constexpr,
    WIDTH: tl.constexpr,
    PART: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    _, frame, begin, end, columns = _place(sites, WIDTH, PART, COLUMNS)
    there = columns < WIDTH
    norms = load(norms_ptr + frame * WIDTH + columns, there)
    inverse = tl.div_rn(1.0, _mean(norm_sums_ptr, frame, WIDTH, CHANNELS) + eps)
    gain = 1 + load(weight_ptr + columns, there) * norms * inverse
    bias = load(bias_ptr + columns, there)
    for site in range(begin, end, ROWS):
        at, mask = _tile(frame, site, end, columns, sites, WIDTH, ROWS)
        store(y_ptr + at, _activated(x_ptr + at, mask, GELU) * gain[None, :] + bias[None, :], mask)


@triton.jit(do_not_specialize=["sites"])
def _products(
    dy_ptr,
    x_ptr,
    norms_ptr,
    products_ptr,
    sums_ptr,
    norm_sums_ptr,
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
    if begin == 0:  # for the mean of G over the channels
        blocks: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
        norms = load(norms_ptr + frame * WIDTH + columns, columns < WIDTH)
        tl.store(norm_sums_ptr + frame * blocks + tl.program_id(0) % blocks, tl.sum(norms, 0))


@triton.jit(do_not_specialize=["parts"])
def _frames(
    products_ptr,
    sums_ptr,
    weight_ptr,
    norms_ptr,
    norm_sums_ptr,
    frame_products_ptr,
    frame_sums_ptr,
    inverse_ptr,
    shared_sums_ptr,
    parts,
    eps,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    SUMMED: tl.constexpr,
):
    """The sums of some channels of a frame, and that of weight * P * G, which without a weight nothing reads; and the
    frame's 1 / (mean(G) + eps), from sums of SUMMED channels.
    """
    frame, block, columns = _block(WIDTH, COLUMNS)
    there = columns < WIDTH
    products = _add_parts(products_ptr, frame * parts, parts, columns, WIDTH, DEPTH)
    store(frame_products_ptr + frame * WIDTH + columns, products, there)
    if sums_ptr is not None:
        sums = _add_parts(sums_ptr, frame * parts, parts, columns, WIDTH, DEPTH)
        store(frame_sums_ptr + frame * WIDTH + columns, sums, there)
    if weight_ptr is not None:
        shared = load(weight_ptr + columns, there) * products * load(norms_ptr + frame * WIDTH + columns, there)
        tl.store(shared_sums_ptr + block, tl.sum(shared, 0))
    if tl.program_id(0) % ((WIDTH + COLUMNS - 1) // COLUMNS) == 0:
        tl.store(inverse_ptr + frame, tl.div_rn(1.0, _mean(norm_sums_ptr, frame, WIDTH, SUMMED) + eps))


@triton.jit(do_not_specialize=["sites"])
def _bwd(
    dy_ptr,
    x_ptr,
    weight_ptr,
    norms_ptr,
    products_ptr,
    inverse_ptr,
    shared_sums_ptr,
    dx_ptr,
    sites,
    GELU: tl.constexpr,
    WIDTH: tl.constexpr,
    PART: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    _, frame, begin, end, columns = _place(sites, WIDTH, PART, COLUMNS)
    there = columns < WIDTH
    weight = load(weight_ptr + columns, there)
    norms = load(norms_ptr + frame * WIDTH + columns, there)
    inverse = tl.load(inverse_ptr + frame)
    gain = 1 + weight * norms * inverse
    shared = inverse * _mean(shared_sums_ptr, frame, WIDTH, CHANNELS)
    dnorm = inverse * (weight * load(products_ptr + frame * WIDTH + columns, there) - shared)
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
def _forward_plan(x, weight, bias, out_dtype, gelu, eps, device) -> tuple[int, int, Launch, Launch, Launch]:
    """The number of partial sums, that of the blocks of channels, and the launches."""
    x = dense("x", x)
    dense("weight", weight), dense("bias", bias)
    frames, sites, width = x.shape
    parts, blocks = triton.cdiv(sites, PART), frames * triton.cdiv(width, CHANNELS)
    grid = (frames * parts * triton.cdiv(width, COLUMNS),)
    numbers = (gelu, width, PART, ROWS, COLUMNS)
    return (
        frames * parts,
        blocks,
        Launch(_squares, grid, sites, *numbers),
        Launch(_norms, (blocks,), parts, width, DEPTH, CHANNELS),
        Launch(_fwd, grid, sites, eps, *numbers, CHANNELS),
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
    parts, blocks, squares, norm, forward = _forward_plan(*key)
    scratch = x.new_empty((parts, width), dtype=torch.float32)
    norm_sums = x.new_empty(blocks, dtype=torch.float32)
    squares(x, scratch)
    norm(scratch, norms, norm_sums)
    forward(x, weight, bias, norms, norm_sums, y)
    return y, norms


class _Backward(NamedTuple):
    """The numbers of partial sums, and the launches."""

    parts: int
    blocks: tuple[int, int]  # of channels, as the first two kernels cut them
    products: Launch
    frames: Launch
    backward: Launch
    parameters: Launch


@plan
def _backward_plan(dy, x, weight, norms, gelu, eps, device) -> _Backward:
    x = dense("x", x)
    for name, tensor in (("dy", dy), ("weight", weight), ("norms", norms)):
        dense(name, tensor)
    frames, sites, width = x.shape
    parts, wide, blocks = triton.cdiv(sites, PART), triton.cdiv(width, COLUMNS), triton.cdiv(width, CHANNELS)
    grid = (frames * parts * wide,)
    numbers = (sites, gelu, width, PART, ROWS, COLUMNS)
    return _Backward(
        frames * parts,
        (frames * wide, frames * blocks),
        Launch(_products, grid, *numbers),
        Launch(_frames, (frames * blocks,), parts, eps, width, DEPTH, CHANNELS, COLUMNS),
        Launch(_bwd, grid, *numbers, CHANNELS),
        Launch(_parameters, (triton.cdiv(width, FEW),), frames, width, FRAMES, FEW),
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
    launches = _backward_plan(*map(signature, (dy, x, weight, norms)), gelu, eps, x.get_device())
    kinds = (True, bias_dtype is not None)  # sums of dy * a, and of dy, for the bias alone
    partial = [x.new_empty((launches.parts, x.shape[2]), dtype=torch.float32) if kind else None for kind in kinds]
    sums = [torch.empty_like(norms) if kind else None for kind in kinds]
    inverse, norm_sums, shared_sums = (
        x.new_empty(count, dtype=torch.float32) for count in (x.shape[0], *launches.blocks)
    )
    launches.products(dy, x, norms, *partial, norm_sums)
    launches.frames(*partial, weight, norms, norm_sums, *sums, inverse, shared_sums)
    if dx is not None:
        launches.backward(dy, x, weight, norms, sums[0], inverse, shared_sums, dx)
    if weight_dtype is not None or bias_dtype is not None:
        launches.parameters(*sums, norms, inverse, *gradients)
    return given(x, (dx, *gradients))
