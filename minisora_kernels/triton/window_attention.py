"""Launchers of window_attention: which kernels serve a call, and their sizes. Not run on a GPU yet.

The kernels read qkv, and write dqkv, where the projection left it: a program computes the addresses of its window's
tokens. _window_short.py holds the kernels for windows of a tile, _window_flash.py those for longer ones, which loop
over blocks of tokens, and _window_library.py leaves the longest to flash-attn. But for the latter, all choices here
follow from shapes and dtype, never from the device.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from . import _window_flash as flash
from . import _window_library as library
from . import _window_short as short
from ._common import FUSED, check_dense, constants, precision_of, sum_parts
from ._window_rows import Boxes, Form, boxes, narrow_pieces, wide_pieces

# None of these was measured on a GPU.
# Windows of at most this many tokens fit a tile of scores that a program keeps in registers. With 64 a backward with a
# bias, a norm or rotation spilled hundreds of bytes a thread.
SHORT = 32
# Longer windows than this have q and k normed and turned by a pass of its own, which reads and writes 4 x head_dim
# numbers per token and head; others by every program that reads them, one per 128 tokens of the window, twice in the
# backward. By a count of bytes and instructions the two cost alike near 500 tokens.
PREPARE_FROM = 512
# Heads of the same tokens that a program takes, so that their rotary angles, as large as q and k, are read a quarter as
# often.
HEADS = 4
# Wider heads take more registers than blocks and warps of this many channels leave.
NARROW = 80
# Rows of a program of the passes that take rows one by one.
ROWS = 64
# Programs at most that share the sum of a bias' gradient: some for every SM of the largest GPU; a partial sum is large.
BIAS_PROGRAMS = 1024
# The same for a weight, whose partial sums are small.
WEIGHT_PROGRAMS = 8192


class Call(NamedTuple):
    """A call's arguments, and what forward and backward derive from them alike."""

    qkv: Tensor
    q_weight: Tensor | None
    k_weight: Tensor | None
    cos: Tensor | None
    sin: Tensor | None
    bias: Tensor | None
    scale: float
    eps: float
    box: Boxes
    form: Form

    @property
    def items(self) -> int:
        """Windows of all samples."""
        return self.qkv.shape[0] * self.box.windows

    @property
    def parameters(self) -> tuple[Tensor | None, ...]:
        return self.q_weight, self.k_weight, self.cos, self.sin, self.bias

    @property
    def exact(self) -> bool:
        """fp32 takes twice the room, and no tensor cores unless torch asks for TF32: smaller blocks, more threads."""
        return self.qkv.dtype == torch.float32


def _call(qkv, t, h, w, wt, wh, ww, q_weight, k_weight, norm, cos, sin, interleaved, bias, scale, eps, **rest) -> Call:
    check_dense(qkv=qkv, q_weight=q_weight, k_weight=k_weight, cos=cos, sin=sin, bias=bias, **rest)
    head_dim = qkv.shape[4]
    box = boxes((t, h, w), (wt, wh, ww))
    if bias is not None and bias.shape != (wanted := (qkv.shape[3], box.length, box.length)):
        raise ValueError(f"bias has shape {tuple(bias.shape)}; it must be [heads, L, L] = {list(wanted)}")
    halves = cos is not None and not interleaved
    steps = (head_dim if weight is not None and weight.dim() == 2 else 0 for weight in (q_weight, k_weight))
    narrow = partial(narrow_pieces, width=32 if head_dim > NARROW else 16)
    cut = narrow if box.length <= PREPARE_FROM else wide_pieces
    qk = cut(0, head_dim // 2) + cut(head_dim // 2, head_dim) if halves else cut(0, head_dim)
    v = (narrow if box.length <= SHORT else wide_pieces)(0, head_dim)
    form = Form(box.inner, norm, not halves, head_dim, qk, v, precision_of(qkv.dtype), *steps)
    return Call(qkv, q_weight, k_weight, cos, sin, bias, scale, eps, box, form)


def window_attention_fwd(qkv, *arguments) -> tuple[Tensor, Tensor]:
    call = _call(qkv, *arguments)
    batch, tokens, _, heads, head_dim = qkv.shape
    if (attend := _library(call)) is not None:
        out = attend(*_views(call, _prepared(call)), call.scale)
        return out.view(batch, tokens, heads * head_dim), qkv.new_zeros(batch, tokens, heads, 2, dtype=torch.float32)
    out = qkv.new_empty(batch, tokens, heads * head_dim)
    softmax = qkv.new_empty(batch, tokens, heads, 2, dtype=torch.float32)
    if call.box.length <= SHORT:
        tile = _tile(call.box.length)
        each = tile // call.box.length
        short.short_forward_kernel[(triton.cdiv(call.items, each) * triton.cdiv(heads, HEADS),)](
            qkv, out, softmax, *call.parameters, call.items, tokens, heads, *call.box.arguments, call.scale, call.eps,
            each > 1, constants(call.form), tile, HEADS,
            num_warps=_short_warps(call, tile, True), num_stages=1, **FUSED,
        )  # fmt: skip
        return out, softmax
    qk = _prepared(call)
    block, inner, warps, stages = _blocks(call, 64)
    flash.forward_kernel[(call.items * heads * triton.cdiv(call.box.length, block),)](
        qk, qkv, out, softmax, *call.parameters, tokens, heads, *call.box.arguments, call.scale, call.eps,
        qk is not qkv, constants(call.form), block, inner, num_warps=warps, num_stages=stages, **FUSED,
    )  # fmt: skip
    return out, softmax


def window_attention_bwd(dout, qkv, out, softmax, *arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call = _call(qkv, *arguments[:-1], dout=dout, out=out, softmax=softmax)
    dqkv = torch.empty_like(qkv)
    if call.box.length <= SHORT:
        parts = _short_backward(call, dout, softmax, dqkv, arguments[-1])
    elif (attend := _library(call)) is not None:
        parts = _library_backward(call, attend, dout, dqkv)
    else:
        parts = _flash_backward(call, dout, out, softmax, dqkv, arguments[-1])
    sums = []
    for part, parameter in zip(parts, (call.q_weight, call.k_weight, call.bias), strict=True):
        if part is None or parameter is None:
            sums.append(qkv.new_empty(0))
        else:
            sums.append(sum_parts(part.view(-1, *parameter.shape), parameter.dtype))
    return dqkv, *sums


def _tile(length: int) -> int:
    """Rows of a tile, 16 at least: more, to leave fewer empty, would waste as much on scores across windows."""
    return max(16, triton.next_power_of_2(length))


def _short_warps(call: Call, tile: int, plain: bool) -> int:
    """Warps of a tile: 16 rows each, the least of a product, or several that share them, where they would spill."""
    if call.exact:
        return 4
    shared = (1 if plain else 2) * (2 if call.form.head_dim > NARROW else 1)
    return min(tile // 16 * shared, 8)


def block_of(dtype: torch.dtype, head_dim: int, length: int) -> int:
    """Rows of a window of ``length`` tokens that a program takes, as registers and shared memory allow."""
    if dtype == torch.float32:
        return 32
    return 64 if head_dim > NARROW or length <= 64 else 128


def bias_block_of(dtype: torch.dtype, head_dim: int) -> int:
    """Rows and columns of a bias' gradient that a program adds up."""
    return 32 if dtype == torch.float32 or head_dim > NARROW else 64


def _blocks(call: Call, inner: int) -> tuple[int, int, int, int]:
    """For long windows: rows of a block, rows at a step, warps and stages."""
    head_dim = call.form.head_dim
    block = block_of(call.qkv.dtype, head_dim, call.box.length)
    if block == 128:
        return block, inner, 8, 2
    if block == 64:  # with 4 warps, and heads wider than NARROW with more rows at a step, they would spill
        return block, inner // 2 if head_dim > NARROW else 32, 8, 1
    return block, 32, 4, 1


def _weight_parts(call: Call, count: int) -> list[Tensor | None]:
    """``count`` partial sums for the gradient of a weight of each head, if there is a weight."""
    shape = (count, call.form.head_dim)
    return [
        None if weight is None else call.qkv.new_empty(shape, dtype=torch.float32)
        for weight in (call.q_weight, call.k_weight)
    ]


def _short_backward(call: Call, dout, softmax, dqkv, with_dbias: bool) -> list[Tensor | None]:
    tokens, _, heads, _ = call.qkv.shape[1:]
    length, form = call.box.length, call.form
    weighted = call.q_weight is not None or call.k_weight is not None
    tile = _tile(length)
    each = tile // length
    tiles = triton.cdiv(call.items, each)
    # A sum over tokens of one head stays in a program's registers.
    per_program = 1 if with_dbias or form.q_step or form.k_step else HEADS
    groups = triton.cdiv(heads, per_program)
    programs = BIAS_PROGRAMS if with_dbias else WEIGHT_PROGRAMS if weighted else tiles * groups
    per_chunk = max(1, triton.cdiv(tiles * groups, max(1, programs)))
    chunks = max(1, triton.cdiv(tiles, per_chunk))
    weights = _weight_parts(call, chunks * groups)
    dbias = softmax.new_empty(chunks * each, heads, length, length) if with_dbias else None
    # Norm and rotation hold more of a row, the bias another tile of scores.
    plain = form.norm == 0 and call.cos is None and call.bias is None
    short.short_backward_kernel[(chunks * groups,)](
        call.qkv, dout, softmax, dqkv, *weights, dbias, *call.parameters, per_chunk, call.items, tokens, heads,
        *call.box.arguments, call.scale, call.eps,
        each > 1, constants(form), tile, per_program,
        num_warps=_short_warps(call, tile, plain), num_stages=1, **FUSED,
    )  # fmt: skip
    return [*weights, dbias]


def _prepared(call: Call) -> Tensor:
    """q and k normed and turned, where that takes a pass of its own; else qkv itself."""
    qkv, form = call.qkv, call.form
    if call.box.length <= PREPARE_FROM or (form.norm == 0 and call.cos is None):
        return qkv
    batch, tokens, _, heads, head_dim = qkv.shape
    qk = qkv.new_empty(batch, tokens, 2, heads, head_dim)
    flash.prepare_kernel[(triton.cdiv(batch * tokens, ROWS) * heads,)](
        qkv, qk, *call.parameters[:4], batch * tokens, tokens, heads, call.eps, constants(form), ROWS, **FUSED
    )
    return qk


def _flash_backward(call: Call, dout, out, softmax, dqkv, with_dbias: bool) -> list[Tensor | None]:
    qkv, length, form = call.qkv, call.box.length, call.form
    batch, tokens, _, heads, _ = qkv.shape
    qk = _prepared(call)
    delta = softmax.new_empty(batch, tokens, heads)
    flash.delta_kernel[(triton.cdiv(delta.numel(), ROWS),)](
        dout, out, delta, delta.numel(), constants(form), ROWS, **FUSED
    )
    block, inner, warps, stages = _blocks(call, 32)
    programs = call.items * heads * triton.cdiv(length, block)
    weights = _weight_parts(call, programs)
    flash.backward_kernel[(programs,)](
        qk, qkv, dout, softmax, delta, dqkv, *weights, *call.parameters, tokens, heads, *call.box.arguments,
        call.scale, call.eps, qk is not qkv, constants(form), block, inner, num_warps=warps, num_stages=stages, **FUSED,
    )  # fmt: skip
    if not with_dbias:
        return [*weights, None]
    side = bias_block_of(qkv.dtype, form.head_dim)
    blocks = triton.cdiv(length, side) ** 2 * heads
    chunks = max(1, min(call.items, BIAS_PROGRAMS // blocks))
    dbias = softmax.new_empty(chunks, heads, length, length)
    flash.dbias_kernel[(blocks * chunks,)](
        qk, qkv, dout, softmax, delta, dbias, *call.parameters, call.items, chunks, tokens, heads,
        *call.box.arguments, call.scale, call.eps, qk is not qkv, constants(form), side,
        num_warps=8 if side == 64 else 4, num_stages=1, **FUSED,
    )  # fmt: skip
    return [*weights, dbias]


def _library(call: Call) -> library.Attention | None:
    """flash-attn's attention, where it can serve the call."""
    size, _, width = call.box.axes[0]
    runs = len(call.box.axes) == 1 and size % width == 0
    if call.box.length <= PREPARE_FROM or call.bias is not None or call.exact or not runs or call.items == 0:
        return None
    return library.flash_attention(call.qkv.device, call.form.head_dim)


def _views(call: Call, qk: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v ``[windows, length, heads, head_dim]``."""
    heads, head_dim = call.qkv.shape[3:]
    q, k, v = call.qkv.view(-1, call.box.length, 3, heads, head_dim).unbind(2)
    if qk is not call.qkv:
        q, k = qk.view(-1, call.box.length, 2, heads, head_dim).unbind(2)
    return q, k, v


def _library_backward(call: Call, attend: library.Attention, dout, dqkv) -> list[Tensor | None]:
    batch, tokens, _, heads, _ = call.qkv.shape
    grads = library.gradients(attend, *_views(call, _prepared(call)), call.scale, dout)
    programs = triton.cdiv(batch * tokens, ROWS) * heads
    weights = _weight_parts(call, programs)
    library.finish_kernel[(programs,)](
        call.qkv,
        *grads,
        dqkv,
        *weights,
        *call.parameters[:4],
        batch * tokens,
        tokens,
        heads,
        call.eps,
        constants(call.form),
        ROWS,
        **FUSED,
    )
    return [*weights, None]
