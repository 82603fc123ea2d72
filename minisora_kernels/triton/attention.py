"""attention by blocks of queries and keys (FlashAttention-2, Dao 2023); its kernels and their launchers.

Forward: a program takes a block of queries of one head through the keys that count, with an online softmax. Backward:
one launch takes blocks of queries (dq), a second one blocks of keys (dk, dv). Both make the scores again, so nothing is
added up across programs. The first also leaves delta for the second.

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
from ._launch import Launch, Like, dense, empty_gradient, plan, signature
from ._window_rows import (
    Piece,
    add_product,
    exp,
    inner,
    load_rows,
    row_sums,
    scaled,
    store_rows,
    wide_pieces,
    zeros,
)

# Wider heads take more registers than blocks and warps of this many channels leave.
NARROW = 80


class Form(NamedTuple):
    """What kernels are compiled for, and get as ``constants``."""

    head_dim: int
    pieces: tuple[Piece, ...]
    precision: str  # of products, see `precision_of`


class Tile(NamedTuple):
    """Rows that a program keeps, and rows that it takes at a step; warps and stages."""

    block: int
    inner: int
    warps: int
    stages: int


def tiles_of(dtype: torch.dtype, head_dim: int) -> tuple[Tile, Tile]:
    """Of the forward and of the backward, as registers and shared memory allow."""
    if dtype == torch.float32:
        return Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)
    if head_dim > NARROW:
        return Tile(64, 32, 8, 1), Tile(64, 32, 8, 1)
    return Tile(128, 64, 8, 2), Tile(128, 32, 8, 2)


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
def _load_softmax(softmax, at, valid):
    """What is kept of each query: maximum and 1 / sum; such that a query that is not there weighs nothing."""
    greatest = tl.load(softmax + 2 * at, mask=valid, other=float("inf"))
    return greatest, tl.div_rn(1.0, tl.load(softmax + 2 * at + 1, mask=valid, other=1.0))


@triton.jit(do_not_specialize=["tokens", "keys"])
def forward_kernel(
    q, k, v, out, softmax, lengths, index, tokens, keys, heads, q_sample, q_token, q_head, k_sample, k_token, k_head,
    v_sample, v_token, v_head, scale, FORM: tl.constexpr, BLOCK: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(tokens, BLOCK)
    head = (tl.program_id(0) // blocks % heads).to(tl.int64)
    sample = (tl.program_id(0) // blocks // heads).to(tl.int64)
    q += sample * q_sample + head * q_head
    k += sample * k_sample + head * k_head
    v += sample * v_sample + head * v_head
    count = _counting(lengths, sample, keys)

    place = (tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    valid = place < tokens
    queries = load_rows(q, place * q_token, valid, FORM.pieces)
    greatest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    acc = zeros(BLOCK, FORM.pieces)
    for start in range(0, count, INNER):
        key = start + tl.arange(0, INNER)
        here = key < count
        token = _tokens(index, sample, key, here, keys)
        s = inner(queries, load_rows(k, token * k_token, here, FORM.pieces), FORM) * scale
        s = tl.where(here[None, :], s, float("-inf"))
        top = tl.maximum(greatest, tl.max(s, 1))
        shrink = exp(greatest - top)
        p = exp(s - top[:, None])
        total = total * shrink + tl.sum(p, 1)
        acc = scaled(acc, shrink[:, None])
        acc = add_product(acc, p, load_rows(v, token * v_token, here, FORM.pieces), FORM)
        greatest = top
    greatest = tl.where(count > 0, greatest, 0.0)
    total = tl.where(count > 0, total, 1.0)
    row = (sample * tokens + place) * heads + head
    store_rows(out, row * FORM.head_dim, valid, scaled(acc, tl.div_rn(1.0, total)[:, None]), FORM.pieces)
    pair = row[:, None] * 2 + tl.arange(0, 2)[None, :]
    tl.store(softmax + pair, tl.join(greatest, total), mask=valid[:, None])


@triton.jit(do_not_specialize=["tokens", "keys"])
def query_kernel(
    dout, q, k, v, out, softmax, lengths, index, delta, dq, tokens, keys, heads, q_sample, q_token, q_head, k_sample,
    k_token, k_head, v_sample, v_token, v_head, scale, FORM: tl.constexpr, BLOCK: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """delta [B, N, heads], rowsum(dout * out); and dq, if it is asked for."""
    blocks = tl.cdiv(tokens, BLOCK)
    head = (tl.program_id(0) // blocks % heads).to(tl.int64)
    sample = (tl.program_id(0) // blocks // heads).to(tl.int64)
    place = (tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    valid = place < tokens
    row = (sample * tokens + place) * heads + head
    d = load_rows(dout, row * FORM.head_dim, valid, FORM.pieces)
    sums = row_sums(d, load_rows(out, row * FORM.head_dim, valid, FORM.pieces))
    tl.store(delta + row, sums, mask=valid)
    if dq is not None:
        k += sample * k_sample + head * k_head
        v += sample * v_sample + head * v_head
        count = _counting(lengths, sample, keys)
        queries = load_rows(q + sample * q_sample + head * q_head, place * q_token, valid, FORM.pieces)
        top, inverse = _load_softmax(softmax, row, valid)
        acc = zeros(BLOCK, FORM.pieces)
        for start in range(0, count, INNER):
            key = start + tl.arange(0, INNER)
            here = key < count
            token = _tokens(index, sample, key, here, keys)
            rows = load_rows(k, token * k_token, here, FORM.pieces)
            s = tl.where(here[None, :], inner(queries, rows, FORM) * scale, float("-inf"))
            p = exp(s - top[:, None]) * inverse[:, None]
            dp = inner(d, load_rows(v, token * v_token, here, FORM.pieces), FORM)
            acc = add_product(acc, p * (dp - sums[:, None]), rows, FORM)
        store_rows(dq, row * FORM.head_dim, valid, scaled(acc, scale), FORM.pieces)


@triton.jit(do_not_specialize=["tokens", "keys"])
def key_kernel(
    dout, q, k, v, softmax, lengths, index, delta, dk, dv, tokens, keys, heads, q_sample, q_token, q_head, k_sample,
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
    q += sample * q_sample + head * q_head
    rows = load_rows(k + sample * k_sample + head * k_head, token * k_token, here, FORM.pieces)
    if dk is not None:
        values = load_rows(v + sample * v_sample + head * v_head, token * v_token, here, FORM.pieces)
        dkeys = zeros(BLOCK, FORM.pieces)
    if dv is not None:
        dvalues = zeros(BLOCK, FORM.pieces)
    for start in range(0, tl.where(first < count, tokens, 0), INNER):
        query = (start + tl.arange(0, INNER)).to(tl.int64)
        valid = query < tokens
        at = (sample * tokens + query) * heads + head
        queries = load_rows(q, query * q_token, valid, FORM.pieces)
        d = load_rows(dout, at * FORM.head_dim, valid, FORM.pieces)
        top, inverse = _load_softmax(softmax, at, valid)
        p = exp(inner(rows, queries, FORM) * scale - top[None, :]) * inverse[None, :]
        if dv is not None:
            dvalues = add_product(dvalues, p, d, FORM)
        if dk is not None:
            deltas = tl.load(delta + at, mask=valid, other=0.0)
            dkeys = add_product(dkeys, p * (inner(values, d, FORM) - deltas[None, :]), queries, FORM)
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
        self._form = constants(Form(head_dim, wide_pieces(0, head_dim), precision))
        self._numbers = (self.tokens, self.keys, self.heads, *q.stride[:3], *k.stride[:3], *v.stride[:3], scale)

    def _launch(self, kernel, rows: int, tile: Tile) -> Launch:
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
    likes = {name: Like._make(tensor) for name, tensor in (("q", q), ("k", k), ("v", v))}
    for name, like in likes.items():
        if like.stride[3] != 1:
            raise ValueError(f"{name} must have stride 1 over head_dim, got strides {like.stride}")
    for name, numbers in (("lengths", lengths), ("index", index)):
        like = dense(name, numbers)
        if like is not None and like.dtype != torch.int64:
            raise ValueError(f"{name} must be int64, got {like.dtype}")
    return Call(**likes, scale=scale, precision=precision)


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
    delta = softmax.new_empty(softmax.shape[:3])
    call.of_queries(dout, q, k, v, out, softmax, lengths, index, delta, dq)
    if dk is not None or dv is not None:
        call.of_keys(dout, q, k, v, softmax, lengths, index, delta, dk, dv)
    return tuple(q.new_empty(0) if grad is None else grad for grad in (dq, dk, dv))
