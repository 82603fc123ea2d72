"""unpatchify: tokens to a video and back, one kernel for both directions.

A program takes a stretch of the cells of a frame, all their channels. On the side of the tokens the channels of a cell
lie together, and those of neighbouring cells of a patch; on the side of the video the cells of a line do. So the tile
[cells, channels] is read and written in whole sectors, in vectors of up to 16 bytes (the video only where its lines are
multiples of 16 cells), and turned in shared memory between the two. Every element is read once and written once. With
channels first, the cells of a patch lie together, not the channels.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._launch import Launch, Like, dense, plan, signature

ELEMENTS = 2048  # a tile: 16 a thread, two vectors of 16 bytes in 16 bits
MAX_CHANNELS = 64


@triton.jit(do_not_specialize=["frames", "lines"])
def _copy(
    video_ptr,
    tokens_ptr,
    frames,
    lines,
    columns,
    stride_b,
    stride_c,
    stride_t,
    stride_h,
    stride_w,
    PT: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    C: tl.constexpr,
    CHANNELS_FIRST: tl.constexpr,
    CELLS: tl.constexpr,
    CHANNELS: tl.constexpr,
    TO_VIDEO: tl.constexpr,
):
    program = tl.program_id(0)
    channel_blocks: tl.constexpr = (C + CHANNELS - 1) // CHANNELS
    c = program % channel_blocks * CHANNELS + tl.arange(0, CHANNELS)
    program //= channel_blocks
    cell_blocks = tl.cdiv(lines * columns, CELLS)
    cell = program % cell_blocks * CELLS + tl.arange(0, CELLS)
    program //= cell_blocks
    b = (program // frames).to(tl.int64)
    frame = program % frames
    line, column = cell // columns, cell % columns

    video = b * stride_b + frame.to(tl.int64) * stride_t + line.to(tl.int64) * stride_h + column.to(tl.int64) * stride_w
    video_ptrs = video_ptr + video[:, None] + c.to(tl.int64)[None, :] * stride_c
    row = (b * (frames // PT) + frame // PT) * (lines // PH) + line // PH
    token = row * (columns // PW) + column // PW
    inside = (frame % PT * PH + line % PH) * PW + column % PW
    if CHANNELS_FIRST:
        tokens_ptrs = tokens_ptr + (token * (C * PT * PH * PW) + inside)[:, None] + (c * (PT * PH * PW))[None, :]
    else:
        tokens_ptrs = tokens_ptr + (token * (PT * PH * PW) + inside)[:, None] * C + c[None, :]

    mask = (cell < lines * columns)[:, None] & (c < C)[None, :]
    if TO_VIDEO:
        tl.store(video_ptrs, tl.load(tokens_ptrs, mask), mask)
    else:
        tl.store(tokens_ptrs, tl.load(video_ptrs, mask), mask)


@plan
def _plan(video, tokens, patch, channels_first, to_video, device) -> Launch:
    dense("tokens", tokens)
    video = Like(*video)
    batch, channels, frames, lines, columns = video.shape
    tile_channels = min(triton.next_power_of_2(channels), MAX_CHANNELS)
    tile_cells = ELEMENTS // tile_channels
    blocks = triton.cdiv(lines * columns, tile_cells) * triton.cdiv(channels, tile_channels)
    numbers = (
        frames,
        lines,
        columns,
        *video.stride,
        *patch,
        channels,
        channels_first,
        tile_cells,
        tile_channels,
        to_video,
    )
    return Launch(_copy, (batch * frames * blocks,), *numbers)


def unpatchify_fwd(
    tokens: Tensor,
    frames: int,
    height: int,
    width: int,
    pt: int,
    ph: int,
    pw: int,
    channels: int,
    channels_first: bool,
) -> Tensor:
    video = tokens.new_empty(tokens.shape[0], channels, frames * pt, height * ph, width * pw)
    _plan(signature(video), signature(tokens), (pt, ph, pw), channels_first, True, tokens.get_device())(video, tokens)
    return video


def unpatchify_bwd(dvideo: Tensor, pt: int, ph: int, pw: int, channels_first: bool) -> Tensor:
    batch, channels, frames, lines, columns = dvideo.shape
    count = (frames // pt) * (lines // ph) * (columns // pw)
    dtokens = dvideo.new_empty(batch, count, pt * ph * pw * channels)
    _plan(signature(dvideo), signature(dtokens), (pt, ph, pw), channels_first, False, dvideo.get_device())(
        dvideo, dtokens
    )
    return dtokens
