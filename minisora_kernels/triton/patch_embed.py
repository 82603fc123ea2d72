"""patch_embed: products whose patches are gathered from the video by address, so they are never stored.

Element k of token n lies at (where the patch of n starts) + (place of k in a patch): two vectors of offsets span a
tile.

Forward, a program makes a tile of tokens x columns of y, for one sample after the other. Writing y takes most of the
time. What samples share, bias and position rows, is read once, and so is the weight where a patch fits one tile of
elements. A longer patch (pixels) is an ordinary product: a program makes one tile, of some tokens of one sample and a
third of their columns, so that the video is read three times. Programs that share position rows are neighbours.

Backward, a program sums dy^T patches over a chunk of tiles of tokens in fp32, and from the same tiles of dy its part of
dbias; the parts are then added in order. dpos reads dy once more: most models freeze pos. dx, which training on data
does not ask for, is the product the other way, its tiles stored where the patches were.

Patches of any length go this way: gathering long ones for cuBLAS would write and read them once more, and add bias and
pos in a pass of their own. Not measured.
"""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import constants, dot, load, precision_of, store
from ._launch import Launch, Like, dense, plan, signature
from ._parts import sum_parts
from ._rows import given
from ._tiles import PRODUCT, sizes
from ._window_rows import Piece, wide_pieces

COLUMNS = 128  # of y and dy in a tile; divides the widths of all models
GATHERED, WIDEST = 3, 384  # times that a long patch is read forward, at least; columns of a program, at most
SHORT = 256  # bytes of a patch that fits one tile
# Products of float32 are added in chains of at most this many elements, whose sums are added then: one chain of 768 is
# three times as far from exact as torch.
CHAIN = tl.constexpr(128)
# Programs wanted: several on each multiprocessor of a large GPU, or one or two of the large tiles of a long patch.
PROGRAMS, LARGE_PROGRAMS = 512, 256
# Most elements of a patch in a tile of the gradient of the weight, and of the video.
WEIGHT_ELEMENTS, VIDEO_ELEMENTS = 128, 64


@triton.jit
def _starts(n, height, width, stride_t, stride_h, stride_w, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr):
    """Where the patches of tokens n begin in a sample."""
    row = n // width
    t, h, w = (row // height).to(tl.int64), (row % height).to(tl.int64), (n % width).to(tl.int64)
    return t * PT * stride_t + h * PH * stride_h + w * PW * stride_w


@triton.jit
def _places(k, stride_c, stride_t, stride_h, stride_w, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr):
    """Where elements k lie from the beginning of their patch."""
    row = k // PW
    c, i, j, m = row // (PH * PT), row // PH % PT, row % PH, k % PW
    return c.to(tl.int64) * stride_c + i.to(tl.int64) * stride_t + j.to(tl.int64) * stride_h + m.to(tl.int64) * stride_w


@triton.jit
def _addend(bias_ptr, pos_ptr, n, d, there, tokens, WIDTH: tl.constexpr):
    """What every sample adds to its products: a tile [tokens, columns], or a scalar."""
    total = 0.0
    if bias_ptr is not None:
        total += load(bias_ptr + d, there)[None, :]
    if pos_ptr is not None:
        mask = (n[:, None] < tokens) & there[None, :]
        total += load(pos_ptr + n.to(tl.int64)[:, None] * WIDTH + d[None, :], mask)
    return total


@triton.jit
def _columns(first, GROUP: tl.constexpr, i: tl.constexpr, WIDTH: tl.constexpr):
    """The columns of piece ``i`` of a group that begins at ``first``, and whether there are such."""
    column = GROUP.pieces[i][0] + tl.arange(0, GROUP.pieces[i][1])
    return first + column, (column < GROUP.pieces[i][2]) & (first + column < WIDTH)


@triton.jit
def _zeros(TOKENS: tl.constexpr, GROUP: tl.constexpr):
    out = ()
    for i in tl.static_range(len(GROUP.pieces)):
        out = out + (tl.zeros((TOKENS, GROUP.pieces[i][1]), tl.float32),)
    return out


@triton.jit
def _products(
    of_x,
    weight_ptr,
    d0,
    start,
    end,
    LENGTH: tl.constexpr,
    PT: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    GROUP: tl.constexpr,
    ELEMENTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Elements ``start`` to ``end`` of patches times the weight, piece by piece; patches are read once for all."""
    parts = _zeros(TOKENS, GROUP)
    for k0 in range(start, end, ELEMENTS):
        k = k0 + tl.arange(0, ELEMENTS)
        places = _places(k, of_x[2][0], of_x[2][1], of_x[2][2], of_x[2][3], PT, PH, PW)
        here = k < LENGTH
        x = tl.load(of_x[0] + places[None, :], of_x[1] & here[None, :], other=0.0)
        sums = ()
        for i in tl.static_range(len(GROUP.pieces)):
            d, there = _columns(d0, GROUP, i, WIDTH)
            w = tl.load(weight_ptr + d[None, :] * LENGTH + k[:, None], here[:, None] & there[None, :], other=0.0)
            sums = sums + (dot(x, w, parts[i], PRECISION),)
        parts = sums
    return parts


@triton.jit(do_not_specialize=["batch", "samples", "tokens", "height", "width"])
def _fwd(
    x_ptr,
    weight_ptr,
    bias_ptr,
    pos_ptr,
    y_ptr,
    batch,
    samples,
    tokens,
    height,
    width,
    stride_b,
    stride_c,
    stride_t,
    stride_h,
    stride_w,
    LENGTH: tl.constexpr,
    PT: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    GROUP: tl.constexpr,
    ELEMENTS: tl.constexpr,
    PRECISION: tl.constexpr,
    SHORT: tl.constexpr,
):
    program = tl.program_id(0)
    groups: tl.constexpr = (WIDTH + GROUP.width - 1) // GROUP.width
    d0 = program % groups * GROUP.width
    program //= groups
    chunks = tl.cdiv(batch, samples)
    first = program % chunks * samples  # neighbours share the position rows of their tokens
    n = program // chunks * TOKENS + tl.arange(0, TOKENS)

    starts = x_ptr + _starts(n, height, width, stride_t, stride_h, stride_w, PT, PH, PW)
    elements = tl.arange(0, ELEMENTS)
    if SHORT:
        d, there = _columns(d0, GROUP, 0, WIDTH)
        places = _places(elements, stride_c, stride_t, stride_h, stride_w, PT, PH, PW)
        x_mask = (n[:, None] < tokens) & (elements[None, :] < LENGTH)
        w_mask = (elements[:, None] < LENGTH) & there[None, :]
        w = tl.load(weight_ptr + d[None, :] * LENGTH + elements[:, None], w_mask, other=0.0)
        addend = _addend(bias_ptr, pos_ptr, n, d, there, tokens, WIDTH)
        y_mask = (n[:, None] < tokens) & there[None, :]
        for b in range(first.to(tl.int64), tl.minimum(batch, first + samples)):
            x = tl.load(starts[:, None] + (b * stride_b + places)[None, :], x_mask, other=0.0)
            y = dot(x, w, tl.zeros((TOKENS, GROUP.pieces[0][1]), tl.float32), PRECISION)
            store(y_ptr + (b * tokens + n)[:, None] * WIDTH + d[None, :], y + addend, y_mask)
    else:
        b = first.to(tl.int64)
        of_x = (starts[:, None] + b * stride_b, n[:, None] < tokens, (stride_c, stride_t, stride_h, stride_w))
        if x_ptr.dtype.element_ty == tl.float32:
            ys = _zeros(TOKENS, GROUP)
            for start in range(0, LENGTH, CHAIN):
                end = tl.minimum(start + CHAIN, LENGTH)
                parts = _products(
                    of_x, weight_ptr, d0, start, end, LENGTH, PT, PH, PW, WIDTH, TOKENS, GROUP, ELEMENTS, PRECISION
                )
                sums = ()
                for i in tl.static_range(len(GROUP.pieces)):
                    sums = sums + (ys[i] + parts[i],)
                ys = sums
        else:
            ys = _products(
                of_x, weight_ptr, d0, 0, LENGTH, LENGTH, PT, PH, PW, WIDTH, TOKENS, GROUP, ELEMENTS, PRECISION
            )
        for i in tl.static_range(len(GROUP.pieces)):
            d, there = _columns(d0, GROUP, i, WIDTH)
            y_mask = (n[:, None] < tokens) & there[None, :]
            y = ys[i] + _addend(bias_ptr, pos_ptr, n, d, there, tokens, WIDTH)
            store(y_ptr + (b * tokens + n)[:, None] * WIDTH + d[None, :], y, y_mask)


@triton.jit(do_not_specialize=["tiles", "chunk", "tokens", "height", "width"])
def _bwd(
    dy_ptr,
    x_ptr,
    dweight_ptr,
    dbias_ptr,
    tiles,
    chunk,
    tokens,
    height,
    width,
    stride_b,
    stride_c,
    stride_t,
    stride_h,
    stride_w,
    LENGTH: tl.constexpr,
    PT: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ELEMENTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    program = tl.program_id(0)
    element_blocks: tl.constexpr = (LENGTH + ELEMENTS - 1) // ELEMENTS
    column_blocks: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    # one block of elements makes the sums of dy
    sums = program % element_blocks == 0
    k = program % element_blocks * ELEMENTS + tl.arange(0, ELEMENTS)
    program //= element_blocks
    d = program % column_blocks * COLUMNS + tl.arange(0, COLUMNS)
    part = program // column_blocks

    token_blocks = tl.cdiv(tokens, TOKENS)
    places = _places(k, stride_c, stride_t, stride_h, stride_w, PT, PH, PW)
    dweight = tl.zeros((COLUMNS, ELEMENTS), tl.float32)
    dbias = tl.zeros((TOKENS, COLUMNS), tl.float32)
    for tile in range(part * chunk, tl.minimum(tiles, (part + 1) * chunk)):
        b = (tile // token_blocks).to(tl.int64)
        n = tile % token_blocks * TOKENS + tl.arange(0, TOKENS)
        starts = b * stride_b + _starts(n, height, width, stride_t, stride_h, stride_w, PT, PH, PW)
        dy_mask = (n[:, None] < tokens) & (d[None, :] < WIDTH)
        x_mask = (n[:, None] < tokens) & (k[None, :] < LENGTH)
        dy = tl.load(dy_ptr + (b * tokens + n)[:, None] * WIDTH + d[None, :], dy_mask, other=0.0)
        x = tl.load(x_ptr + starts[:, None] + places[None, :], x_mask, other=0.0)
        dweight = dot(tl.trans(dy), x, dweight, PRECISION)
        if dbias_ptr is not None and sums:
            dbias += dy.to(tl.float32)
    row = part.to(tl.int64) * WIDTH + d
    dweight_ptrs = dweight_ptr + row[:, None] * LENGTH + k[None, :]
    tl.store(dweight_ptrs, dweight, (d[:, None] < WIDTH) & (k[None, :] < LENGTH))
    if dbias_ptr is not None and sums:
        tl.store(dbias_ptr + row, tl.sum(dbias, 0), d < WIDTH)


@triton.jit(do_not_specialize=["tokens", "height", "width"])
def _bwd_x(
    dy_ptr,
    weight_ptr,
    dx_ptr,
    tokens,
    height,
    width,
    stride_b,
    stride_c,
    stride_t,
    stride_h,
    stride_w,
    LENGTH: tl.constexpr,
    PT: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ELEMENTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    program = tl.program_id(0)
    element_blocks: tl.constexpr = (LENGTH + ELEMENTS - 1) // ELEMENTS
    k = program % element_blocks * ELEMENTS + tl.arange(0, ELEMENTS)
    program //= element_blocks
    token_blocks = tl.cdiv(tokens, TOKENS)
    n = program % token_blocks * TOKENS + tl.arange(0, TOKENS)
    b = (program // token_blocks).to(tl.int64)

    dx = tl.zeros((TOKENS, ELEMENTS), tl.float32)
    for d0 in range(0, WIDTH, COLUMNS):
        d = d0 + tl.arange(0, COLUMNS)
        dy_mask = (n[:, None] < tokens) & (d[None, :] < WIDTH)
        w_mask = (d[:, None] < WIDTH) & (k[None, :] < LENGTH)
        dy = tl.load(dy_ptr + (b * tokens + n)[:, None] * WIDTH + d[None, :], dy_mask, other=0.0)
        w = tl.load(weight_ptr + d[:, None] * LENGTH + k[None, :], w_mask, other=0.0)
        dx = dot(dy, w, dx, PRECISION)
    starts = b * stride_b + _starts(n, height, width, stride_t, stride_h, stride_w, PT, PH, PW)
    places = _places(k, stride_c, stride_t, stride_h, stride_w, PT, PH, PW)
    dx_mask = (n[:, None] < tokens) & (k[None, :] < LENGTH)
    store(dx_ptr + starts[:, None] + places[None, :], dx, dx_mask)


class Group(NamedTuple):
    """Columns of y that a program makes, in pieces whose widths are powers of two; kernels get its ``constants``."""

    width: int
    pieces: tuple[Piece, ...]


def is_short(weight: Tensor | Like) -> bool:
    """Whether a patch fits one tile, forward."""
    return prod(weight.shape[1:]) * weight.dtype.itemsize <= SHORT


def columns_of(weight: Tensor | Like) -> int:
    """Columns of y that a program makes."""
    return COLUMNS if is_short(weight) else min(triton.cdiv(weight.shape[0], GATHERED), WIDEST)


def _numbers(x: Like, weight: Like, tile: tuple[Any, ...], precision: str) -> tuple[int, tuple[Any, ...]]:
    """The number of tokens; and what all kernels take last, for tiles of so many tokens, columns and elements."""
    width, channels, *patch = weight.shape
    frames, height, across = (n // p for n, p in zip(x.shape[2:], patch, strict=True))
    count = frames * height * across
    return count, (count, height, across, *x.stride, channels * prod(patch), *patch, width, *tile, precision)


def elements_of(weight: Tensor | Like, most: int) -> int:
    """Elements of a patch in a tile of a gradient."""
    return min(max(16, triton.next_power_of_2(prod(weight.shape[1:]))), most)


@plan
def _forward_plan(x, weight, bias, pos, precision, device) -> tuple[Launch, int]:
    """The launch, and the number of tokens."""
    x, weight = Like(*x), dense("weight", weight)
    dense("bias", bias), dense("pos", pos)
    short, columns, batch, itemsize = is_short(weight), columns_of(weight), x.shape[0], x.dtype.itemsize
    long = sizes(PRODUCT)
    group = constants(Group(columns, wide_pieces(0, columns)))
    # Short: small tiles, so that some programs of a multiprocessor write while others wait.
    if short:
        tile = 32, group, max(16, triton.next_power_of_2(prod(weight.shape[1:])))
    else:
        tile = long.tokens * 2 // itemsize, group, max(16, long.bytes // itemsize)
    tokens, numbers = _numbers(x, weight, tile, precision)
    tiles = triton.cdiv(weight.shape[0], columns) * triton.cdiv(tokens, tile[0])
    samples = max(triton.cdiv(batch, triton.cdiv(PROGRAMS, tiles)), 1) if short else 1
    grid = (tiles * triton.cdiv(batch, samples),)
    warps, stages = (8, 4) if short else (long.warps, long.stages)
    return Launch(_fwd, grid, batch, samples, *numbers, short, num_warps=warps, num_stages=stages), tokens


def patch_embed_fwd(x: Tensor, weight: Tensor, bias: Tensor | None, pos: Tensor | None) -> Tensor:
    inputs = (x, weight, bias, pos)
    launch, tokens = _forward_plan(*map(signature, inputs), precision_of(x.dtype), x.get_device())
    y = x.new_empty(x.shape[0], tokens, weight.shape[0])
    launch(*inputs, y)
    return y


@plan
def _backward_plan(dy, x, weight, with_bias, precision, device) -> tuple[Launch, int]:
    """The launch that sums over tokens, and the number of its partial sums."""
    dy, x, weight = dense("dy", dy), Like(*x), dense("dweight", weight)
    elements = elements_of(weight, WEIGHT_ELEMENTS)
    rows = 64 // x.dtype.itemsize
    tokens, numbers = _numbers(x, weight, (rows, COLUMNS, elements), precision)
    blocks = triton.cdiv(weight.shape[0], COLUMNS) * triton.cdiv(prod(weight.shape[1:]), elements)
    tiles = x.shape[0] * triton.cdiv(tokens, rows)
    chunk = triton.cdiv(tiles, max((PROGRAMS if elements < WEIGHT_ELEMENTS else LARGE_PROGRAMS) // blocks, 1))
    parts = triton.cdiv(tiles, max(chunk, 1))
    return Launch(_bwd, (parts * blocks,), tiles, chunk, *numbers, num_warps=8), parts


def patch_embed_bwd(
    dy: Tensor, x: Tensor, pt: int, ph: int, pw: int, bias: torch.dtype | None, pos: torch.dtype | None
) -> tuple[Tensor, ...]:
    columns = dy.shape[2]
    dweight = dy.new_empty(columns, x.shape[1], pt, ph, pw)
    dbias = None if bias is None else dy.new_empty(columns, dtype=bias)
    dpos = None if pos is None else dy.new_empty(dy.shape[1:], dtype=pos)
    inputs = (signature(dy), signature(x), signature(dweight))
    launch, parts = _backward_plan(*inputs, bias is not None, precision_of(x.dtype), x.get_device())
    partial = dy.new_empty(parts, *dweight.shape, dtype=torch.float32)
    partial_bias = None if bias is None else dy.new_empty(parts, columns, dtype=torch.float32)
    launch(dy, x, partial, partial_bias)
    sum_parts(
        (partial, dweight),
        None if partial_bias is None or dbias is None else (partial_bias, dbias),
        None if dpos is None else (dy, dpos),
    )
    return given(dy, (dweight, dbias, dpos))


def patch_embed_video(dy: Tensor, weight: Tensor, frames: int, height: int, width: int) -> Tensor:
    _, channels, pt, ph, pw = weight.shape
    dx = dy.new_empty(dy.shape[0], channels, frames * pt, height * ph, width * pw)
    launch = _gradient_plan(signature(dy), signature(dx), signature(weight), precision_of(dx.dtype), dx.get_device())
    launch(dy, weight, dx)
    return dx


@plan
def _gradient_plan(dy, dx, weight, precision, device) -> Launch:
    dense("dy", dy), dense("weight", weight)
    dx, weight = Like(*dx), Like(*weight)
    elements = elements_of(weight, VIDEO_ELEMENTS)
    tokens, numbers = _numbers(dx, weight, (64, 128 // dx.dtype.itemsize, elements), precision)
    tiles = triton.cdiv(tokens, 64) * triton.cdiv(prod(weight.shape[1:]), elements)
    return Launch(_bwd_x, (dx.shape[0] * tiles,), *numbers, num_warps=8)
