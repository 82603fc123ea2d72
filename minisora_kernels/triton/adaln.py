"""adaln, and with a branch to add first, gate_residual_adaln: equations and derivations in minisora_kernels/ops.

Forward: a program takes some tokens, reads x (and the branch) once, keeps it in registers for the mean, the centred squares
and the result, and writes y (the residual) and the statistics once.

Backward: a program takes a run of tokens that share their rows of the modulation, and goes through them some at a time. It
reads every activation once, writes dx (dbranch) once, and adds up the gradients of the parameters in fp32 registers: with
P = sum dy and Q = sum dy * h over a run,

    dshift = P      dscale = weight * Q + bias * P      dweight = (1 + scale) * Q      dbias = (1 + scale) * P

of which each run leaves one row, for the second stage in _rows.py to add up. A parameter with a row a token needs no sum: the
gradient of its row is written with the token. Rows and samples only decide where runs begin, so batches and per-frame
modulation cost what one row costs.

Not run on a GPU yet.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._rows import (
    HELD,
    HELD_THREE_SUMS,
    HELD_TWO_SUMS,
    Runs,
    add,
    check_dense,
    chunks,
    columns,
    load,
    min_itemsize,
    padded,
    row_of,
    run_of,
    store_sum,
    strided,
    tile_of,
    tokens_from,
    tokens_per_row,
    zeros,
)


@triton.jit(do_not_specialize=["count", "tokens", "gate_tokens", "shift_tokens", "scale_tokens"])
def _fwd(
    x_ptr,
    branch_ptr,
    gate,
    shift,
    scale,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    eps,
    count,
    tokens,
    gate_tokens,
    shift_tokens,
    scale_tokens,
    RMS: tl.constexpr,
    tile: tl.constexpr,
):
    token = tokens_from(tl.program_id(0) * tile.rows, tile)
    live = token < count
    at = token.to(tl.int64) * tile.width
    sample = token // tokens
    place = token - sample * tokens

    xs = ()
    sums = tl.zeros([tile.rows, tile.lanes], tl.float32)
    for c in tl.static_range(chunks(tile)):
        column, mask = columns(live, tile, c)
        x = load(x_ptr + at + column, mask)
        if branch_ptr is not None:
            gate_value = load(row_of(gate, sample, place, gate_tokens) + column, mask)
            residual = (x + gate_value * load(branch_ptr + at + column, mask)).to(residual_ptr.dtype.element_ty)
            tl.store(residual_ptr + at + column, residual, mask)
            x = residual.to(tl.float32)
        xs = xs + (x,)
        sums += tl.sum(x, 2)
    if RMS:
        mean = tl.zeros([tile.rows, 1, 1], tl.float32)
    else:
        mean = tl.sum(sums, 1)[:, None, None] / tile.width

    sums = tl.zeros([tile.rows, tile.lanes], tl.float32)
    for c in tl.static_range(chunks(tile)):
        d = xs[c] - mean
        if padded(tile, c):
            column, mask = columns(live, tile, c)
            d = tl.where(mask, d, 0.0)
        sums += tl.sum(d * d, 2)
    rstd = tl.rsqrt(tl.sum(sums, 1)[:, None, None] / tile.width + eps)
    tl.store(mean_ptr + token, mean, live)
    tl.store(rstd_ptr + token, rstd, live)

    for c in tl.static_range(chunks(tile)):
        column, mask = columns(live, tile, c)
        y = (xs[c] - mean) * rstd
        if weight_ptr is not None:
            y *= load(weight_ptr + column, mask)
        if bias_ptr is not None:
            y += load(bias_ptr + column, mask)
        y *= 1 + load(row_of(scale, sample, place, scale_tokens) + column, mask)
        y += load(row_of(shift, sample, place, shift_tokens) + column, mask)
        tl.store(y_ptr + at + column, y, mask)


@triton.jit(do_not_specialize=["tokens", "row_tokens", "run_tokens", "gate_tokens", "scale_tokens"])
def _bwd(
    dresidual_ptr,
    dy_ptr,
    x_ptr,
    branch_ptr,
    gate,
    scale,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    dbranch_ptr,
    dgate_ptr,
    dshift_ptr,
    dscale_ptr,
    dweight_ptr,
    dbias_ptr,
    tokens,
    row_tokens,
    run_tokens,
    gate_tokens,
    scale_tokens,
    RMS: tl.constexpr,
    GATE_PER_TOKEN: tl.constexpr,
    SHIFT_PER_TOKEN: tl.constexpr,
    SCALE_PER_TOKEN: tl.constexpr,
    tile: tl.constexpr,
):
    begin, end, sample, place = run_of(tokens, row_tokens, run_tokens)
    if not SCALE_PER_TOKEN:
        scale_row = row_of(scale, sample, place, scale_tokens)
    if branch_ptr is not None and not GATE_PER_TOKEN:
        gate_row = row_of(gate, sample, place, gate_tokens)
    sum_dy = zeros(tile)
    sum_da = zeros(tile)
    sum_h = zeros(tile)  # of dy * h, or of da * h where every token has a scale of its own
    sum_gate = zeros(tile)

    for first in range(begin, end, tile.rows):
        token = tokens_from(first, tile)
        live = token < end
        at = token.to(tl.int64) * tile.width
        if SCALE_PER_TOKEN:
            scale_row = row_of(scale, sample, place + token - begin, 1)
        if branch_ptr is not None and GATE_PER_TOKEN:
            gate_row = row_of(gate, sample, place + token - begin, 1)
        rstd = tl.load(rstd_ptr + token, live, other=0.0)
        mean = tl.zeros([tile.rows, 1, 1], tl.float32)
        if not RMS:
            mean = tl.load(mean_ptr + token, live, other=0.0)

        hs = ()
        dhs = ()
        sum_dh = tl.zeros([tile.rows, tile.lanes], tl.float32)
        sum_dh_h = tl.zeros([tile.rows, tile.lanes], tl.float32)
        for c in tl.static_range(chunks(tile)):
            column, mask = columns(live, tile, c)
            dy = load(dy_ptr + at + column, mask)
            h = (load(x_ptr + at + column, mask) - mean) * rstd
            da = dy * (1 + load(scale_row + column, mask))
            dh = da
            a = h
            if weight_ptr is not None:
                weight = load(weight_ptr + column, mask)
                dh *= weight
                a *= weight
            if bias_ptr is not None:
                a += load(bias_ptr + column, mask)
            sum_dy = add(sum_dy, c, dy)
            if SHIFT_PER_TOKEN:
                tl.store(dshift_ptr + at + column, dy, mask)
            if SCALE_PER_TOKEN:
                tl.store(dscale_ptr + at + column, dy * a, mask)
                sum_da = add(sum_da, c, da)
                sum_h = add(sum_h, c, da * h)
            else:
                sum_h = add(sum_h, c, dy * h)
            hs = hs + (h,)  # noqa: RUF005
            dhs = dhs + (dh,)  # noqa: RUF005
            sum_dh += tl.sum(dh, 2)
            sum_dh_h += tl.sum(dh * h, 2)

        mean_dh = tl.sum(sum_dh, 1)[:, None, None] / tile.width
        mean_dh_h = tl.sum(sum_dh_h, 1)[:, None, None] / tile.width
        for c in tl.static_range(chunks(tile)):
            column, mask = columns(live, tile, c)
            dx = dhs[c] - hs[c] * mean_dh_h
            if not RMS:
                dx -= mean_dh
            dx *= rstd
            if branch_ptr is not None:
                dx += load(dresidual_ptr + at + column, mask)
                dgate = dx * load(branch_ptr + at + column, mask)
                if GATE_PER_TOKEN:
                    tl.store(dgate_ptr + at + column, dgate, mask)
                else:
                    sum_gate = add(sum_gate, c, dgate)
                tl.store(dbranch_ptr + at + column, dx * load(gate_row + column, mask), mask)
            tl.store(dx_ptr + at + column, dx, mask)

    for c in tl.static_range(chunks(tile)):
        column, mask = columns(True, tile, c)
        total = tl.sum(sum_dy[c], 0)[None]
        total_h = tl.sum(sum_h[c], 0)[None]
        if not SHIFT_PER_TOKEN:
            store_sum(dshift_ptr, total, tile, c)
        if SCALE_PER_TOKEN:
            total = tl.sum(sum_da[c], 0)[None]
        else:
            dscale = total_h
            if weight_ptr is not None:
                dscale *= load(weight_ptr + column, mask)
            if bias_ptr is not None:
                dscale += load(bias_ptr + column, mask) * total
            store_sum(dscale_ptr, dscale, tile, c)
            one_plus_scale = 1 + load(scale_row + column, mask)
            total *= one_plus_scale
            total_h *= one_plus_scale
        if dweight_ptr is not None:
            store_sum(dweight_ptr, total_h, tile, c)
        if dbias_ptr is not None:
            store_sum(dbias_ptr, total, tile, c)
        if branch_ptr is not None and not GATE_PER_TOKEN:
            store_sum(dgate_ptr, tl.sum(sum_gate[c], 0)[None], tile, c)


def forward(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    rms: bool,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """(residual, y, mean, rstd); no residual without a branch."""
    check_dense(x=x, branch=branch, weight=weight, bias=bias)
    batch, tokens, width = x.shape
    residual = None if branch is None else torch.empty_like(x)
    y = torch.empty_like(x, dtype=out_dtype)
    mean = x.new_empty((batch, tokens), dtype=torch.float32)
    rstd = torch.empty_like(mean)
    if x.numel():
        tile, warps = tile_of(width, min_itemsize(x, branch, y), HELD)
        _fwd[(triton.cdiv(batch * tokens, tile.rows),)](
            x,
            branch,
            strided("gate", gate),
            strided("shift", shift),
            strided("scale", scale),
            weight,
            bias,
            residual,
            y,
            mean,
            rstd,
            eps,
            batch * tokens,
            tokens,
            tokens_per_row(gate, tokens),
            tokens_per_row(shift, tokens),
            tokens_per_row(scale, tokens),
            rms,
            tile,
            num_warps=warps,
        )
    return residual, y, mean, rstd


def backward(
    dresidual: Tensor | None,
    dy: Tensor,
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    rms: bool,
) -> tuple[Tensor | None, ...]:
    """The gradients of x, branch, gate, shift, scale, weight and bias; ``x`` is what was normalised."""
    check_dense(dresidual=dresidual, dy=dy, x=x, branch=branch, weight=weight, bias=bias, mean=mean, rstd=rstd)
    batch, tokens, width = x.shape
    parameters = (gate, shift, scale, weight, bias)
    dx, dbranch, *gradients = (None if t is None else t.new_empty(t.shape) for t in (x, branch, *parameters))
    if x.numel() == 0:
        return dx, dbranch, *(None if gradient is None else gradient.zero_() for gradient in gradients)

    tile, warps = tile_of(width, min_itemsize(x, branch, dy), HELD_TWO_SUMS if branch is None else HELD_THREE_SUMS)
    runs = Runs(x, tile, gate, shift, scale)
    targets = [runs.target(gradient) for gradient in gradients]
    _bwd[(runs.count,)](
        dresidual,
        dy,
        x,
        branch,
        strided("gate", gate),
        strided("scale", scale),
        weight,
        bias,
        mean,
        rstd,
        dx,
        dbranch,
        *targets,
        tokens,
        runs.row_tokens,
        runs.run_tokens,
        tokens_per_row(gate, tokens),
        tokens_per_row(scale, tokens),
        rms,
        *(tokens_per_row(parameter, tokens) == 1 for parameter in (gate, shift, scale)),
        tile,
        num_warps=warps,
    )
    runs.finish()
    return dx, dbranch, *gradients


def adaln_fwd(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    rms: bool,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    _, *results = forward(x, None, None, shift, scale, weight, bias, rms, eps, out_dtype)
    return tuple(results)


def adaln_bwd(
    dy: Tensor,
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    rms: bool,
) -> tuple[Tensor, ...]:
    dx, _, _, *gradients = backward(None, dy, x, None, None, shift, scale, weight, bias, mean, rstd, rms)
    return dx, *(x.new_empty(0) if gradient is None else gradient for gradient in gradients)
