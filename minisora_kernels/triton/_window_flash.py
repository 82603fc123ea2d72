"""window_attention for windows of any length: blocks of queries against blocks of keys (FlashAttention-2, Dao 2023).

Forward: a program takes a block of queries of one window and head through the window's keys, with an online softmax.
Backward: one launch takes blocks of queries (dq), a second one blocks of keys (dk, dv). Both make the scores again, so
that nothing is added up across programs. The first leaves what the second needs of each query, side by side. The
gradient goes on through rotation and norm in registers, and dqkv is written once, where qkv lies. A chunk of windows
adds its part of dbias up in memory, in order, while it makes dq: a program reads and writes what no other does, and the
L2 cache holds the parts of windows of 320 tokens.

Keys are normed and turned by every block of queries that reads them, or once, by `prepare_kernel`: see PREPARE_FROM in
window_attention.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._common import load
from ._window_rows import (
    add_product,
    exp,
    extent,
    inner,
    length_of,
    load_angles,
    load_rows,
    locate,
    moments,
    norm_backward,
    paired,
    prepare,
    row_sums,
    scaled,
    store_dweight,
    store_rows,
    turn,
    unpaired,
    zeros,
)

# A length of the grid is no reason to compile again. `w0` is: rows of the bias are aligned or not.
LENGTHS = ["tokens", "n0", "n1", "n2", "s0", "s1", "s2"]


@triton.jit
def _operand(
    qk, offset, token, valid, weight, cos, sin, eps, PREPARED: tl.constexpr, PAIRED: tl.constexpr, FORM: tl.constexpr
):
    """Rows of q or k as they are multiplied, read from where they were prepared, or prepared here."""
    rows = load_rows(qk, offset, valid, FORM.qk)
    if not PREPARED:
        angles = load_angles(cos, sin, token, valid, FORM)
        rows = paired(prepare(rows, moments(rows, eps, FORM), weight, angles, FORM), PAIRED, FORM)
    return rows


@triton.jit
def _turned_back(grad, cos, sin, token, valid, PREPARED: tl.constexpr, FORM: tl.constexpr):
    """The gradient of an operand before its rotation."""
    grad = unpaired(grad, not PREPARED, FORM)
    return turn(grad, load_angles(cos, sin, token, valid, FORM), FORM.interleaved, True)


@triton.jit
def _zeros_like(rows):
    """Zeros for the gradient of an operand."""
    result = ()
    for i in tl.static_range(len(rows)):
        result += (tl.zeros(rows[i].shape, tl.float32),)
    return result


@triton.jit
def _pairs(pointer, matrix, q_first, q, k_first, k, length):
    """Where places q and k, counted from the first ones, meet in a matrix of a tensor [.., L, L], and if they do.

    One of them is [n, 1], the other [1, n]. What is the same for all is added to the pointer.
    """
    first = (matrix.to(tl.int64) * length + q_first) * length + k_first
    return pointer + first + (q * length + k), (q_first + q < length) & (k_first + k < length)


@triton.jit
def _load_bias(bias, head, q_first, q, k_first, k, length):
    at, here = _pairs(bias, head, q_first, q, k_first, k, length)
    return load(at, here)


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
        x = prepare(x, moments(x, eps, FORM), weights[part], angles, FORM)
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

    rows, columns = tl.arange(0, BLOCK), tl.arange(0, INNER)
    sample, q_token, q_valid = locate(item, first + rows, box, FORM.window)
    start_row = sample.to(tl.int64) * tokens
    q_row = start_row + q_token
    q = _operand(qk, q_row * qk_step, q_token, q_valid, q_weight, cos, sin, eps, PREPARED, False, FORM)
    greatest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    acc = zeros(BLOCK, FORM.v)
    for start in range(0, keys, INNER):
        _, k_token, k_valid = locate(item, start + columns, box, FORM.window)
        k_row = start_row + k_token
        k = _operand(qk + step, k_row * qk_step, k_token, k_valid, k_weight, cos, sin, eps, PREPARED, False, FORM)
        v = load_rows(v_rows, k_row * (3 * step), k_valid, FORM.v)
        s = inner(q, k, FORM) * scale
        if bias is not None:
            s += _load_bias(bias, head, first, rows[:, None], start, columns[None, :], length)
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


@triton.jit(do_not_specialize=[*LENGTHS, "items", "chunks"])
def query_kernel(
    qk, qkv, dout, out, softmax, kept, dqkv, dq_partial, dbias, q_weight, k_weight, cos, sin, bias, items, chunks,
    tokens, heads, n0, n1, n2, s0, s1, s2, w0, scale, eps,
    PREPARED: tl.constexpr, FORM: tl.constexpr, BLOCK: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """dq; what is kept of each query, [B, heads, 3, N]: maximum, 1 / sum and rowsum(dout * out); and dbias
    [chunks, heads, L, L]. A program takes a block of a head in the windows of a chunk, one after the other.
    """
    box = (n0, n1, n2, s0, s1, s2, w0)
    length = length_of(w0, FORM.window)
    blocks = tl.cdiv(length, BLOCK)
    first = tl.program_id(0) % blocks * BLOCK
    head = tl.program_id(0) // blocks % heads
    chunk = (tl.program_id(0) // blocks // heads).to(tl.int64)
    step = heads * FORM.head_dim
    qk_step = step * (2 if PREPARED else 3)
    qk += head * FORM.head_dim
    qkv += head * FORM.head_dim
    if q_weight is not None:
        q_weight += head * FORM.q_step
    if k_weight is not None:
        k_weight += head * FORM.k_step
    rows, columns = tl.arange(0, BLOCK), tl.arange(0, INNER)
    begin = (chunk * items // chunks).to(tl.int32)
    for item in range(begin, ((chunk + 1) * items // chunks).to(tl.int32)):
        keys = extent(item, box, FORM.window)
        keys = tl.where(first < keys, keys, 0)
        sample, token, valid = locate(item, first + rows, box, FORM.window)
        start_row = sample.to(tl.int64) * tokens
        row = start_row + token
        at = row * step + head * FORM.head_dim
        d = load_rows(dout, at, valid, FORM.v)
        delta = row_sums(d, load_rows(out, at, valid, FORM.v))
        pair = softmax + 2 * (row * heads + head)
        top = tl.load(pair, mask=valid, other=float("inf"))  # a query that is not there weighs nothing
        inverse = tl.div_rn(1.0, tl.load(pair + 1, mask=valid, other=1.0))
        of_head = (sample.to(tl.int64) * heads + head) * 3 * tokens
        tl.store(kept + (of_head + token), top, mask=valid)
        tl.store(kept + (of_head + tokens + token), inverse, mask=valid)
        tl.store(kept + (of_head + 2 * tokens + token), delta, mask=valid)
        q = _operand(qk, row * qk_step, token, valid, q_weight, cos, sin, eps, PREPARED, True, FORM)
        dq = _zeros_like(q)
        written = tl.where(item > begin, INNER, 0)  # of dbias, by the windows before
        # A partial sum of dbias has places that this window may have none for.
        for start in range(0, keys if dbias is None else length, INNER):
            _, k_token, k_valid = locate(item, start + columns, box, FORM.window)
            k_row = start_row + k_token
            k = _operand(qk + step, k_row * qk_step, k_token, k_valid, k_weight, cos, sin, eps, PREPARED, True, FORM)
            v = load_rows(qkv + 2 * step, k_row * (3 * step), k_valid, FORM.v)
            s = inner(q, k, FORM) * scale
            if bias is not None:
                s += _load_bias(bias, head, first, rows[:, None], start, columns[None, :], length)
            s = tl.where(k_valid[None, :], s, float("-inf"))
            p = exp(s - top[:, None]) * inverse[:, None]
            ds = p * (inner(d, v, FORM) - delta[:, None])
            dq = add_product(dq, ds, k, FORM)
            if dbias is not None:
                matrix = chunk * heads + head
                part, here = _pairs(dbias, matrix, first, rows[:, None], start, columns[None, :], length)
                total = load(part, here & (columns < written)[None, :])
                tl.store(part, total + tl.where(valid[:, None] & k_valid[None, :], ds, 0.0), mask=here)
        dq = _turned_back(dq, cos, sin, token, valid, PREPARED, FORM)
        x = load_rows(qkv, row * (3 * step), valid, FORM.qk)
        dq, dweight = norm_backward(dq, scale, x, moments(x, eps, FORM), q_weight, FORM)
        store_rows(dqkv + head * FORM.head_dim, row * (3 * step), valid, dq, FORM.qk)
        # Partial sums of a weight are laid out [item, block, head, head_dim].
        store_dweight(dq_partial, (item * blocks + tl.program_id(0) % blocks) * heads + head, dweight, FORM)


@triton.jit(do_not_specialize=LENGTHS)
def key_kernel(
    qk, qkv, dout, kept, dqkv, dk_partial, q_weight, k_weight, cos, sin, bias, tokens, heads,
    n0, n1, n2, s0, s1, s2, w0, scale, eps,
    PREPARED: tl.constexpr, FORM: tl.constexpr, BLOCK: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """dk and dv of a block; scores are [keys, queries]."""
    box = (n0, n1, n2, s0, s1, s2, w0)
    length = length_of(w0, FORM.window)
    blocks = tl.cdiv(length, BLOCK)
    first = tl.program_id(0) % blocks * BLOCK
    head = tl.program_id(0) // blocks % heads
    item = tl.program_id(0) // blocks // heads
    queries = extent(item, box, FORM.window)
    queries = tl.where(first < queries, queries, 0)
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
    rows, columns = tl.arange(0, BLOCK), tl.arange(0, INNER)
    sample, token, valid = locate(item, first + rows, box, FORM.window)
    start_row = sample.to(tl.int64) * tokens
    row = start_row + token
    of_head = (sample.to(tl.int64) * heads + head) * 3 * tokens
    k = _operand(qk + step, row * qk_step, token, valid, k_weight, cos, sin, eps, PREPARED, True, FORM)
    v = load_rows(qkv + 2 * step, row * (3 * step), valid, FORM.v)
    dk = _zeros_like(k)
    dv = zeros(BLOCK, FORM.v)
    for start in range(0, queries, INNER):
        _, q_token, q_valid = locate(item, start + columns, box, FORM.window)
        q_row = start_row + q_token
        q = _operand(qk, q_row * qk_step, q_token, q_valid, q_weight, cos, sin, eps, PREPARED, True, FORM)
        d = load_rows(dout, q_row * step, q_valid, FORM.v)
        # A query that is not there weighs nothing.
        top = tl.load(kept + (of_head + q_token), mask=q_valid, other=float("inf"))
        inverse = tl.load(kept + (of_head + tokens + q_token), mask=q_valid, other=0.0)
        delta = tl.load(kept + (of_head + 2 * tokens + q_token), mask=q_valid, other=0.0)
        s = inner(k, q, FORM) * scale
        if bias is not None:
            s += _load_bias(bias, head, start, columns[None, :], first, rows[:, None], length)
        p = exp(s - top[None, :]) * inverse[None, :]
        dv = add_product(dv, p, d, FORM)
        dk = add_product(dk, p * (inner(v, d, FORM) - delta[None, :]), q, FORM)
    store_rows(dqkv + 2 * step, row * (3 * step), valid, dv, FORM.v)
    dk = _turned_back(dk, cos, sin, token, valid, PREPARED, FORM)
    x = load_rows(qkv + step, row * (3 * step), valid, FORM.qk)
    dk, dweight = norm_backward(dk, scale, x, moments(x, eps, FORM), k_weight, FORM)
    store_rows(dqkv + step, row * (3 * step), valid, dk, FORM.qk)
    store_dweight(dk_partial, (item * blocks + tl.program_id(0) % blocks) * heads + head, dweight, FORM)
