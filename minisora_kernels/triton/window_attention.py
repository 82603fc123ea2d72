"""Launchers of window_attention: which kernels serve a call, and their sizes. Not run on a GPU yet.

The kernels read qkv, and write dqkv, where the projection left it: a program computes the addresses of its window's
tokens. _window_short.py holds the kernels for windows of a tile, _window_flash.py those for longer ones, which loop
over blocks of tokens. All choices here follow from shapes and dtype, never from the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from . import _window_flash as flash
from . import _window_short as short
from ._window_rows import Boxes, Form, boxes, narrow_pieces, sum_rows, wide_pieces

# None of these was measured on a GPU.
# Windows of at most this many tokens fit a tile of scores that a program keeps in registers.
SHORT = 64
# Longer windows than this have q and k normed and turned by a pass of its own, which reads and writes 4 x head_dim
# numbers per token and head; others by every program that reads them, one per 128 tokens of the window, twice in the
# backward. By a count of bytes and instructions the two cost alike near 500 tokens.
PREPARE_FROM = 512
# Heads of the same tokens that a program takes, so that their rotary angles, as large as q and k, are read a quarter as
# often.
HEADS = 4
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
        """fp32 is multiplied as it is, without tensor cores: smaller blocks, more threads."""
        return self.qkv.dtype == torch.float32


def _call(qkv, t, h, w, wt, wh, ww, q_weight, k_weight, norm, cos, sin, interleaved, bias, scale, eps, **rest) -> Call:
    tensors = {"qkv": qkv, "q_weight": q_weight, "k_weight": k_weight, "cos": cos, "sin": sin, "bias": bias, **rest}
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"window_attention: {name} must be contiguous, its strides are {tensor.stride()}")
    head_dim = qkv.shape[4]
    box = boxes((t, h, w), (wt, wh, ww))
    halves = cos is not None and not interleaved
    steps = (head_dim if weight is not None and weight.dim() == 2 else 0 for weight in (q_weight, k_weight))
    cut = narrow_pieces if box.length <= PREPARE_FROM else wide_pieces
    qk = cut(0, head_dim // 2) + cut(head_dim // 2, head_dim) if halves else cut(0, head_dim)
    v = (narrow_pieces if box.length <= SHORT else wide_pieces)(0, head_dim)
    form = Form(box.inner, norm, not halves, head_dim, qk, v, *steps)
    return Call(qkv, q_weight, k_weight, cos, sin, bias, scale, eps, box, form)


def window_attention_fwd(qkv, *arguments) -> tuple[Tensor, Tensor]:
    call = _call(qkv, *arguments)
    batch, tokens, _, heads, head_dim = qkv.shape
    out = qkv.new_empty(batch, tokens, heads * head_dim)
    softmax = qkv.new_empty(batch, tokens, heads, 2, dtype=torch.float32)
    if call.box.length <= SHORT:
        tile = _tile(call.box.length)
        each = tile // call.box.length
        short.forward_kernel[(triton.cdiv(call.items, each) * triton.cdiv(heads, HEADS),)](
            qkv, out, softmax, *call.parameters, call.items, tokens, heads, *call.box.arguments, call.scale, call.eps,
            each > 1, call.form, tile, HEADS, num_warps=4 if call.exact else tile // 16, num_stages=1,
        )  # fmt: skip
        return out, softmax
    qk = _prepared(call)
    block, inner, warps = (32, 32, 4) if call.exact else (128, 64, 8)
    flash.forward_kernel[(call.items * heads * triton.cdiv(call.box.length, block),)](
        qk, qkv, out, softmax, *call.parameters, tokens, heads, *call.box.arguments, call.scale, call.eps,
        qk is not qkv, call.form, block, inner, num_warps=warps,
    )  # fmt: skip
    return out, softmax


def window_attention_bwd(dout, qkv, out, softmax, *arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call = _call(qkv, *arguments[:-1], dout=dout, out=out, softmax=softmax)
    dqkv = torch.empty_like(qkv)
    dbias = torch.empty_like(call.bias) if call.bias is not None and arguments[-1] else None
    if call.box.length <= SHORT:
        partials = _short_backward(call, dout, softmax, dqkv, dbias)
    else:
        partials = _flash_backward(call, dout, out, softmax, dqkv, dbias)
    nothing = qkv.new_empty(0)
    dweights = [nothing if weight is None else torch.empty_like(weight) for weight in (call.q_weight, call.k_weight)]
    for partial, dweight in zip(partials, dweights, strict=True):
        if partial is not None:
            sum_rows(partial, dweight)
    return dqkv, dweights[0], dweights[1], nothing if dbias is None else dbias


def _tile(length: int) -> int:
    """Rows of a tile, 16 at least: more, to leave fewer empty, would waste as much on scores across windows."""
    return max(16, triton.next_power_of_2(length))


def _short_backward(call: Call, dout, softmax, dqkv, dbias) -> list[Tensor | None]:
    tokens, _, heads, head_dim = call.qkv.shape[1:]
    length, form, weights = call.box.length, call.form, (call.q_weight, call.k_weight)
    tile = _tile(length)
    each = tile // length
    tiles = triton.cdiv(call.items, each)
    # A sum over tokens of one head stays in a program's registers.
    of_one_head = dbias is not None or form.q_step > 0 or form.k_step > 0
    per_program = 1 if of_one_head else HEADS
    groups = triton.cdiv(heads, per_program)
    most = tiles * groups
    if dbias is not None:
        most = BIAS_PROGRAMS
    elif weights != (None, None):
        most = WEIGHT_PROGRAMS
    per_chunk = max(1, triton.cdiv(tiles * groups, most)) if most else 1
    chunks = max(1, triton.cdiv(tiles, per_chunk))
    partials: list[Tensor | None] = [
        None if weight is None else softmax.new_empty(chunks * groups, head_dim) for weight in weights
    ]
    parts = None if dbias is None else softmax.new_empty(chunks * each, heads, length, length)
    # Norm and rotation hold more of a row: with 16 rows to a warp they would spill.
    rows = 16 if form.norm == 0 and call.cos is None else 8
    short.backward_kernel[(chunks * groups,)](
        call.qkv, dout, softmax, dqkv, *partials, parts, *call.parameters, per_chunk, call.items, tokens, heads,
        *call.box.arguments, call.scale, call.eps,
        each > 1, form, tile, per_program, num_warps=4 if call.exact else tile // rows, num_stages=1,
    )  # fmt: skip
    if parts is not None and dbias is not None:
        sum_rows(parts, dbias)
    return partials


def _prepared(call: Call) -> Tensor:
    """q and k normed and turned, where that takes a pass of its own; else qkv itself."""
    qkv, form = call.qkv, call.form
    if call.box.length <= PREPARE_FROM or (form.norm == 0 and call.cos is None):
        return qkv
    batch, tokens, _, heads, head_dim = qkv.shape
    qk = qkv.new_empty(batch, tokens, 2, heads, head_dim)
    block = 64
    flash.prepare_kernel[(triton.cdiv(batch * tokens, block) * heads,)](
        qkv, qk, *call.parameters[:4], batch * tokens, tokens, heads, call.eps, form, block
    )
    return qk


def _flash_backward(call: Call, dout, out, softmax, dqkv, dbias) -> list[Tensor | None]:
    qkv, length, form = call.qkv, call.box.length, call.form
    batch, tokens, _, heads, head_dim = qkv.shape
    qk = _prepared(call)
    delta = softmax.new_empty(batch, tokens, heads)
    flash.delta_kernel[(triton.cdiv(delta.numel(), 64),)](dout, out, delta, delta.numel(), form, 64)
    block, inner, warps = (32, 32, 4) if call.exact else (128, 32, 8)
    blocks = triton.cdiv(length, block)
    partials: list[Tensor | None] = [
        None if weight is None else softmax.new_empty(call.items * blocks, heads, head_dim)
        for weight in (call.q_weight, call.k_weight)
    ]
    flash.backward_kernel[(call.items * heads * blocks,)](
        qk, qkv, dout, softmax, delta, dqkv, *partials, *call.parameters, tokens, heads, *call.box.arguments,
        call.scale, call.eps, qk is not qkv, form, block, inner, num_warps=warps,
    )  # fmt: skip
    if dbias is not None:
        block = 32 if call.exact else 64
        programs = triton.cdiv(length, block) ** 2 * heads
        chunks = max(1, min(call.items, BIAS_PROGRAMS // programs))
        parts = dbias if chunks == 1 else softmax.new_empty(chunks, *dbias.shape)
        flash.dbias_kernel[(programs * chunks,)](
            qk, qkv, dout, softmax, delta, parts, *call.parameters, call.items, chunks, tokens, heads,
            *call.box.arguments, call.scale, call.eps, qk is not qkv, form, block,
        )  # fmt: skip
        if chunks > 1:
            sum_rows(parts, dbias)
    return partials
