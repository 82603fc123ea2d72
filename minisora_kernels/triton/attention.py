"""attention by blocks of queries and keys (FlashAttention-2, Dao 2023); its kernels and their launchers.

Forward: a program takes a block of queries of one head through the keys that count, with an online softmax. Backward:
one launch takes blocks of queries (dq), a second one blocks of keys (dk, dv). Both make the scores again, so nothing is
added up across programs. The first leaves what the second needs of each query, side by side.

A place of a key is its position in the sample, or in the order of the index, in which those that count are the first.
No program reads a key from behind them; their gradients are zeros.
"""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import constants, precision_of
from ._launch import Launch, Like, dense, empty_gradient, plan, signature, strides_of
from ._tiles import ATTENTION_BACKWARD, ATTENTION_FORWARD, Blocks, sizes
from ._window_rows import (
    Piece,
    add_product,
    exp,
    inner,
    load_rows,
    narrow_pieces,
    row_sums,
    scaled,
    store_rows,
    wide_pieces,
    zeros,
)

# None of these was measured on a GPU.
# Wider heads take more registers than blocks and warps of this many channels leave.
NARROW = 80


class Form(NamedTuple):
    """What kernels are compiled for, and get as ``constants``."""

    head_dim: int
    pieces: tuple[Piece, ...]
    precision: str  # of products, see `precision_of`
    unit: int  # of strides, see `strides_of`


def tiles_of(dtype: torch.dtype, head_dim: int) -> tuple[Blocks, Blocks]:
    """Of the forward and of the backward, as registers and shared memory allow."""
    if dtype == torch.float32:
        return Blocks(32, 32, 8, 1), Blocks(32, 16, 8, 1)
    if head_dim > NARROW:
        return Blocks(128, 64, 8, 2), Blocks(64, 32, 8, 2)
    return sizes(ATTENTION_FORWARD), sizes(ATTENTION_BACKWARD)


def pieces_of(dtype: torch.dtype, head_dim: int) -> tuple[Piece, ...]:
    """float32, without tensor cores, takes a row in pieces: a product keeps those that it multiplies in registers."""
    return narrow_pieces(0, head_dim, 32) if dtype == torch.float32 else wide_pieces(0, head_dim)


# A length is no reason to compile again, and strides have units.
NUMBERS = [
    *("tokens", "keys", "q_sample", "q_token", "q_head", "k_sample", "k_token", "k_head"),
    *("v_sample", "v_token", "v_head"),
]


@triton.jit
def _counting(lengths, sample, keys):
    """How many keys of a sample count."""
    count = keys
    if lengths is not None:
        count = tl.minimum(tl.maximum(tl.load(lengths + sample), 0), keys).to(tl.int32)
    return count


@triton.jit
def _tokens(index, sample, place, valid, keys):
    """Which keys stand at these places; 64-bit."""
    token = place.to(tl.int64)
    if index is not None:
        token = tl.load(index + sample * keys + token, mask=valid, other=0)
    return token


@triton.jit
def _head(pointer, sample, head, of_sample, of_head, FORM: tl.constexpr):
    """Where the first token of a head is."""
    return pointer + (sample * of_sample + head * of_head) * FORM.unit


@triton.jit
def _load(pointer, token, of_token, valid, FORM: tl.constexpr):
    """Rows of a head."""
    return load_rows(pointer, token * of_token * FORM.unit, valid, FORM.pieces)


@triton.jit(do_not_specialize=NUMBERS)
def forward_kernel(
    q, k, v, out, softmax, lengths, index, tokens, keys, heads, q_sample, q_token, q_head, k_sample, k_token, k_head,
    v_sample, v_token, v_head, scale, FORM: tl.constexpr, BLOCK: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(tokens, BLOCK)
    head = (tl.program_id(0) // blocks % heads).to(tl.int64)
    sample = (tl.program_id(0) // blocks // heads).to(tl.int64)
    q = _head(q, sample, head, q_sample, q_head, FORM)
    k = _head(k, sample, head, k_sample, k_head, FORM)
    v = _head(v, sample, head, v_sample, v_head, FORM)
    count = _counting(lengths, sample, keys)

    place = (tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    valid = place < tokens
    queries = _load(q, place, q_token, valid, FORM)
    greatest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    acc = zeros(BLOCK, FORM.pieces)
    for start in range(0, count, INNER):
        key = start + tl.arange(0, INNER)
        here = key < count
        token = _tokens(index, sample, key, here, keys)
        s = inner(queries, _load(k, token, k_token, here, FORM), FORM) * scale
        s = tl.where(here[None, :], s, float("-inf"))
        top = tl.maximum(greatest, tl.max(s, 1))
        shrink = exp(greatest - top)
        p = exp(s - top[:, None])
        total = total * shrink + tl.sum(p, 1)
        acc = scaled(acc, shrink[:, None])
        acc = add_product(acc, p, _load(v, token, v_token, here, FORM), FORM)
        greatest = top
    greatest = tl.where(count > 0, greatest, 0.0)
    total = tl.where(count > 0, total, 1.0)
    row = (sample * tokens + place) * heads + head
    store_rows(out, row * FORM.head_dim, valid, scaled(acc, tl.div_rn(1.0, total)[:, None]), FORM.pieces)
    pair = row[:, None] * 2 + tl.arange(0, 2)[None, :]
    tl.store(softmax + pair, tl.join(greatest, total), mask=valid[:, None])


@triton.jit(do_not_specialize=NUMBERS)
def query_kernel(
    dout, q, k, v, out, softmax, lengths, index, kept, dq, tokens, keys, heads, q_sample, q_token, q_head, k_sample,
    k_token, k_head, v_sample, v_token, v_head, scale, FORM: tl.constexpr, BLOCK: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """What is kept of each query, [B, heads, 3, N]: maximum, 1 / sum and rowsum(dout * out); and dq, if asked for."""
    blocks = tl.cdiv(tokens, BLOCK)
    head = (tl.program_id(0) // blocks % heads).to(tl.int64)
    sample = (tl.program_id(0) // blocks // heads).to(tl.int64)
    place = (tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    valid = place < tokens
    row = (sample * tokens + place) * heads + head
    d = load_rows(dout, row * FORM.head_dim, valid, FORM.pieces)
    delta = row_sums(d, load_rows(out, row * FORM.head_dim, valid, FORM.pieces))
    top = tl.load(softmax + 2 * row, mask=valid, other=0.0)
    inverse = tl.div_rn(1.0, tl.load(softmax + 2 * row + 1, mask=valid, other=1.0))
    kept += (sample * heads + head) * 3 * tokens + place
    tl.store(kept, top, mask=valid)
    tl.store(kept + tokens, inverse, mask=valid)
    tl.store(kept + 2 * tokens, delta, mask=valid)
    if dq is not None:
        k = _head(k, sample, head, k_sample, k_head, FORM)
        v = _head(v, sample, head, v_sample, v_head, FORM)
        count = _counting(lengths, sample, keys)
        queries = _load(_head(q, sample, head, q_sample, q_head, FORM), place, q_token, valid, FORM)
        acc = zeros(BLOCK, FORM.pieces)
        for start in range(0, count, INNER):
            key = start + tl.arange(0, INNER)
            here = key < count
            token = _tokens(index, sample, key, here, keys)
            rows = _load(k, token, k_token, here, FORM)
            s = tl.where(here[None, :], inner(queries, rows, FORM) * scale, float("-inf"))
            p = exp(s - top[:, None]) * inverse[:, None]
            dp = inner(d, _load(v, token, v_token, here, FORM), FORM)
            acc = add_product(acc, p * (dp - delta[:, None]), rows, FORM)
        store_rows(dq, row * FORM.head_dim, valid, scaled(acc, scale), FORM.pieces)


@triton.jit(do_not_specialize=NUMBERS)
def key_kernel(
    dout, q, k, v, lengths, index, kept, dk, dv, tokens, keys, heads, q_sample, q_token, q_head, k_sample,
    k_token, k_head, v_sample, v_token, v_head, scale, FORM: tl.constexpr, BLOCK: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """dk and dv, if they are asked for; scores are [keys, queries]."""
    blocks = tl.cdiv(keys, BLOCK)
    first = tl.program_id(0) % blocks * BLOCK
    head = (tl.program_id(0) // blocks % heads).to(tl.int64)
    sample = (tl.program_id(0) // blocks // heads).to(tl.int64)
    count = _counting(lengths, sample, keys)
    place = first + tl.arange(0, BLOCK)
    here = place < count
    token = _tokens(index, sample, place, place < keys, keys)
    q = _head(q, sample, head, q_sample, q_head, FORM)
    kept += (sample * heads + head) * 3 * tokens
    rows = _load(_head(k, sample, head, k_sample, k_head, FORM), token, k_token, here, FORM)
    if dk is not None:
        values = _load(_head(v, sample, head, v_sample, v_head, FORM), token, v_token, here, FORM)
        dkeys = zeros(BLOCK, FORM.pieces)
    if dv is not None:
        dvalues = zeros(BLOCK, FORM.pieces)
    for start in range(0, tl.where(first < count, tokens, 0), INNER):
        query = (start + tl.arange(0, INNER)).to(tl.int64)
        valid = query < tokens
        queries = _load(q, query, q_token, valid, FORM)
        d = load_rows(dout, ((sample * tokens + query) * heads + head) * FORM.head_dim, valid, FORM.pieces)
        top = tl.load(kept + query, mask=valid, other=float("inf"))  # a query that is not there weighs nothing
        inverse = tl.load(kept + tokens + query, mask=valid, other=0.0)
        p = exp(inner(rows, queries, FORM) * scale - top[None, :]) * inverse[None, :]
        if dv is not None:
            dvalues = add_product(dvalues, p, d, FORM)
        if dk is not None:
            delta = tl.load(kept + 2 * tokens + query, mask=valid, other=0.0)
            dkeys = add_product(dkeys, p * (inner(values, d, FORM) - delta[None, :]), queries, FORM)
    # A block that keys fill in part has numbers for the others too.
    at = ((sample * keys + token) * heads + head) * FORM.head_dim
    if dk is not None:
        dkeys = [tl.where(here[:, None], piece, 0.0) for piece in scaled(dkeys, scale)]
        store_rows(dk, at, place < keys, dkeys, FORM.pieces)
    if dv is not None:
        store_rows(dv, at, place < keys, [tl.where(here[:, None], piece, 0.0) for piece in dvalues], FORM.pieces)


class Call:
    """The launches of a call."""

    def __init__(self, q: Like, k: Like, v: Like, scale: float, precision: str) -> None:
        self.batch, self.tokens, self.heads, head_dim = q.shape
        self.keys = k.shape[1]
        self._forward, self._backward = tiles_of(q.dtype, head_dim)
        strides = strides_of(q=q, k=k, v=v)
        self._form = constants(Form(head_dim, pieces_of(q.dtype, head_dim), precision, strides.unit))
        self._numbers = (self.tokens, self.keys, self.heads, *strides.steps, scale)

    def _launch(self, kernel, rows: int, tile: Blocks) -> Launch:
        return Launch(
            kernel, (self.batch * self.heads * triton.cdiv(rows, tile.block),),
            *self._numbers, self._form, tile.block, tile.inner, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip

    @cached_property
    def forward(self) -> Launch:
        return self._launch(forward_kernel, self.tokens, self._forward)

    @cached_property
    def of_queries(self) -> Launch:
        return self._launch(query_kernel, self.tokens, self._backward)

    @cached_property
    def of_keys(self) -> Launch:
        return self._launch(key_kernel, self.keys, self._backward)


@plan
def _call(q, k, v, lengths, index, scale, precision, device) -> Call:
    for name, numbers in (("lengths", lengths), ("index", index)):
        like = dense(name, numbers)
        if like is not None and like.dtype != torch.int64:
            raise ValueError(f"{name} must be int64, got {like.dtype}")
    return Call(Like._make(q), Like._make(k), Like._make(v), scale, precision)


@plan
def _backward(dout, out, softmax, *call) -> Call:
    for name, tensor in (("dout", dout), ("out", out), ("softmax", softmax)):
        dense(name, tensor)
    return _call(*call)


def attention_fwd(q, k, v, lengths, index, scale) -> tuple[Tensor, Tensor]:
    call = _call(*map(signature, (q, k, v, lengths, index)), scale, precision_of(q.dtype), q.get_device())
    batch, tokens, heads, head_dim = q.shape
    out = q.new_empty(batch, tokens, heads * head_dim)
    softmax = q.new_empty(batch, tokens, heads, 2, dtype=torch.float32)
    call.forward(q, k, v, out, softmax, lengths, index)
    return out, softmax


def attention_bwd(
    dout, q, k, v, out, softmax, lengths, index, scale, need_q, need_k, need_v
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = map(signature, (dout, out, softmax, q, k, v, lengths, index))
    call = _backward(*inputs, scale, precision_of(q.dtype), q.get_device())
    asked = zip((q, k, v), (need_q, need_k, need_v), strict=True)
    dq, dk, dv = (empty_gradient(tensor) if need else None for tensor, need in asked)
    batch, tokens, heads, _ = softmax.shape
    kept = softmax.new_empty(batch, heads, 3, tokens)
    call.of_queries(dout, q, k, v, out, softmax, lengths, index, kept, dq)
    if dk is not None or dv is not None:
        call.of_keys(dout, q, k, v, lengths, index, kept, dk, dv)
    return tuple(q.new_empty(0) if grad is None else grad for grad in (dq, dk, dv))
