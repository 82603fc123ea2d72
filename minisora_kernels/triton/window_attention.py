"""Launchers of window_attention: which kernels serve a call, and their sizes.

The kernels read qkv, and write dqkv, where the projection left it: a program computes the addresses of its window's
tokens. _window_short.py holds the kernels for windows of a tile, _window_flash.py those for longer ones, which loop
over blocks of tokens, and _window_library.py leaves those without a bias to torch's flash attention. But for the
latter and the tiles of long windows, all choices here follow from shapes and dtype, never from the device.
"""

from __future__ import annotations

from functools import cached_property, partial
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..ops.window_attention import SHORT
from . import _window_flash as flash
from . import _window_library as library
from . import _window_short as short
from ._common import constants, precision_of
from ._launch import Launch, Like, dense, plan, signature
from ._parts import sum_parts
from ._tiles import WINDOW_BACKWARD, WINDOW_FORWARD, Blocks, sizes
from ._window_rows import Form, boxes, narrow_pieces, wide_pieces

# None of these was measured on a GPU.
# Longer windows than this have q and k normed and turned by a pass of its own, which reads and writes 4 x head_dim
# numbers per token and head; others by every program that reads them, one per 128 tokens of the window, twice in the
# backward. By a count of bytes and instructions the two cost alike near 500 tokens.
PREPARE_FROM = 512
# Longer windows than this without a norm, a rotation or a bias go to torch's flash attention, as the reference's do;
# with a norm or rotation those longer than PREPARE_FROM, which have passes before and after it in any case.
LIBRARY_FROM = 64
# Wider heads take more registers than blocks and warps of this many channels leave. So do, in short windows, rows that
# are rotated by halves, both of which are alive at once, and in tiles of 16 places those of a layer norm.
NARROW = 80
# Rows of a program of the passes that take rows one by one.
ROWS = 64
# Programs at most that share the sum of a bias' gradient: some for every SM of the largest GPU; a partial sum is large,
# and in long windows larger still: there two for every SM.
BIAS_PROGRAMS, LONG_BIAS_PROGRAMS = 1024, 512
# The same for a weight: about four waves of a large GPU. At 4096 tokens of 16 heads the partial sums are 4% of what
# such a backward moves.
WEIGHT_PROGRAMS = 2048


class Call:
    """What follows from the signature of a call: the windows, the form that kernels are compiled for, the launches."""

    def __init__(self, qkv: Like, parameters: Parameters, sizes: tuple[int, ...], numbers: Numbers) -> None:
        self.qkv, self.parameters, self.scale, self.eps = qkv, parameters, numbers.scale, numbers.eps
        self.batch, self.tokens, _, self.heads, head_dim = qkv.shape
        box = self.box = boxes(sizes[:3], sizes[3:])
        self.items = self.batch * box.windows  # of all samples
        # fp32 takes twice the room, and no tensor cores unless torch asks for TF32: smaller blocks, more threads
        self.exact = qkv.dtype == torch.float32
        q_weight, k_weight, cos, _, bias = parameters
        if bias is not None and bias.shape != (wanted := (self.heads, box.length, box.length)):
            raise ValueError(f"bias has shape {tuple(bias.shape)}; it must be [heads, L, L] = {list(wanted)}")
        halves = cos is not None and not numbers.interleaved
        # A backward takes halves by pairs, and so adds scores in another order than the forward. In float32 that would
        # show in the probabilities; there it reads them prepared.
        self.apart = self.exact and halves and box.length > 16
        q_step, k_step = (
            head_dim if weight is not None and len(weight.shape) == 2 else 0 for weight in (q_weight, k_weight)
        )
        parts = ((0, head_dim // 2), (head_dim // 2, head_dim)) if halves else ((0, head_dim),)
        wide_rows = (halves and self.short) or (numbers.norm == 2 and box.length <= 16)
        self.broad = head_dim > NARROW or wide_rows
        narrow = partial(narrow_pieces, width=32 if self.broad else 16)
        # Without tensor cores a product keeps both of its operands in registers: there it takes less of a row at once.
        wide = narrow if self.exact else wide_pieces
        cut = narrow if box.length <= PREPARE_FROM else wide
        qk = tuple(piece for part in parts for piece in cut(*part))
        v = (narrow if self.short else wide)(0, head_dim)
        self.form = Form(box.inner, numbers.norm, not halves, head_dim, qk, v, numbers.precision, q_step, k_step)
        self.constants = constants(self.form)
        self.tiles = tiles_of(qkv.dtype, head_dim, box.length)

    @property
    def short(self) -> bool:
        return self.box.length <= SHORT and not self.apart

    @property
    def rotated(self) -> bool:
        return self.parameters.cos is not None

    @property
    def prepared(self) -> bool:
        """Whether q and k are normed and turned by a pass of its own."""
        return self.apart or (self.box.length > PREPARE_FROM and (self.form.norm != 0 or self.rotated))

    @property
    def dense(self) -> bool:
        """Whether the windows are long runs of tokens that fill the grid, without a bias: what torch can take."""
        size, _, width = self.box.axes[0]
        runs = len(self.box.axes) == 1 and size % width == 0 and 0 < self.items <= library.MOST_WINDOWS
        long = self.box.length > LIBRARY_FROM and (self.prepared or not (self.form.norm or self.rotated))
        return long and runs and self.parameters.bias is None and not self.exact

    @cached_property
    def short_forward(self) -> Launch:
        tile = _tile(self.box.length)
        each = tile // self.box.length
        return Launch(
            short.short_forward_kernel, (triton.cdiv(self.items, each) * self.heads,),
            self.items, self.tokens, self.heads, *self.box.arguments, self.scale, self.eps,
            each > 1, self.constants, tile, num_warps=_short_warps(self, tile, True), num_stages=1,
        )  # fmt: skip

    @cached_property
    def prepare(self) -> Launch:
        rows = self.batch * self.tokens
        return Launch(
            flash.prepare_kernel, (triton.cdiv(rows, ROWS) * self.heads,),
            rows, self.tokens, self.heads, self.eps, self.constants, ROWS,
        )  # fmt: skip

    @cached_property
    def long_forward(self) -> Launch:
        tile = self.tiles[0]
        return Launch(
            flash.forward_kernel, (self.items * self.heads * triton.cdiv(self.box.length, tile.block),),
            self.tokens, self.heads, *self.box.arguments, self.scale, self.eps,
            self.prepared, self.constants, tile.block, tile.inner, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip


class Parameters(NamedTuple):
    """The tensors of a call beside qkv."""

    q_weight: Like | None
    k_weight: Like | None
    cos: Like | None
    sin: Like | None
    bias: Like | None


class Numbers(NamedTuple):
    """The options of a call."""

    norm: int
    interleaved: bool
    scale: float
    eps: float
    precision: str


@plan
def _call(qkv, q_weight, k_weight, cos, sin, bias, sizes, numbers, device) -> Call:
    named = {"q_weight": q_weight, "k_weight": k_weight, "cos": cos, "sin": sin, "bias": bias}
    parameters = Parameters(**{name: dense(name, tensor) for name, tensor in named.items()})
    return Call(dense("qkv", qkv), parameters, sizes, Numbers(*numbers))


def window_attention_fwd(
    qkv, t, h, w, wt, wh, ww, q_weight, k_weight, norm, cos, sin, interleaved, bias, scale, eps
) -> tuple[Tensor, Tensor]:
    parameters = (q_weight, k_weight, cos, sin, bias)
    sizes, numbers = (t, h, w, wt, wh, ww), (norm, interleaved, scale, eps, precision_of(qkv.dtype))
    call = _call(signature(qkv), *map(signature, parameters), sizes, numbers, qkv.get_device())
    batch, tokens, _, heads, head_dim = qkv.shape
    if call.dense and library.serves(qkv.device):
        out, softmax = library.forward(*_views(call, qkv, _prepared(call, qkv, parameters)), scale)
        return out.view(batch, tokens, heads * head_dim), softmax.view(batch, tokens, heads, 2)
    out = qkv.new_empty(batch, tokens, heads * head_dim)
    softmax = qkv.new_empty(batch, tokens, heads, 2, dtype=torch.float32)
    if call.short:
        call.short_forward(qkv, out, softmax, *parameters)
    else:
        call.long_forward(_prepared(call, qkv, parameters), qkv, out, softmax, *parameters)
    return out, softmax


def window_attention_bwd(
    dout, qkv, out, softmax, t, h, w, wt, wh, ww,
    q_weight, k_weight, norm, cos, sin, interleaved, bias, scale, eps, need_qkv, need_q, need_k, need_bias,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    parameters = (q_weight, k_weight, cos, sin, bias)
    sizes, numbers = (t, h, w, wt, wh, ww), (norm, interleaved, scale, eps, precision_of(qkv.dtype))
    inputs = map(signature, (dout, qkv, out, softmax, *parameters))
    backward = _backward(*inputs, sizes, numbers, need_bias, qkv.get_device())
    call = backward.call
    dqkv = torch.empty_like(qkv)  # though need_qkv may be false: qkv is the result of a Linear
    bias_parts = softmax.new_empty(backward.dbias) if need_bias else None
    if call.short:
        weights = backward.weight_parts(qkv, need_q, need_k)
        backward.short(qkv, dout, softmax, dqkv, *weights, bias_parts, *parameters)
    elif call.dense and library.serves(qkv.device):
        views = _views(call, qkv, _prepared(call, qkv, parameters))
        d, o, pairs = (tensor.view(*views[0].shape[:3], -1) for tensor in (dout, out, softmax))
        grads = library.backward(d, *views, o, pairs, scale)
        weights = backward.weight_parts(qkv, need_q, need_k, finish=True)
        backward.finish(qkv, *grads, dqkv, *weights, *parameters[:4])
    else:
        qk = _prepared(call, qkv, parameters)
        batch, tokens, heads, _ = softmax.shape
        kept, weights = softmax.new_empty(batch, heads, 3, tokens), backward.weight_parts(qkv, need_q, need_k)
        backward.of_queries(qk, qkv, dout, out, softmax, kept, dqkv, weights[0], bias_parts, *parameters)
        backward.of_keys(qk, qkv, dout, kept, dqkv, weights[1], *parameters)
    parts = (*weights, bias_parts)
    dq_weight, dk_weight, dbias = (
        qkv.new_empty(0) if part is None else torch.empty_like(parameter)
        for part, parameter in zip(parts, (q_weight, k_weight, bias), strict=True)
    )
    sums = zip(parts, (dq_weight, dk_weight, dbias), strict=True)
    sum_parts(*(None if part is None else (part, total) for part, total in sums))
    return dqkv if need_qkv else qkv.new_empty(0), dq_weight, dk_weight, dbias


def _tile(length: int) -> int:
    """Rows of a tile, 16 at least: more, to leave fewer empty, would waste as much on scores across windows."""
    return max(16, triton.next_power_of_2(length))


def _short_warps(call: Call, tile: int, plain: bool) -> int:
    """Warps of a tile: 16 rows each, the least of a product, or several that share them, where they would spill."""
    if call.exact:
        return 4
    shared = (1 if plain else 2) * (2 if call.broad else 1)
    return min(tile // 16 * shared, 8)


def tiles_of(dtype: torch.dtype, head_dim: int, length: int) -> tuple[Blocks, Blocks]:
    """Of the forward and of the backward of long windows, as registers and shared memory allow."""
    if dtype == torch.float32:
        return Blocks(32, 32, 8, 1), Blocks(32, 16, 8, 1)
    if head_dim > NARROW:
        return Blocks(64, 32, 8, 1), Blocks(64, 16, 8, 1)
    if length <= 64:
        return Blocks(64, 32, 8, 1), Blocks(64, 32, 8, 1)
    return sizes(WINDOW_FORWARD), sizes(WINDOW_BACKWARD)


class Backward:
    """The launches of a call's backward, and the sizes of the partial sums that they leave."""

    def __init__(self, call: Call, with_dbias: bool) -> None:
        self.call = call
        length, heads = call.box.length, call.heads
        if call.short:
            self._tile = _tile(length)
            self._each = self._tile // length
            tiles = triton.cdiv(call.items, self._each)
            weighted = call.parameters.q_weight is not None or call.parameters.k_weight is not None
            most = BIAS_PROGRAMS if with_dbias else WEIGHT_PROGRAMS if weighted else tiles * heads
            self._per_chunk = max(1, triton.cdiv(tiles * heads, max(1, most)))
            chunks = max(1, triton.cdiv(tiles, self._per_chunk))
            self._programs = chunks * heads
            self.dbias = (chunks * self._each, heads, length, length)
        else:
            self._blocks = heads * triton.cdiv(length, call.tiles[1].block)
            self._programs = call.items * self._blocks
            self._chunks = call.items
            if with_dbias:
                self._chunks = min(call.items, max(1, LONG_BIAS_PROGRAMS // self._blocks))
            self.dbias = (self._chunks, heads, length, length)
        self._finish_programs = triton.cdiv(call.batch * call.tokens, ROWS) * heads

    def weight_parts(self, qkv: Tensor, *needs: bool, finish: bool = False) -> list[Tensor | None]:
        """Partial sums, of each head, for the gradients of the norms' weights that are asked for."""
        shape = (self._finish_programs if finish else self._programs, self.call.form.head_dim)
        return [qkv.new_empty(shape, dtype=torch.float32) if need else None for need in needs]

    @cached_property
    def short(self) -> Launch:
        call = self.call
        # Norm and rotation hold more of a row, the bias holds another tile of scores.
        plain = call.form.norm == 0 and not call.rotated and call.parameters.bias is None
        return Launch(
            short.short_backward_kernel, (self._programs,),
            self._per_chunk, call.items, call.tokens, call.heads, *call.box.arguments, call.scale, call.eps,
            self._each > 1, call.constants, self._tile,
            num_warps=_short_warps(call, self._tile, plain), num_stages=1,
        )  # fmt: skip

    @cached_property
    def of_queries(self) -> Launch:
        return self._long(flash.query_kernel, self._chunks * self._blocks, self.call.items, self._chunks)

    @cached_property
    def of_keys(self) -> Launch:
        return self._long(flash.key_kernel, self._programs)

    def _long(self, kernel, programs: int, *counts: int) -> Launch:
        call = self.call
        tile = call.tiles[1]
        return Launch(
            kernel, (programs,), *counts,
            call.tokens, call.heads, *call.box.arguments, call.scale, call.eps,
            call.prepared, call.constants, tile.block, tile.inner, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip

    @cached_property
    def finish(self) -> Launch:
        call = self.call
        rows = call.batch * call.tokens
        return Launch(
            library.finish_kernel, (self._finish_programs,),
            rows, call.tokens, call.heads, call.eps, call.constants, ROWS,
        )  # fmt: skip


@plan
def _backward(
    dout, qkv, out, softmax, q_weight, k_weight, cos, sin, bias, sizes, numbers, with_dbias, device
) -> Backward:
    for name, tensor in (("dout", dout), ("out", out), ("softmax", softmax)):
        dense(name, tensor)
    call = _call(qkv, q_weight, k_weight, cos, sin, bias, sizes, numbers, device)
    return Backward(call, with_dbias)


def _prepared(call: Call, qkv: Tensor, parameters: tuple[Tensor | None, ...]) -> Tensor:
    """q and k normed and turned, where that takes a pass of its own; else qkv itself."""
    if not call.prepared:
        return qkv
    qk = qkv.new_empty(call.batch, call.tokens, 2, call.heads, call.form.head_dim)
    call.prepare(qkv, qk, *parameters[:4])
    return qk


def _views(call: Call, qkv: Tensor, qk: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v ``[windows, length, heads, head_dim]``."""
    heads, head_dim = qkv.shape[3:]
    q, k, v = qkv.view(-1, call.box.length, 3, heads, head_dim).unbind(2)
    if qk is not qkv:
        q, k = qk.view(-1, call.box.length, 2, heads, head_dim).unbind(2)
    return q, k, v
