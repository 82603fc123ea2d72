"""What the kernels of attention share: where a window's tokens lie, rows of one head, norm and rotation.

A row, the head_dim channels of one head of a token, is held as a tuple of pieces whose widths are powers of two, as
Triton's tensors must be: 72 channels take 64 + 16, where one tensor would take 128. A product over channels is the sum
over pieces, and a sum over tokens has a result per piece. A piece is ``(first, width, end)``: channels ``first + j``
for ``j < width``, of which those from ``end`` on are padding, read as zero and never written.

The pieces of q and k follow the rotation, so that the two channels of a pair meet in one thread, in the layouts of
loads and of products alike: "interleaved" pairs are neighbours inside a piece, and for "half" the two halves of
head_dim are cut alike, which pairs piece i with piece i + n/2. Hence a rotation takes no shuffle and no second load, in
both directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl

from ._common import cast, dot, inverse_root, load, store

Piece = tuple[int, int, int]
Triple = tuple[int, int, int]


class Form(NamedTuple):
    """What kernels are compiled for, and get as ``constants``; nothing here follows from the number of tokens."""

    window: tuple[int, ...]  # sizes of a window on all axes but the outermost, see `boxes`
    norm: int
    interleaved: bool
    head_dim: int
    qk: tuple[Piece, ...]
    v: tuple[Piece, ...]
    precision: str  # of products, see `precision_of`
    q_step: int  # from the norm's weight of one head to the next
    k_step: int


class Boxes(NamedTuple):
    """Windows on up to three axes of tokens: (places, stride in tokens, places in a window), innermost first."""

    axes: list[Triple]

    @property
    def windows(self) -> int:
        """Windows of a sample."""
        total = 1
        for size, _, width in self.axes:
            total *= -(-size // width)
        return total

    @property
    def length(self) -> int:
        """Places in a window."""
        total = 1
        for _, _, width in self.axes:
            total *= width
        return total

    @property
    def inner(self) -> tuple[int, ...]:
        return tuple(width for _, _, width in self.axes[:-1])

    @property
    def arguments(self) -> tuple[int, ...]:
        """For a kernel: sizes and strides of the axes, and the size of a window on the outermost."""
        sizes, strides, widths = zip(*(self.axes + [(1, 0, 1)] * (3 - len(self.axes))), strict=True)
        return (*sizes, *strides, widths[len(self.axes) - 1])


def boxes(grid: Sequence[int], window: Sequence[int]) -> Boxes:
    """The windows of a grid on as few axes as describe them.

    Neighbouring axes are joined where the window spans the inner one, or where the outer one is cut into single places
    and the inner one into whole windows: spatial and joint windows then lie on one axis of tokens, as temporal ones do.
    Axes that are cut into single places go innermost; the order of places in a window stays. Kernels are compiled for
    the windows' sizes on all axes but the outermost, to divide by constants: one kernel serves any length of these.
    """
    axes: list[Triple] = []
    stride = 1
    for size, width in zip(reversed(grid), reversed(window), strict=True):
        n, step, w = axes[-1] if axes else (1, stride, 1)
        if n == w:
            axes[-1:] = [(size * n, step, width * w)]
        elif width == 1 and (size == 1 or n % w == 0):
            axes[-1:] = [(size * n, step, w)]
        else:
            axes.append((size, stride, width))
        stride *= size
    return Boxes(sorted(axes, key=lambda axis: axis[2] > 1))


def narrow_pieces(first: int, end: int, width: int) -> tuple[Piece, ...]:
    """Channels ``[first, end)`` in pieces of ``width``: 16, the least that tensor cores multiply, or a little more.

    All have one layout, so sums over a row meet without exchange between layouts.
    """
    return tuple((start, width, min(start + width, end)) for start in range(first, end, width))


def wide_pieces(first: int, end: int) -> tuple[Piece, ...]:
    """Channels ``[first, end)`` in at most two pieces, for long products."""
    width = end - first
    wide = max(16, 1 << (width.bit_length() - 1))
    if width <= wide:
        return ((first, wide, end),)
    narrow = max(16, triton.next_power_of_2(width - wide))
    if narrow >= wide:
        return ((first, 2 * wide, end),)
    return ((first, wide, first + wide), (first + wide, narrow, end))


_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def exp(x):
    """e^x by the one instruction there is, without tl.exp's care for results below the smallest normal number."""
    return tl.exp2(x * _LOG2E)


@triton.jit
def length_of(w0, WINDOW: tl.constexpr):
    """Places in a window."""
    length = w0
    for i in tl.static_range(len(WINDOW)):
        length *= WINDOW[i]
    return length


@triton.jit
def locate(item, place, box, WINDOW: tl.constexpr):
    """Place ``place`` of window ``item``, counted over all samples: the sample, the token, and whether there is one.

    A window at the far edge keeps the places of a whole one, some of them empty: those that are left keep their bias.
    """
    token = place * 0
    inside = place >= 0
    for i in tl.static_range(len(WINDOW)):
        windows = tl.cdiv(box[i], WINDOW[i])
        x = item % windows * WINDOW[i] + place % WINDOW[i]
        token += x * box[3 + i]
        inside &= x < box[i]
        item //= windows
        place //= WINDOW[i]
    size, stride, width = box[len(WINDOW)], box[3 + len(WINDOW)], box[6]
    windows = tl.cdiv(size, width)
    x = item % windows * width + place
    return item // windows, token + x * stride, inside & (place < width) & (x < size)


@triton.jit
def extent(item, box, WINDOW: tl.constexpr):
    """One more than the last place of window ``item`` that holds a token."""
    last = item * 0
    step = 1
    for i in tl.static_range(len(WINDOW)):
        windows = tl.cdiv(box[i], WINDOW[i])
        last += (tl.minimum(WINDOW[i], box[i] - item % windows * WINDOW[i]) - 1) * step
        step *= WINDOW[i]
        item //= windows
    size, width = box[len(WINDOW)], box[6]
    first = item % tl.cdiv(size, width) * width
    return last + (tl.minimum(width, size - first) - 1) * step + 1


@triton.jit
def columns(PIECE: tl.constexpr):
    return PIECE[0] + tl.arange(0, PIECE[1])


@triton.jit
def channels(valid, PIECE: tl.constexpr):
    """Which channels of a piece are to be read or written, of rows that are ``valid`` [rows, 1]."""
    here = valid
    if PIECE[0] + PIECE[1] > PIECE[2]:
        here = valid & (columns(PIECE) < PIECE[2])[None, :]
    return here


@triton.jit
def load_rows(pointer, offset, valid, PIECES: tl.constexpr):
    """Rows at ``offset`` (64-bit), zero where not ``valid``."""
    rows = ()
    for i in tl.static_range(len(PIECES)):
        at = pointer + offset[:, None] + columns(PIECES[i])[None, :]
        rows += (tl.load(at, mask=channels(valid[:, None], PIECES[i]), other=0.0),)
    return rows


@triton.jit
def store_rows(pointer, offset, valid, rows, PIECES: tl.constexpr):
    for i in tl.static_range(len(PIECES)):
        at = pointer + offset[:, None] + columns(PIECES[i])[None, :]
        store(at, rows[i], channels(valid[:, None], PIECES[i]))


@triton.jit
def zeros(ROWS: tl.constexpr, PIECES: tl.constexpr):
    rows = ()
    for i in tl.static_range(len(PIECES)):
        rows += (tl.zeros([ROWS, PIECES[i][1]], tl.float32),)
    return rows


@triton.jit
def scaled(rows, factor):
    return [row * factor for row in rows]


@triton.jit
def products(a, b):
    """``a * b``, piece by piece."""
    result = ()
    for i in tl.static_range(len(a)):
        result += (a[i] * b[i],)
    return result


@triton.jit
def sums(a, b):
    """``a + b``, piece by piece."""
    result = ()
    for i in tl.static_range(len(a)):
        result += (a[i] + b[i],)
    return result


@triton.jit
def totals(rows):
    """The sum of each row."""
    if rows[0].shape == rows[len(rows) - 1].shape:
        total = rows[0]
        for i in tl.static_range(1, len(rows)):
            total += rows[i]
        result = tl.sum(total, 1)
    else:
        result = tl.sum(rows[0], 1)
        for i in tl.static_range(1, len(rows)):
            result += tl.sum(rows[i], 1)
    return result


@triton.jit
def column_sums(rows):
    """The sum of all rows, [1, width] a piece."""
    result = ()
    for i in tl.static_range(len(rows)):
        result += (tl.sum(rows[i], 0)[None, :],)
    return result


@triton.jit
def row_sums(a, b):
    """``rowsum(a * b)`` in fp32."""
    result = ()
    for i in tl.static_range(len(a)):
        result += (a[i].to(tl.float32) * b[i].to(tl.float32),)
    return totals(result)


@triton.jit
def inner(a, b, FORM: tl.constexpr):
    """``a b^T``: every row of a with every row of b, fp32."""
    total = tl.zeros([a[0].shape[0], b[0].shape[0]], tl.float32)
    for i in tl.static_range(len(a)):
        total = dot(a[i], tl.trans(b[i]), total, FORM.precision)
    return total


@triton.jit
def add_product(total, a, rows, FORM: tl.constexpr):
    """``total + a rows``, fp32; a is rounded to the dtype of the rows."""
    result = ()
    for i in tl.static_range(len(rows)):
        result += (dot(cast(a, rows[i].dtype), rows[i], total[i], FORM.precision),)
    return result


@triton.jit
def load_weight(pointer, PIECES: tl.constexpr):
    """The weight of a norm in fp32, [1, width] a piece."""
    vectors = ()
    for i in tl.static_range(len(PIECES)):
        column = columns(PIECES[i])
        vectors += (load(pointer + column, column < PIECES[i][2])[None, :],)
    return vectors


@triton.jit
def load_angles(cos, sin, token, valid, FORM: tl.constexpr):
    """Rows of the rotary tables [N, head_dim / 2], cut as the pairs are: cos and sin in turn; or nothing."""
    angles = ()
    if cos is not None:
        row = token.to(tl.int64) * (FORM.head_dim // 2)
        pair: tl.constexpr = 2 if FORM.interleaved else 1
        for i in tl.static_range(len(FORM.qk) if FORM.interleaved else len(FORM.qk) // 2):
            column = FORM.qk[i][0] // pair + tl.arange(0, FORM.qk[i][1] // pair)
            here = valid[:, None] & (column < FORM.qk[i][2] // pair)[None, :]
            at = row[:, None] + column[None, :]
            angles += (tl.load(cos + at, mask=here, other=0.0), tl.load(sin + at, mask=here, other=0.0))
    return angles


@triton.jit
def turn(rows, angles, INTERLEAVED: tl.constexpr, BACK: tl.constexpr):
    """The rotation of every pair of channels, if there are angles; BACK: by the opposite ones."""
    result = rows
    if len(angles) > 0:
        result = ()
        second = ()
        for i in tl.static_range(len(angles) // 2):
            cos, sin = angles[2 * i], angles[2 * i + 1]
            if BACK:
                sin = -sin
            if INTERLEAVED:
                a, b = rows[i].reshape(rows[i].shape[0], rows[i].shape[1] // 2, 2).split()
                result += (tl.join(a * cos - b * sin, a * sin + b * cos).reshape(rows[i].shape),)
            else:
                a, b = rows[i], rows[i + len(rows) // 2]
                result += (a * cos - b * sin,)
                second += (a * sin + b * cos,)
        result += second
    return result


@triton.jit
def paired(rows, PAIRED: tl.constexpr, FORM: tl.constexpr):
    """Rows of "half" for a product: the two channels of a pair are neighbours, in pieces of twice the width.

    The rotation then ends with an exchange between threads. Without one Triton turns the rows of large tiles in the
    layout of the product, where several warps hold each row, and spills up to 4 KB per thread.
    """
    result = rows
    if PAIRED and not FORM.interleaved:
        result = ()
        for i in tl.static_range(len(rows) // 2):
            a, b = rows[i], rows[i + len(rows) // 2]
            result += (tl.join(a, b).reshape(a.shape[0], 2 * a.shape[1]),)
    return result


@triton.jit
def unpaired(rows, PAIRED: tl.constexpr, FORM: tl.constexpr):
    """The reverse of `paired`."""
    result = rows
    if PAIRED and not FORM.interleaved:
        result = ()
        second = ()
        for i in tl.static_range(len(rows)):
            a, b = rows[i].reshape(rows[i].shape[0], rows[i].shape[1] // 2, 2).split()
            result += (a,)
            second += (b,)
        result += second
    return result


@triton.jit
def centred(rows, known, FORM: tl.constexpr):
    """The rows in fp32, for norm 2 (layer) less their means."""
    result = ()
    for i in tl.static_range(len(rows)):
        x = rows[i].to(tl.float32)
        if FORM.norm == 2:
            x -= known[0]
            if FORM.qk[i][0] + FORM.qk[i][1] > FORM.qk[i][2]:  # padding stays zero
                x = tl.where((columns(FORM.qk[i]) < FORM.qk[i][2])[None, :], x, 0.0)
        result += (x,)
    return result


@triton.jit
def moments(rows, eps, FORM: tl.constexpr):
    """What the norm needs to know of each row, [rows, 1] in fp32: its mean for norm 2 (layer), and 1 / the root mean
    square of what is left. Without a norm it is nothing.
    """
    known = ()
    if FORM.norm == 2:
        known += (tl.div_rn(totals([row.to(tl.float32) for row in rows]), FORM.head_dim)[:, None],)
    if FORM.norm != 0:
        x = centred(rows, known, FORM)
        known += (inverse_root(tl.div_rn(row_sums(x, x), FORM.head_dim) + eps)[:, None],)
    return known


@triton.jit
def prepare(rows, known, weight, angles, FORM: tl.constexpr):
    """Rows of q or k, given their `moments`, as they are multiplied: ``rotate(norm(x) * weight)``, rounded once."""
    result = rows
    if FORM.norm != 0:
        result = scaled(centred(rows, known, FORM), known[FORM.norm - 1])
        if weight is not None:
            result = products(result, load_weight(weight, FORM.qk))
    result = turn(result, angles, FORM.interleaved, False)
    return [cast(row, rows[0].dtype) for row in result]


@triton.jit
def norm_backward(grad, scale, rows, known, weight, FORM: tl.constexpr):
    """The gradient of rows, given their `moments` and ``scale * grad`` of ``norm(rows) * weight``; and of the weight,
    row by row.

    With x the rows less their means, h = x * rstd, dh = grad * weight, it is rstd * (dh - mean(dh) - h * mean(dh * h)).
    """
    dweight = ()
    if FORM.norm == 0:
        grad = scaled(grad, scale)
    else:
        x, rstd = centred(rows, known, FORM), known[FORM.norm - 1]
        grad = scaled(grad, rstd * scale)
        if weight is not None:
            dweight = products(grad, x)
            grad = products(grad, load_weight(weight, FORM.qk))
        along = tl.div_rn(row_sums(grad, x)[:, None] * rstd * rstd, FORM.head_dim)
        if FORM.norm == 2:
            mean = tl.div_rn(totals(grad), FORM.head_dim)[:, None]
        dx = ()
        for i in tl.static_range(len(rows)):
            rest = grad[i] - x[i] * along
            if FORM.norm == 2:
                rest -= mean
            dx += (rest,)
        grad = dx
    return grad, dweight


@triton.jit
def store_dweight(pointer, row, dweight, FORM: tl.constexpr):
    """Row ``row`` of the partial sums [rows, head_dim] of a weight's gradient, if there are any: the sum over the rows
    of dweight.
    """
    if pointer is not None:
        dweight = column_sums(dweight)
        for i in tl.static_range(len(dweight)):
            column = columns(FORM.qk[i])[None, :]
            tl.store(pointer + row.to(tl.int64) * FORM.head_dim + column, dweight[i], mask=column < FORM.qk[i][2])
