"""patch_embed: products whose patches are gathered from the video by address, so they are never stored.

Element k of token n lies at (where the patch of n starts) + (place of k in a patch): two vectors of offsets span a
tile.

Forward, a program makes a tile of tokens x columns of y, for one sample after the other. Writing y takes most of the
time. What samples share, bias and position rows, is read once, and so is the weight where a patch fits one tile of
elements. A longer patch (pixels) is an ordinary product, and its position rows come from the caches again.

Backward, a program sums dy^T patches over a chunk of tiles of tokens in fp32, and from the same tiles of dy its part of
dbias; the parts are then added in order. dpos reads dy once more: most models freeze pos. dx, which training on data
does not ask for, is the product the other way, its tiles stored where the patches were.

Patches of any length go this way: gathering long ones for cuBLAS would write and read them once more, and add bias and
pos in a pass of their own. Not measured.

Not run on a GPU yet.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import FUSED, check_dense, dot, load, precision_of, store, sum_parts

COLUMNS = 128  # of y and dy in a tile; divides the widths of all models
SHORT = 256  # bytes of a patch that fits one tile
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
def _addend(bias_ptr, pos_ptr, n, d, tokens, WIDTH: tl.constexpr):
    """What every sample adds to its products: a tile [tokens, columns], or a scalar."""
    total = 0.0
    if bias_ptr is not None:
        total += load(bias_ptr + d, d < WIDTH)[None, :]
    if pos_ptr is not None:
        mask = (n[:, None] < tokens) & (d[None, :] < WIDTH)
        total += load(pos_ptr + n.to(tl.int64)[:, None] * WIDTH + d[None, :], mask)
    return total


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
    COLUMNS: tl.constexpr,
    ELEMENTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    program = tl.program_id(0)
    column_blocks: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    d = program % column_blocks * COLUMNS + tl.arange(0, COLUMNS)
    program //= column_blocks
    token_blocks = tl.cdiv(tokens, TOKENS)
    n = program % token_blocks * TOKENS + tl.arange(0, TOKENS)
    first = program // token_blocks * samples

    starts = x_ptr + _starts(n, height, width, stride_t, stride_h, stride_w, PT, PH, PW)
    elements = tl.arange(0, ELEMENTS)
    fits: tl.constexpr = LENGTH <= ELEMENTS
    if fits:
        places = _places(elements, stride_c, stride_t, stride_h, stride_w, PT, PH, PW)
        x_mask = (n[:, None] < tokens) & (elements[None, :] < LENGTH)
        w_mask = (elements[:, None] < LENGTH) & (d[None, :] < WIDTH)
        w = tl.load(weight_ptr + d[None, :] * LENGTH + elements[:, None], w_mask, other=0.0)
        addend = _addend(bias_ptr, pos_ptr, n, d, tokens, WIDTH)
    for b in range(first.to(tl.int64), tl.minimum(batch, first + samples)):
        y = tl.zeros((TOKENS, COLUMNS), tl.float32)
        if fits:
            x = tl.load(starts[:, None] + (b * stride_b + places)[None, :], x_mask, other=0.0)
            y = dot(x, w, y, PRECISION)
        else:
            for k0 in range(0, LENGTH, ELEMENTS):
                k = k0 + elements
                places = _places(k, stride_c, stride_t, stride_h, stride_w, PT, PH, PW)
                x_mask = (n[:, None] < tokens) & (k[None, :] < LENGTH)
                w_mask = (k[:, None] < LENGTH) & (d[None, :] < WIDTH)
                x = tl.load(starts[:, None] + (b * stride_b + places)[None, :], x_mask, other=0.0)
                w = tl.load(weight_ptr + d[None, :] * LENGTH + k[:, None], w_mask, other=0.0)
                y = dot(x, w, y, PRECISION)
            addend = _addend(bias_ptr, pos_ptr, n, d, tokens, WIDTH)
        y_mask = (n[:, None] < tokens) & (d[None, :] < WIDTH)
        y_ptrs = y_ptr + (b * tokens + n)[:, None] * WIDTH + d[None, :]
        store(y_ptrs, y + addend, y_mask)


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


def _arguments(x: Tensor, weight: Tensor) -> tuple[int, tuple[int, ...], dict[str, Any]]:
    """The number of tokens, and what all kernels take: arguments, and constants by name."""
    patch = weight.shape[2:]
    frames, height, width = (n // p for n, p in zip(x.shape[2:], patch, strict=True))
    constants: dict[str, Any] = dict(zip(("PT", "PH", "PW"), patch, strict=True))
    constants |= {"LENGTH": weight[0].numel(), "WIDTH": weight.shape[0], "COLUMNS": COLUMNS, "num_warps": 8}
    constants["PRECISION"] = precision_of(x.dtype)
    return frames * height * width, (height, width, *x.stride()), constants


def elements_of(weight: Tensor, most: int) -> int:
    """Elements of a patch in a tile of a gradient."""
    return min(max(16, triton.next_power_of_2(weight[0].numel())), most)


def patch_embed_fwd(x: Tensor, weight: Tensor, bias: Tensor | None, pos: Tensor | None) -> Tensor:
    check_dense(weight=weight, bias=bias, pos=pos)
    batch, columns, length = x.shape[0], weight.shape[0], weight[0].numel()
    tokens, arguments, constants = _arguments(x, weight)
    # Short: small tiles, so that some programs of a multiprocessor write while others wait. Long: blocks of 64 bytes
    # of elements, so that four stages fit the shared memory of every GPU.
    if length * x.element_size() <= SHORT:
        constants |= {"TOKENS": 32, "ELEMENTS": max(16, triton.next_power_of_2(length))}
    else:
        constants |= {"TOKENS": 256 // x.element_size(), "ELEMENTS": 64 // x.element_size()}
    tiles = triton.cdiv(columns, COLUMNS) * triton.cdiv(tokens, constants["TOKENS"])
    samples = triton.cdiv(batch, triton.cdiv(PROGRAMS, tiles))
    y = x.new_empty(batch, tokens, columns)
    _fwd[(tiles * triton.cdiv(batch, max(samples, 1)),)](
        x, weight, bias, pos, y, batch, samples, tokens, *arguments, **constants, num_stages=4, **FUSED
    )
    return y


def patch_embed_bwd(
    dy: Tensor, x: Tensor, weight: Tensor, bias: torch.dtype | None, pos: torch.dtype | None, need_x: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_dense(dy=dy, weight=weight)
    columns, length = weight.shape[0], weight[0].numel()
    tokens, arguments, constants = _arguments(x, weight)
    elements = elements_of(weight, WEIGHT_ELEMENTS)
    constants |= {"TOKENS": 64 // x.element_size(), "ELEMENTS": elements}
    blocks = triton.cdiv(columns, COLUMNS) * triton.cdiv(length, elements)
    tiles = x.shape[0] * triton.cdiv(tokens, constants["TOKENS"])
    chunk = triton.cdiv(tiles, max((PROGRAMS if elements < WEIGHT_ELEMENTS else LARGE_PROGRAMS) // blocks, 1))
    parts = triton.cdiv(tiles, max(chunk, 1))
    dweight = dy.new_empty(parts, *weight.shape, dtype=torch.float32)
    dbias = dy.new_empty(parts, columns, dtype=torch.float32)
    _bwd[(parts * blocks,)](
        dy, x, dweight, None if bias is None else dbias, tiles, chunk, tokens, *arguments, **constants, **FUSED
    )
    return (
        _gradient_of_x(dy, x, weight) if need_x else x.new_empty(0),
        sum_parts(dweight, weight.dtype),
        dy.new_empty(0) if bias is None else sum_parts(dbias, bias),
        dy.new_empty(0, columns) if pos is None else sum_parts(dy, pos),
    )


def _gradient_of_x(dy: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    dx = x.new_empty(x.shape)
    tokens, arguments, constants = _arguments(dx, weight)
    elements = elements_of(weight, VIDEO_ELEMENTS)
    constants |= {"TOKENS": 64, "COLUMNS": 128 // x.element_size(), "ELEMENTS": elements}
    tiles = triton.cdiv(tokens, 64) * triton.cdiv(weight[0].numel(), elements)
    _bwd_x[(x.shape[0] * tiles,)](dy, weight, dx, tokens, *arguments, **constants, **FUSED)
    return dx
