"""window_attention for windows of at most 32 tokens: whole windows in one tile of scores.

A program takes a tile of TILE places, which holds TILE // L windows of one head, and multiplies all its queries with
all its keys; scores across windows are masked. What that wastes costs less than tiles with empty rows: by a count of
bytes and operations these kernels are bound by memory. Each row is read once and written once, in both directions: the
backward needs neither the output (delta is the rowsum of P * dP, and all of P is here) nor a second pass. It makes the
root mean squares of q and k again: the sums over rows keep Triton from a layout that takes more registers.

A program takes one head. Triton would keep what several heads share, as rotary angles, in registers, which then spill.
Programs of the same tokens are neighbours, so that these come from the caches. Where a gradient is summed over tokens
(the bias', or of weights) a program goes on to further tiles of its head.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._common import cast, dot, load
from ._window_rows import (
    column_sums,
    exp,
    inner,
    length_of,
    load_angles,
    load_rows,
    locate,
    moments,
    norm_backward,
    paired,
    prepare,
    scaled,
    store_dweight,
    store_rows,
    sums,
    totals,
    turn,
    unpaired,
    zeros,
)

LENGTHS = ["items", "tokens", "n0", "n1", "n2", "s0", "s1", "s2", "w0"]


@triton.jit
def _product(a, rows, seen, PACKED: tl.constexpr, FORM: tl.constexpr):
    """``a rows``, fp32, where a is zero between windows and the windows of a tile must not see each other.

    0 * NaN is NaN, and so is 0 * infinity: a row with one such number would reach all windows in the tile. It is
    multiplied as zeros, and its own window, the rows that have ``seen`` it, gets NaN.
    """
    if PACKED:
        differences = ()
        for i in tl.static_range(len(rows)):
            differences += (rows[i].to(tl.float32) - rows[i].to(tl.float32),)
        finite = totals(differences) == 0  # else NaN
        clean = tl.min(tl.where(seen, finite[None, :].to(tl.int32), 1), 1) != 0
        poison = tl.where(clean, 0.0, float("nan"))[:, None]
    result = ()
    for i in tl.static_range(len(rows)):
        row = rows[i]
        if PACKED:
            row = tl.where(finite[:, None], row, 0.0)
        part = dot(cast(a, row.dtype), row, tl.zeros(row.shape, tl.float32), FORM.precision)
        if PACKED:
            part += poison
        result += (part,)
    return result


@triton.jit
def _tile(tile, items, length, each, tokens, box, TILE: tl.constexpr, FORM: tl.constexpr):
    """Of the rows of a tile: window in the tile, place in the window, token, row in [B * N], whether there is one."""
    place = tl.arange(0, TILE)
    slot = place // length
    place -= slot * length
    item = tile * each + slot
    sample, token, inside = locate(item, place, box, FORM.window)
    valid = inside & (slot < each) & (item < items)
    return slot, place, token, sample.to(tl.int64) * tokens + token, valid


@triton.jit
def _load_bias(bias, head, place, seen, length):
    at = (head * length + place[:, None]) * length + place[None, :]
    return load(bias + at, seen)


@triton.jit(do_not_specialize=LENGTHS)
def short_forward_kernel(
    qkv, out, softmax, q_weight, k_weight, cos, sin, bias, items, tokens, heads, n0, n1, n2, s0, s1, s2, w0, scale, eps,
    PACKED: tl.constexpr, FORM: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    box = (n0, n1, n2, s0, s1, s2, w0)
    length = length_of(w0, FORM.window)
    head = tl.program_id(0) % heads
    step = heads * FORM.head_dim
    slot, place, token, row, valid = _tile(
        tl.program_id(0) // heads, items, length, TILE // length, tokens, box, TILE, FORM
    )
    seen = (slot[:, None] == slot[None, :]) & valid[None, :]
    at = row * (3 * step) + head * FORM.head_dim
    if q_weight is not None:
        q_weight += head * FORM.q_step
    if k_weight is not None:
        k_weight += head * FORM.k_step
    angles = load_angles(cos, sin, token, valid, FORM)
    q = load_rows(qkv, at, valid, FORM.qk)
    q = prepare(q, moments(q, eps, FORM), q_weight, angles, FORM)
    k = load_rows(qkv + step, at, valid, FORM.qk)
    k = prepare(k, moments(k, eps, FORM), k_weight, angles, FORM)
    v = load_rows(qkv + 2 * step, at, valid, FORM.v)
    s = inner(q, k, FORM) * scale
    if bias is not None:
        s += _load_bias(bias, head, place, seen, length)
    s = tl.where(seen, s, float("-inf"))
    greatest = tl.max(s, 1)
    # Rows of the tile that hold no token see nothing.
    p = exp(s - tl.where(greatest == float("-inf"), 0.0, greatest)[:, None])
    total = tl.sum(p, 1)
    o = scaled(_product(p, v, seen, PACKED, FORM), tl.div_rn(1.0, total)[:, None])
    store_rows(out, row * step + head * FORM.head_dim, valid, o, FORM.v)
    pair = (row * heads + head)[:, None] * 2 + tl.arange(0, 2)[None, :]
    tl.store(softmax + pair, tl.join(greatest, total), mask=valid[:, None])


@triton.jit(do_not_specialize=[*LENGTHS, "tiles"])
def short_backward_kernel(
    qkv, dout, softmax, dqkv, dq_partial, dk_partial, dbias_partial, q_weight, k_weight, cos, sin, bias, tiles, items,
    tokens, heads, n0, n1, n2, s0, s1, s2, w0, scale, eps,
    PACKED: tl.constexpr, FORM: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Partial sums: of a weight [chunks of tiles, heads, head_dim], of the bias [chunks, TILE // L, heads, L, L]."""
    box = (n0, n1, n2, s0, s1, s2, w0)
    length = length_of(w0, FORM.window)
    each = TILE // length
    step = heads * FORM.head_dim
    chunk = tl.program_id(0) // heads
    head = tl.program_id(0) % heads
    if q_weight is not None:
        q_weight += head * FORM.q_step
    if k_weight is not None:
        k_weight += head * FORM.k_step
    dq_weight = () if dq_partial is None else zeros(1, FORM.qk)
    dk_weight = () if dk_partial is None else zeros(1, FORM.qk)
    dpair = tl.zeros([TILE, TILE], tl.float32)
    # What does not change in the loop is made anew: kept in registers it would make others spill.
    for tile in tl.range(chunk * tiles, tl.minimum((chunk + 1) * tiles, tl.cdiv(items, each)), disable_licm=True):
        slot, place, token, row, valid = _tile(tile, items, length, each, tokens, box, TILE, FORM)
        seen = (slot[:, None] == slot[None, :]) & valid[:, None] & valid[None, :]
        at = row * (3 * step) + head * FORM.head_dim
        angles = load_angles(cos, sin, token, valid, FORM)
        q = load_rows(qkv, at, valid, FORM.qk)
        of_q = moments(q, eps, FORM)
        q = paired(prepare(q, of_q, q_weight, angles, FORM), TILE > 16, FORM)
        k = load_rows(qkv + step, at, valid, FORM.qk)
        of_k = moments(k, eps, FORM)
        k = paired(prepare(k, of_k, k_weight, angles, FORM), TILE > 16, FORM)
        v = load_rows(qkv + 2 * step, at, valid, FORM.v)
        d = load_rows(dout, row * step + head * FORM.head_dim, valid, FORM.v)
        pair = softmax + 2 * (row * heads + head)
        greatest = tl.load(pair, mask=valid, other=0.0)
        total = tl.load(pair + 1, mask=valid, other=1.0)
        s = inner(q, k, FORM) * scale
        if bias is not None:
            s += _load_bias(bias, head, place, seen, length)
        p = tl.where(seen, exp(s - greatest[:, None]) * tl.div_rn(1.0, total)[:, None], 0.0)
        store_rows(dqkv + 2 * step, at, valid, _product(tl.trans(p), d, seen, PACKED, FORM), FORM.v)
        dp = inner(d, v, FORM)
        delta = tl.sum(tl.where(seen, p * dp, 0.0), 1)
        ds = tl.where(seen, p * (dp - delta[:, None]), 0.0)
        if dbias_partial is not None:
            dpair += ds
        grad = _product(ds, k, seen, PACKED, FORM)
        grad = turn(unpaired(grad, TILE > 16, FORM), load_angles(cos, sin, token, valid, FORM), FORM.interleaved, True)
        grad, dweight = norm_backward(grad, scale, load_rows(qkv, at, valid, FORM.qk), of_q, q_weight, FORM)
        store_rows(dqkv, at, valid, grad, FORM.qk)
        if dq_partial is not None:
            dq_weight = sums(dq_weight, column_sums(dweight))
        grad = _product(tl.trans(ds), q, seen, PACKED, FORM)
        grad = turn(unpaired(grad, TILE > 16, FORM), load_angles(cos, sin, token, valid, FORM), FORM.interleaved, True)
        grad, dweight = norm_backward(grad, scale, load_rows(qkv + step, at, valid, FORM.qk), of_k, k_weight, FORM)
        store_rows(dqkv + step, at, valid, grad, FORM.qk)
        if dk_partial is not None:
            dk_weight = sums(dk_weight, column_sums(dweight))
    store_dweight(dq_partial, tl.program_id(0), dq_weight, FORM)
    store_dweight(dk_partial, tl.program_id(0), dk_weight, FORM)
    if dbias_partial is not None:
        slot = tl.arange(0, TILE) // length
        place = tl.arange(0, TILE) - slot * length
        matrix = ((chunk * each + slot).to(tl.int64) * heads + head)[:, None]
        at = (matrix * length + place[:, None]) * length + place[None, :]
        tl.store(dbias_partial + at, dpair, mask=(slot[:, None] == slot[None, :]) & (slot < each)[:, None])
