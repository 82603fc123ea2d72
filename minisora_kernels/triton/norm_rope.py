"""norm_rope: a program takes all heads of some tokens, or some heads of them where the norm is over each head alone.

A row is one head of a token, cut into pieces as _window_rows.py has it, so that a rotation needs no exchange. A norm
across heads adds up the sums of a token's rows. A backward takes a run of tokens after the other and leaves partial
sums for weight and bias, [runs, heads, head_dim]; _parts.py adds them, over the heads too where these share a
parameter.
"""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import constants, inverse_root, load
from ._launch import Launch, Like, dense, empty_gradient, plan, signature, strides_of
from ._parts import sum_parts
from ._window_rows import (
    Piece,
    channels,
    columns,
    load_angles,
    load_rows,
    products,
    row_sums,
    scaled,
    store_rows,
    sums,
    totals,
    turn,
    wide_pieces,
    zeros,
)

# None of these was measured on a GPU.
# Numbers of a tile: 16 a thread, so that a backward keeps x, dy and two sums of them in registers.
ELEMENTS = 2048
# Tokens of a program's run, and how many programs there are at most before runs get longer than the shortest. The
# partial sums of a weight are 17% of what a backward in bfloat16 moves with the shortest run, 3% with the longest.
MIN_RUN, MAX_RUN, PROGRAMS = 8, 48, 1024


class Form(NamedTuple):
    """What kernels are compiled for, and get as ``constants``; nothing here follows from the number of tokens."""

    norm: int
    across: bool
    interleaved: bool
    heads: int
    head_dim: int
    qk: tuple[Piece, ...]
    tokens: int  # of a tile
    held: int  # heads of a tile, a power of two; some may be empty
    weight_step: int  # from the weight of one head to the next
    bias_step: int
    table_samples: bool  # whether each sample has angles of its own, and each head
    table_heads: bool
    unit: int  # of the strides of x, see `strides_of`


# A length is no reason to compile again, and strides have a unit.
NUMBERS = ["count", "tokens", "x_sample", "x_token", "x_head"]


@triton.jit
def _tile(first, end, group, FORM: tl.constexpr):
    """The token and the head of each row of a tile, and whether there is one."""
    row = tl.arange(0, FORM.tokens * FORM.held)
    token = first + row // FORM.held
    head = group * FORM.held + row % FORM.held
    return token, head, (token < end) & (head < FORM.heads)


@triton.jit
def _strided(token, head, tokens, of_sample, of_token, of_head, FORM: tl.constexpr):
    """Where the rows of x begin."""
    place = (token // tokens).to(tl.int64) * of_sample + (token % tokens).to(tl.int64) * of_token
    return (place + head.to(tl.int64) * of_head) * FORM.unit


@triton.jit
def _dense(token, head, FORM: tl.constexpr):
    """Where the rows of a contiguous tensor [B, N, heads, head_dim] begin."""
    return (token.to(tl.int64) * FORM.heads + head) * FORM.head_dim


@triton.jit
def _angles(cos, sin, token, head, tokens, valid, FORM: tl.constexpr):
    """cos and sin of each row in turn; or nothing."""
    row = (token if FORM.table_samples else token % tokens).to(tl.int64)
    if FORM.table_heads:
        row = row * FORM.heads + head
    return load_angles(cos, sin, row, valid, FORM)


@triton.jit
def _parameter(pointer, head, STEP: tl.constexpr, FORM: tl.constexpr):
    """The weight or bias of each row in fp32; [1, width] a piece if all heads share it."""
    rows = ()
    for i in tl.static_range(len(FORM.qk)):
        here, at = (columns(FORM.qk[i]) < FORM.qk[i][2])[None, :], columns(FORM.qk[i])[None, :]
        if STEP != 0:
            here, at = here & (head < FORM.heads)[:, None], (head * STEP)[:, None] + at
        rows += (load(pointer + at, here),)
    return rows


@triton.jit
def _mean(sums_of_rows, FORM: tl.constexpr):
    """The mean over what the norm is over, for each row, from the sums of the rows."""
    mean = sums_of_rows
    if FORM.across:
        total = tl.sum(tl.reshape(mean, (FORM.tokens, FORM.held)), 1)
        total = tl.div_rn(total, FORM.heads * FORM.head_dim)
        mean = tl.reshape(tl.broadcast_to(total[:, None], (FORM.tokens, FORM.held)), (FORM.tokens * FORM.held,))
    else:
        mean = tl.div_rn(mean, FORM.head_dim)
    return mean


@triton.jit
def _normed(rows, valid, eps, FORM: tl.constexpr):
    """The rows after the norm, in fp32, and 1 / their root mean square; rows that are not there are zero."""
    x = [row.to(tl.float32) for row in rows]
    if FORM.norm == 2:
        mean = _mean(totals(x), FORM)[:, None]
        centred = ()
        for i in tl.static_range(len(x)):
            centred += (tl.where(channels(valid[:, None], FORM.qk[i]), x[i] - mean, 0.0),)
        x = centred
    rstd = tl.where(valid, inverse_root(_mean(row_sums(x, x), FORM) + eps), 0.0)[:, None]
    return scaled(x, rstd), rstd


@triton.jit(do_not_specialize=NUMBERS)
def norm_forward_kernel(
    x, y, weight, bias, cos, sin, count, tokens, x_sample, x_token, x_head, eps, GROUPS: tl.constexpr,
    FORM: tl.constexpr,
):  # fmt: skip
    token, head, valid = _tile(tl.program_id(0) // GROUPS * FORM.tokens, count, tl.program_id(0) % GROUPS, FORM)
    rows = load_rows(x, _strided(token, head, tokens, x_sample, x_token, x_head, FORM), valid, FORM.qk)
    rows = [row.to(tl.float32) for row in rows]
    if FORM.norm != 0:
        rows, _ = _normed(rows, valid, eps, FORM)
        if weight is not None:
            rows = products(rows, _parameter(weight, head, FORM.weight_step, FORM))
        if bias is not None:
            rows = sums(rows, _parameter(bias, head, FORM.bias_step, FORM))
    rows = turn(rows, _angles(cos, sin, token, head, tokens, valid, FORM), FORM.interleaved, False)
    store_rows(y, _dense(token, head, FORM), valid, rows, FORM.qk)


@triton.jit
def _store_parts(parts, run, group, total, FORM: tl.constexpr):
    """Row ``run`` of the partial sums [runs, heads, head_dim]: the sums over the tokens of a tile."""
    head = group * FORM.held + tl.arange(0, FORM.held)
    for i in tl.static_range(len(FORM.qk)):
        each = total[i]
        if FORM.tokens > 1:
            each = tl.sum(tl.reshape(each, (FORM.tokens, FORM.held, FORM.qk[i][1])), 0)
        at = (run.to(tl.int64) * FORM.heads + head)[:, None] * FORM.head_dim + columns(FORM.qk[i])[None, :]
        tl.store(parts + at, each, mask=channels((head < FORM.heads)[:, None], FORM.qk[i]))


@triton.jit(do_not_specialize=[*NUMBERS, "length"])
def norm_backward_kernel(
    dy, x, dx, weight_parts, bias_parts, weight, cos, sin, count, tokens, length, x_sample, x_token, x_head, eps,
    GROUPS: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    run = tl.program_id(0) // GROUPS
    group = tl.program_id(0) % GROUPS
    end = tl.minimum((run + 1) * length, count)
    dweight = zeros(FORM.tokens * FORM.held, FORM.qk)
    dbias = zeros(FORM.tokens * FORM.held, FORM.qk)
    for first in range(run * length, end, FORM.tokens):
        token, head, valid = _tile(first, end, group, FORM)
        grad = [row.to(tl.float32) for row in load_rows(dy, _dense(token, head, FORM), valid, FORM.qk)]
        grad = turn(grad, _angles(cos, sin, token, head, tokens, valid, FORM), FORM.interleaved, True)
        if FORM.norm != 0:
            rows = load_rows(x, _strided(token, head, tokens, x_sample, x_token, x_head, FORM), valid, FORM.qk)
            rows, rstd = _normed(rows, valid, eps, FORM)
            if weight_parts is not None:
                dweight = sums(dweight, products(grad, rows))
            if bias_parts is not None:
                dbias = sums(dbias, grad)
            if dx is not None:
                if weight is not None:
                    grad = products(grad, _parameter(weight, head, FORM.weight_step, FORM))
                along = _mean(row_sums(grad, rows), FORM)[:, None]
                if FORM.norm == 2:
                    along_ones = _mean(totals(grad), FORM)[:, None]
                rest = ()
                for i in tl.static_range(len(rows)):
                    each = grad[i] - rows[i] * along
                    if FORM.norm == 2:
                        each -= along_ones
                    rest += (each * rstd,)
                grad = rest
        if dx is not None:
            store_rows(dx, _dense(token, head, FORM), valid, grad, FORM.qk)
    if weight_parts is not None:
        _store_parts(weight_parts, run, group, dweight, FORM)
    if bias_parts is not None:
        _store_parts(bias_parts, run, group, dbias, FORM)


class Call:
    """What follows from the signature of a call: the form that kernels are compiled for, and the launches."""

    def __init__(
        self, x: Like, weight: Like | None, bias: Like | None, cos: Like | None, norm: int, across: bool,
        interleaved: bool, eps: float,
    ) -> None:  # fmt: skip
        self.batch, self.tokens, heads, head_dim = x.shape
        strides = strides_of(x=x)
        self.steps, self.eps = strides.steps, eps
        halves = cos is not None and not interleaved
        half = head_dim // 2
        pieces = wide_pieces(0, half) + wide_pieces(half, head_dim) if halves else wide_pieces(0, head_dim)
        width = triton.next_power_of_2(sum(width for _, width, _ in pieces))
        across = across and norm != 0
        held = triton.next_power_of_2(heads)
        if not across:
            held = min(held, max(1, ELEMENTS // width))
        tokens = max(1, ELEMENTS // (held * width))
        self.warps = max(4, tokens * held * width // 512)
        weight_step, bias_step = (
            head_dim if parameter is not None and len(parameter.shape) == 2 else 0 for parameter in (weight, bias)
        )
        self.groups = triton.cdiv(heads, held)
        self.form = Form(
            norm, across, not halves, heads, head_dim, pieces, tokens, held, weight_step, bias_step,
            cos is not None and cos.shape[0] > 1, cos is not None and cos.shape[2] > 1, strides.unit,
        )  # fmt: skip
        count = self.batch * self.tokens
        run = min(max(triton.cdiv(count * self.groups, PROGRAMS), MIN_RUN), MAX_RUN)
        self.run = triton.cdiv(run, tokens) * tokens
        self.runs = triton.cdiv(count, self.run)

    @cached_property
    def forward(self) -> Launch:
        count = self.batch * self.tokens
        return Launch(
            norm_forward_kernel, (triton.cdiv(count, self.form.tokens) * self.groups,),
            count, self.tokens, *self.steps, self.eps, self.groups, constants(self.form), num_warps=self.warps,
        )  # fmt: skip

    @cached_property
    def backward(self) -> Launch:
        return Launch(
            norm_backward_kernel, (self.runs * self.groups,),
            self.batch * self.tokens, self.tokens, self.run, *self.steps, self.eps, self.groups,
            constants(self.form), num_warps=self.warps,
        )  # fmt: skip


@plan
def _call(x, weight, bias, cos, sin, norm, across, interleaved, eps, device) -> Call:
    dense("sin", sin)
    parameters = (dense("weight", weight), dense("bias", bias), dense("cos", cos))
    return Call(Like._make(x), *parameters, norm, across, interleaved, eps)


@plan
def _backward(dy, *call) -> Call:
    dense("dy", dy)
    return _call(*call)


def norm_rope_fwd(x, weight, bias, norm, across_heads, cos, sin, interleaved, eps) -> Tensor:
    tensors = (weight, bias, cos, sin)
    call = _call(signature(x), *map(signature, tensors), norm, across_heads, interleaved, eps, x.get_device())
    y = empty_gradient(x)
    call.forward(x, y, *tensors)
    return y


def norm_rope_bwd(
    dy, x, weight, bias, norm, across_heads, cos, sin, interleaved, eps, need_x, need_weight, need_bias
) -> tuple[Tensor, Tensor, Tensor]:
    call = _backward(
        *map(signature, (dy, x, weight, bias, cos, sin)), norm, across_heads, interleaved, eps, x.get_device()
    )
    dx = empty_gradient(x) if need_x else None
    shape = (call.runs, call.form.heads, call.form.head_dim)
    parts = [x.new_empty(shape, dtype=torch.float32) if need else None for need in (need_weight, need_bias)]
    call.backward(dy, x, dx, *parts, weight, cos, sin)
    dweight = empty_gradient(weight) if need_weight else x.new_empty(0)
    dbias = empty_gradient(bias) if need_bias else x.new_empty(0)
    sums_of = zip(parts, (dweight, dbias), strict=True)
    sum_parts(*(None if part is None else (part, total) for part, total in sums_of))
    return x.new_empty(0) if dx is None else dx, dweight, dbias
