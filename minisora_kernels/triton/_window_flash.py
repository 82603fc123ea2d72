"""window_attention for windows of any length: blocks of queries against blocks of keys (FlashAttention-2, Dao 2023).

Forward: a program takes a block of queries of one window and head through the window's keys, with an online softmax.
Backward: a program takes a block of tokens twice, first as queries (dq), then as keys (dk, dv). The scores are
recomputed for both, so that nothing is added up across programs; in one launch, so that a window's rows come from
memory once and from the cache after that. The gradient goes on through rotation and norm in registers, and dqkv is
written once, where qkv lies. A block of dbias belongs to one program per chunk of windows, which are taken in order.

Keys are normed and turned by every block of queries that reads them, or once, by `prepare_kernel`: see PREPARE_FROM in
window_attention.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._common import load, store
from ._window_rows import (
    add_product,
    exp,
    extent,
    inner,
    length_of,
    load_angles,
    load_rows,
    locate,
    norm_backward,
    prepare,
    row_sums,
    scaled,
    store_dweight,
    store_rows,
    turn,
    zeros,
)

# A length of the grid is no reason to compile again. `w0` is: rows of the bias are aligned or not.
LENGTHS = ["tokens", "n0", "n1", "n2", "s0", "s1", "s2"]


@triton.jit
def _operand(qk, offset, token, valid, weight, cos, sin, eps, PREPARED: tl.constexpr, FORM: tl.constexpr):
    """Rows of q or k as they are multiplied, read from where they were prepared, or prepared here."""
    rows = load_rows(qk, offset, valid, FORM.qk)
    if not PREPARED:
        angles = load_angles(cos, sin, token, valid, FORM)
        rows = prepare(rows, weight, angles, eps, FORM)
    return rows


@triton.jit
def _load_bias(bias, head, q_place, k_place, length):
    """``bias[head, q, k]`` in fp32; one of the places is [n, 1], the other [1, n]."""
    at = (head.to(tl.int64) * length + q_place) * length + k_place
    return load(bias + at, (q_place < length) & (k_place < length))


@triton.jit
def _load_softmax(softmax, delta, at, valid):
    """What is kept of each query: maximum, 1 / sum, delta; such that a query that is not there weighs nothing."""
    greatest = tl.load(softmax + 2 * at, mask=valid, other=float("inf"))
    total = tl.load(softmax + 2 * at + 1, mask=valid, other=1.0)
    return greatest, tl.div_rn(1.0, total), tl.load(delta + at, mask=valid, other=0.0)


@triton.jit(do_not_specialize=["rows", "tokens"])
def prepare_kernel(
    qkv, qk, q_weight, k_weight, cos, sin, rows, tokens, heads, eps, FORM: tl.constexpr, BLOCK: tl.constexpr
):
    """qk [B, N, 2, heads, head_dim]: q and k, normed and turned. A program takes BLOCK tokens of a head."""
    head = tl.program_id(0) % heads
    row = tl.program_id(0) // heads * BLOCK + tl.arange(0, BLOCK)
    valid = row < rows
    angles = load_angles(cos, sin, row % tokens, valid, FORM)
    step = heads * FORM.head_dim
    if q_weight is not None:
        q_weight += head * FORM.q_step
    if k_weight is not None:
        k_weight += head * FORM.k_step
    weights = (q_weight, k_weight)
    for part in tl.static_range(2):
        first = part * step + head * FORM.head_dim
        x = load_rows(qkv + first, row.to(tl.int64) * (3 * step), valid, FORM.qk)
        x = prepare(x, weights[part], angles, eps, FORM)
        store_rows(qk + first, row.to(tl.int64) * (2 * step), valid, x, FORM.qk)


@triton.jit(do_not_specialize=LENGTHS)
def forward_kernel(
    qk, qkv, out, softmax, q_weight, k_weight, cos, sin, bias, tokens, heads, n0, n1, n2, s0, s1, s2, w0, scale, eps,
    PREPARED: tl.constexpr, FORM: tl.constexpr, BLOCK: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    box = (n0, n1, n2, s0, s1, s2, w0)
    length = length_of(w0, FORM.window)
    blocks = tl.cdiv(length, BLOCK)
    first = tl.program_id(0) % blocks * BLOCK
    head = tl.program_id(0) // blocks % heads
    item = tl.program_id(0) // blocks // heads
    keys = extent(item, box, FORM.window)
    keys = tl.where(first < keys, keys, 0)
    step = heads * FORM.head_dim
    qk_step = step * (2 if PREPARED else 3)
    qk += head * FORM.head_dim
    v_rows = qkv + 2 * step + head * FORM.head_dim
    if q_weight is not None:
        q_weight += head * FORM.q_step
    if k_weight is not None:
        k_weight += head * FORM.k_step

    q_place = first + tl.arange(0, BLOCK)
    sample, q_token, q_valid = locate(item, q_place, box, FORM.window)
    start_row = sample.to(tl.int64) * tokens
    q_row = start_row + q_token
    q = _operand(qk, q_row * qk_step, q_token, q_valid, q_weight, cos, sin, eps, PREPARED, FORM)
    greatest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    acc = zeros(BLOCK, FORM.v)
    for start in range(0, keys, INNER):
        k_place = start + tl.arange(0, INNER)
        _, k_token, k_valid = locate(item, k_place, box, FORM.window)
        k_row = start_row + k_token
        k = _operand(qk + step, k_row * qk_step, k_token, k_valid, k_weight, cos, sin, eps, PREPARED, FORM)
        v = load_rows(v_rows, k_row * (3 * step), k_valid, FORM.v)
        s = inner(q, k, FORM) * scale
        if bias is not None:
            s += _load_bias(bias, head, q_place[:, None], k_place[None, :], length)
        s = tl.where(k_valid[None, :], s, float("-inf"))
        top = tl.maximum(greatest, tl.max(s, 1))
        # The bias may have masked all keys of a query so far.
        shift = tl.where(top == float("-inf"), 0.0, top)
        shrink = exp(greatest - shift)
        p = exp(s - shift[:, None])
        total = total * shrink + tl.sum(p, 1)
        acc = add_product(scaled(acc, shrink[:, None]), p, v, FORM)
        greatest = top
    store_rows(out + head * FORM.head_dim, q_row * step, q_valid, scaled(acc, tl.div_rn(1.0, total)[:, None]), FORM.v)
    pair = (q_row * heads + head)[:, None] * 2 + tl.arange(0, 2)[None, :]
    tl.store(softmax + pair, tl.join(greatest, total), mask=q_valid[:, None])


@triton.jit(do_not_specialize=["rows"])
def delta_kernel(dout, out, delta, rows, FORM: tl.constexpr, BLOCK: tl.constexpr):
    """rowsum(dout * out), for every token and head."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    at = row * FORM.head_dim
    d, o = load_rows(dout, at, row < rows, FORM.v), load_rows(out, at, row < rows, FORM.v)
    tl.store(delta + row, row_sums(d, o), mask=row < rows)


@triton.jit(do_not_specialize=LENGTHS)
def backward_kernel(
    qk, qkv, dout, softmax, delta, dqkv, dq_partial, dk_partial, q_weight, k_weight, cos, sin, bias, tokens, heads,
    n0, n1, n2, s0, s1, s2, w0, scale, eps,
    PREPARED: tl.constexpr, FORM: tl.constexpr, BLOCK: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    box = (n0, n1, n2, s0, s1, s2, w0)
    length = length_of(w0, FORM.window)
    blocks = tl.cdiv(length, BLOCK)
    first = tl.program_id(0) % blocks * BLOCK
    head = tl.program_id(0) // blocks % heads
    item = tl.program_id(0) // blocks // heads
    last = extent(item, box, FORM.window)
    last = tl.where(first < last, last, 0)
    step = heads * FORM.head_dim
    qk_step = step * (2 if PREPARED else 3)
    qk += head * FORM.head_dim
    qkv += head * FORM.head_dim
    dqkv += head * FORM.head_dim
    dout += head * FORM.head_dim
    if q_weight is not None:
        q_weight += head * FORM.q_step
    if k_weight is not None:
        k_weight += head * FORM.k_step
    # Partial sums of a weight are laid out [item, block, head, head_dim].
    partial = (item * blocks + tl.program_id(0) % blocks) * heads + head

    place = first + tl.arange(0, BLOCK)
    sample, token, valid = locate(item, place, box, FORM.window)
    start_row = sample.to(tl.int64) * tokens
    row = start_row + token

    # The block as queries.
    q = _operand(qk, row * qk_step, token, valid, q_weight, cos, sin, eps, PREPARED, FORM)
    d = load_rows(dout, row * step, valid, FORM.v)
    top, inverse, delta_ = _load_softmax(softmax, delta, row * heads + head, valid)
    dq = zeros(BLOCK, FORM.qk)
    for start in range(0, last, INNER):
        k_place = start + tl.arange(0, INNER)
        _, k_token, k_valid = locate(item, k_place, box, FORM.window)
        k_row = start_row + k_token
        k = _operand(qk + step, k_row * qk_step, k_token, k_valid, k_weight, cos, sin, eps, PREPARED, FORM)
        v = load_rows(qkv + 2 * step, k_row * (3 * step), k_valid, FORM.v)
        s = inner(q, k, FORM) * scale
        if bias is not None:
            s += _load_bias(bias, head, place[:, None], k_place[None, :], length)
        s = tl.where(k_valid[None, :], s, float("-inf"))
        p = exp(s - top[:, None]) * inverse[:, None]
        dq = add_product(dq, p * (inner(d, v, FORM) - delta_[:, None]), k, FORM)
    dq = turn(dq, load_angles(cos, sin, token, valid, FORM), FORM.interleaved, True)
    dq, dweight = norm_backward(dq, scale, load_rows(qkv, row * (3 * step), valid, FORM.qk), q_weight, eps, FORM)
    store_rows(dqkv, row * (3 * step), valid, dq, FORM.qk)
    store_dweight(dq_partial, partial, dweight, FORM)

    # The block as keys; scores are [keys, queries].
    k = _operand(qk + step, row * qk_step, token, valid, k_weight, cos, sin, eps, PREPARED, FORM)
    v = load_rows(qkv + 2 * step, row * (3 * step), valid, FORM.v)
    dk = zeros(BLOCK, FORM.qk)
    dv = zeros(BLOCK, FORM.v)
    for start in range(0, last, INNER):
        q_place = start + tl.arange(0, INNER)
        _, q_token, q_valid = locate(item, q_place, box, FORM.window)
        q_row = start_row + q_token
        qs = _operand(qk, q_row * qk_step, q_token, q_valid, q_weight, cos, sin, eps, PREPARED, FORM)
        ds = load_rows(dout, q_row * step, q_valid, FORM.v)
        tops, inverses, deltas = _load_softmax(softmax, delta, q_row * heads + head, q_valid)
        s = inner(k, qs, FORM) * scale
        if bias is not None:
            s += _load_bias(bias, head, q_place[None, :], place[:, None], length)
        p = exp(s - tops[None, :]) * inverses[None, :]
        dv = add_product(dv, p, ds, FORM)
        dk = add_product(dk, p * (inner(v, ds, FORM) - deltas[None, :]), qs, FORM)
    store_rows(dqkv + 2 * step, row * (3 * step), valid, dv, FORM.v)
    dk = turn(dk, load_angles(cos, sin, token, valid, FORM), FORM.interleaved, True)
    dk, dweight = norm_backward(dk, scale, load_rows(qkv + step, row * (3 * step), valid, FORM.qk), k_weight, eps, FORM)
    store_rows(dqkv + step, row * (3 * step), valid, dk, FORM.qk)
    store_dweight(dk_partial, partial, dweight, FORM)


@triton.jit(do_not_specialize=[*LENGTHS, "items", "chunks"])
def dbias_kernel(
    qk, qkv, dout, softmax, delta, dbias, q_weight, k_weight, cos, sin, bias, items, chunks, tokens, heads,
    n0, n1, n2, s0, s1, s2, w0, scale, eps,
    PREPARED: tl.constexpr, FORM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dbias [chunks, heads, L, L]: a program adds up a block of a head over the windows of a chunk."""
    box = (n0, n1, n2, s0, s1, s2, w0)
    length = length_of(w0, FORM.window)
    blocks = tl.cdiv(length, BLOCK)
    k_place = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    q_place = tl.program_id(0) // blocks % blocks * BLOCK + tl.arange(0, BLOCK)
    head = tl.program_id(0) // blocks // blocks % heads
    chunk = (tl.program_id(0) // blocks // blocks // heads).to(tl.int64)
    step = heads * FORM.head_dim
    qk_step = step * (2 if PREPARED else 3)
    qk += head * FORM.head_dim
    qkv += head * FORM.head_dim
    dout += head * FORM.head_dim
    if q_weight is not None:
        q_weight += head * FORM.q_step
    if k_weight is not None:
        k_weight += head * FORM.k_step
    pair = _load_bias(bias, head, q_place[:, None], k_place[None, :], length)
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    for item in range((chunk * items // chunks).to(tl.int32), ((chunk + 1) * items // chunks).to(tl.int32)):
        sample, q_token, q_valid = locate(item, q_place, box, FORM.window)
        _, k_token, k_valid = locate(item, k_place, box, FORM.window)
        q_row = sample.to(tl.int64) * tokens + q_token
        k_row = sample.to(tl.int64) * tokens + k_token
        q = _operand(qk, q_row * qk_step, q_token, q_valid, q_weight, cos, sin, eps, PREPARED, FORM)
        k = _operand(qk + step, k_row * qk_step, k_token, k_valid, k_weight, cos, sin, eps, PREPARED, FORM)
        top, inverse, delta_ = _load_softmax(softmax, delta, q_row * heads + head, q_valid)
        p = exp(inner(q, k, FORM) * scale + pair - top[:, None]) * inverse[:, None]
        d = load_rows(dout, q_row * step, q_valid, FORM.v)
        v = load_rows(qkv + 2 * step, k_row * (3 * step), k_valid, FORM.v)
        ds = p * (inner(d, v, FORM) - delta_[:, None])
        total += tl.where(q_valid[:, None] & k_valid[None, :], ds, 0.0)
    at = ((chunk * heads + head) * length + q_place[:, None]) * length + k_place[None, :]
    here = (q_place < length)[:, None] & (k_place < length)[None, :]
    store(dbias + at, total, here)
