"""adaln, and with a branch to add first gate_residual_adaln: equations and derivations in minisora_kernels/ops.

Forward: a program takes some tokens. It reads x (and the branch) once, keeps it in registers for the mean, the centred
squares and the result, and writes y (and the residual) and the statistics once.

Backward: a program takes runs of tokens that share their rows of the modulation, a few tokens at a time. It keeps the
rows and fp32 sums in registers, reads every activation once, ahead of what it computes, and writes dx (and dbranch)
once. With P = sum dy and Q = sum dy * h,

    dshift = P      dscale = weight * Q + bias * P      dweight = (1 + scale) * Q      dbias = (1 + scale) * P

of which every run leaves a partial sum, to be added up by the second stage in _rows.py. A parameter with a row a token
needs no sum: the gradient of the row is written with its token. Batches and rows per frame cost what one row costs.
With an index of rows, runs are of tokens that _rows.py has sorted.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import cast, constants, inverse_root, load, store
from ._launch import Launch, Like, dense, plan, signature
from ._rows import (
    BACKWARD,
    FORWARD,
    MANY_SUMS,
    RUN_NUMBERS,
    Backward,
    Runs,
    add,
    chunk_of,
    chunks,
    columns,
    dense_index,
    depth_of,
    given,
    gradient_of,
    kept,
    mask_of,
    max_itemsize,
    padded,
    row_by_index,
    row_of,
    run_of,
    sorted_run_of,
    store_sum,
    strides_of,
    tile_of,
    tokens_per_row,
    zeros,
)


@triton.jit(
    do_not_specialize=[
        "count",
        "tokens",
        "index_sample",
        "index_rows",
        "gate_tokens",
        "shift_tokens",
        "scale_tokens",
    ]
)
def _fwd(
    x_ptr,
    branch_ptr,
    gate_ptr,
    branch_bias_ptr,
    shift_ptr,
    scale_ptr,
    weight_ptr,
    bias_ptr,
    index_ptr,
    residual_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    eps,
    count,
    tokens,
    index_sample,
    index_rows,
    gate_tokens,
    shift_tokens,
    scale_tokens,
    gate_sample,
    gate_row,
    shift_sample,
    shift_row,
    scale_sample,
    scale_row,
    RMS: tl.constexpr,
    tile: tl.constexpr,
):
    column = columns(tile)
    token = tl.program_id(0) * tile.rows + tl.arange(0, tile.rows)[:, None, None]
    live = token < count
    at = token.to(tl.int64) * tile.width
    sample = token // tokens
    place = token - sample * tokens
    if index_ptr is not None:
        place = row_by_index(index_ptr + sample.to(tl.int64) * index_sample, place, live, index_rows)
    if shift_ptr is not None:
        shift = row_of(shift_ptr, shift_sample, shift_row, sample, place, shift_tokens)
    if scale_ptr is not None:
        scale = row_of(scale_ptr, scale_sample, scale_row, sample, place, scale_tokens)
    if gate_ptr is not None:
        gate = row_of(gate_ptr, gate_sample, gate_row, sample, place, gate_tokens)

    xs = ()
    sums = tl.zeros([tile.rows, tile.lanes], tl.float32)
    for c in tl.static_range(chunks(tile)):
        mask = mask_of(live, column[c], tile, c)
        here = at + column[c]
        x = load(x_ptr + here, mask)
        if branch_ptr is not None:
            branch = load(branch_ptr + here, mask)
            if branch_bias_ptr is not None:
                branch += load(branch_bias_ptr + column[c], mask)
            if gate_ptr is not None:
                branch *= load(gate + column[c], mask)
            x += branch
            residual = cast(x, residual_ptr.dtype.element_ty)
            store(residual_ptr + here, residual, mask)
            x = residual.to(tl.float32)
        xs = xs + (x,)
        sums += tl.sum(x, 2)
    mean = tl.zeros([tile.rows, 1, 1], tl.float32)
    if not RMS:
        mean = tl.div_rn(tl.sum(sums, 1)[:, None, None], tile.width)

    sums = tl.zeros([tile.rows, tile.lanes], tl.float32)
    for c in tl.static_range(chunks(tile)):
        d = xs[c] - mean
        if padded(tile, c):
            d = tl.where(column[c] < tile.width, d, 0.0)
        sums += tl.sum(d * d, 2)
    rstd = inverse_root(tl.div_rn(tl.sum(sums, 1)[:, None, None], tile.width) + eps)
    store(mean_ptr + token, mean, live)
    store(rstd_ptr + token, rstd, live)

    for c in tl.static_range(chunks(tile)):
        mask = mask_of(live, column[c], tile, c)
        y = (xs[c] - mean) * rstd
        if weight_ptr is not None:
            y *= load(weight_ptr + column[c], mask)
        if bias_ptr is not None:
            y += load(bias_ptr + column[c], mask)
        if scale_ptr is not None:
            y *= 1 + load(scale + column[c], mask)
        if shift_ptr is not None:
            y += load(shift + column[c], mask)
        store(y_ptr + at + column[c], y, mask)


@triton.jit(do_not_specialize=[*RUN_NUMBERS, "gate_tokens", "scale_tokens"])
def _bwd(
    dresidual_ptr,
    dy_ptr,
    x_ptr,
    branch_ptr,
    gate_ptr,
    branch_bias_ptr,
    scale_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    rstd_ptr,
    index_ptr,
    first_ptr,
    order_ptr,
    dx_ptr,
    dbranch_ptr,
    dgate_ptr,
    dbranch_bias_ptr,
    dshift_ptr,
    dscale_ptr,
    dweight_ptr,
    dbias_ptr,
    sums_ptr,
    runs,
    tokens,
    row_tokens,
    run_tokens,
    index_rows,
    index_sample,
    first_sample,
    gate_tokens,
    scale_tokens,
    gate_sample,
    gate_row,
    scale_sample,
    scale_row,
    RMS: tl.constexpr,
    THROUGH: tl.constexpr,
    SUM_DY: tl.constexpr,
    SUM_H: tl.constexpr,
    GATE_PER_TOKEN: tl.constexpr,
    SHIFT_PER_TOKEN: tl.constexpr,
    SCALE_PER_TOKEN: tl.constexpr,
    GATE_SLOT: tl.constexpr,
    BRANCH_BIAS_SLOT: tl.constexpr,
    SHIFT_SLOT: tl.constexpr,
    SCALE_SLOT: tl.constexpr,
    WEIGHT_SLOT: tl.constexpr,
    BIAS_SLOT: tl.constexpr,
    STAGES: tl.constexpr,
    tile: tl.constexpr,
):
    column = columns(tile)
    member = tl.arange(0, tile.rows)[:, None, None]
    for run in range(tl.program_id(0), runs, tl.num_programs(0)):
        if order_ptr is None:
            begin, end, sample, place = run_of(run, tokens, row_tokens, run_tokens)
        else:
            begin, end, sample, place = sorted_run_of(
                run, index_ptr, first_ptr, order_ptr, index_sample, first_sample, index_rows, tokens, run_tokens
            )
        if scale_ptr is not None and not SCALE_PER_TOKEN:
            scale = row_of(scale_ptr, scale_sample, scale_row, sample, place, scale_tokens)
            scales = kept(scale, column, tile)
        if gate_ptr is not None and not GATE_PER_TOKEN:
            gates = kept(row_of(gate_ptr, gate_sample, gate_row, sample, place, gate_tokens), column, tile)
        if weight_ptr is not None:
            weights = kept(weight_ptr, column, tile)
        if bias_ptr is not None and SCALE_PER_TOKEN:
            biases = kept(bias_ptr, column, tile)
        if branch_bias_ptr is not None:
            branch_biases = kept(branch_bias_ptr, column, tile)
        sum_dy = zeros(tile)
        sum_da = zeros(tile)
        sum_h = zeros(tile)  # of dy * h, or of da * h where every token has a scale of its own
        sum_gate = zeros(tile)
        sum_branch = zeros(tile)

        # What is kept of rows stays as it is: the compiler would hold it in fp32, in twice the registers.
        for first in tl.range(begin, end, tile.rows, num_stages=STAGES, disable_licm=True):
            token = first + member
            live = token < end
            if order_ptr is not None:
                order = order_ptr + sample.to(tl.int64) * index_sample
                token = sample * tokens + tl.load(order + token, live, other=0)
            at = token.to(tl.int64) * tile.width
            if scale_ptr is not None and SCALE_PER_TOKEN:
                scale_ = row_of(scale_ptr, scale_sample, scale_row, sample, place + token - begin, 1)
            if gate_ptr is not None and GATE_PER_TOKEN:
                gate_ = row_of(gate_ptr, gate_sample, gate_row, sample, place + token - begin, 1)
            rstd = tl.load(rstd_ptr + token, live, other=0.0)
            mean = tl.zeros([tile.rows, 1, 1], tl.float32)
            if not RMS:
                mean = tl.load(mean_ptr + token, live, other=0.0)

            hs = ()
            dhs = ()
            sum_dh = tl.zeros([tile.rows, tile.lanes], tl.float32)
            sum_dh_h = tl.zeros([tile.rows, tile.lanes], tl.float32)
            for c in tl.static_range(chunks(tile)):
                mask = mask_of(live, column[c], tile, c)
                here = at + column[c]
                dy = load(dy_ptr + here, mask)
                h = (load(x_ptr + here, mask) - mean) * rstd
                da = dy
                if scale_ptr is not None:
                    if SCALE_PER_TOKEN:
                        da *= 1 + load(scale_ + column[c], mask)
                    else:
                        da *= 1 + chunk_of(scales, c, mask, tile)
                dh = da
                a = h
                if weight_ptr is not None:
                    weight = chunk_of(weights, c, mask, tile)
                    dh *= weight
                    a *= weight
                if SUM_DY:
                    sum_dy = add(sum_dy, c, dy)
                if dshift_ptr is not None and SHIFT_PER_TOKEN:
                    store(dshift_ptr + here, dy, mask)
                if SCALE_PER_TOKEN:
                    if dscale_ptr is not None:
                        if bias_ptr is not None:
                            a += chunk_of(biases, c, mask, tile)
                        store(dscale_ptr + here, dy * a, mask)
                    if dbias_ptr is not None:
                        sum_da = add(sum_da, c, da)
                    if dweight_ptr is not None:
                        sum_h = add(sum_h, c, da * h)
                elif SUM_H:
                    sum_h = add(sum_h, c, dy * h)
                hs = hs + (h,)
                dhs = dhs + (dh,)
                sum_dh += tl.sum(dh, 2)
                sum_dh_h += tl.sum(dh * h, 2)

            if THROUGH:
                # joined: one exchange between warps for both
                joined = tl.sum(tl.join(sum_dh, sum_dh_h), 1)[:, None, None]
                mean_dh, mean_dh_h = tl.split(tl.div_rn(joined, tile.width))
                for c in tl.static_range(chunks(tile)):
                    mask = mask_of(live, column[c], tile, c)
                    here = at + column[c]
                    dx = dhs[c] - hs[c] * mean_dh_h
                    if not RMS:
                        dx -= mean_dh
                    dx *= rstd
                    if dresidual_ptr is not None:
                        dx += load(dresidual_ptr + here, mask)
                    if dgate_ptr is not None:
                        branch = load(branch_ptr + here, mask)
                        if branch_bias_ptr is not None:
                            branch += chunk_of(branch_biases, c, mask, tile)
                        dgate = dx * branch
                        if GATE_PER_TOKEN:
                            store(dgate_ptr + here, dgate, mask)
                        else:
                            sum_gate = add(sum_gate, c, dgate)
                    if dx_ptr is not None:
                        store(dx_ptr + here, dx, mask)
                    if gate_ptr is not None:
                        if GATE_PER_TOKEN:
                            dx *= load(gate_ + column[c], mask)
                        else:
                            dx *= chunk_of(gates, c, mask, tile)
                    if dbranch_ptr is not None:
                        store(dbranch_ptr + here, dx, mask)
                    if dbranch_bias_ptr is not None:
                        sum_branch = add(sum_branch, c, dx)

        for c in tl.static_range(chunks(tile)):
            mask = mask_of(True, column[c], tile, c)
            total = tl.sum(sum_dy[c], 0)[None]
            total_h = tl.sum(sum_h[c], 0)[None]
            if dshift_ptr is not None and not SHIFT_PER_TOKEN:
                store_sum(dshift_ptr, sums_ptr, SHIFT_SLOT, run, runs, total, column[c], mask, tile)
            if SCALE_PER_TOKEN:
                total = tl.sum(sum_da[c], 0)[None]
            else:
                if dscale_ptr is not None:
                    dscale = total_h
                    if weight_ptr is not None:
                        dscale *= load(weight_ptr + column[c], mask)
                    if bias_ptr is not None:
                        dscale += load(bias_ptr + column[c], mask) * total
                    store_sum(dscale_ptr, sums_ptr, SCALE_SLOT, run, runs, dscale, column[c], mask, tile)
                if scale_ptr is not None:
                    one_plus_scale = 1 + load(scale + column[c], mask)
                    total *= one_plus_scale
                    total_h *= one_plus_scale
            if dweight_ptr is not None:
                store_sum(dweight_ptr, sums_ptr, WEIGHT_SLOT, run, runs, total_h, column[c], mask, tile)
            if dbias_ptr is not None:
                store_sum(dbias_ptr, sums_ptr, BIAS_SLOT, run, runs, total, column[c], mask, tile)
            if dgate_ptr is not None and not GATE_PER_TOKEN:
                total_gate = tl.sum(sum_gate[c], 0)[None]
                store_sum(dgate_ptr, sums_ptr, GATE_SLOT, run, runs, total_gate, column[c], mask, tile)
            if dbranch_bias_ptr is not None:
                total = tl.sum(sum_branch[c], 0)[None]
                store_sum(dbranch_bias_ptr, sums_ptr, BRANCH_BIAS_SLOT, run, runs, total, column[c], mask, tile)


@plan
def _forward_plan(
    x, branch, gate, branch_bias, shift, scale, weight, bias, index, rms, eps, out_dtype, device
) -> Launch:
    x, branch = dense("x", x), dense("branch", branch)
    for name, parameter in (("branch_bias", branch_bias), ("weight", weight), ("bias", bias)):
        dense(name, parameter)
    gate, shift, scale = (None if each is None else Like(*each) for each in (gate, shift, scale))
    index, *division = dense_index(index, gate, shift, scale)
    batch, tokens, width = x.shape
    dtypes = (x.dtype, out_dtype) if branch is None else (x.dtype, branch.dtype, out_dtype)
    tile, warps = tile_of(width, max_itemsize(*dtypes), *FORWARD)
    return Launch(
        _fwd,
        (triton.cdiv(batch * tokens, tile.rows),),
        eps,
        batch * tokens,
        tokens,
        *division,
        *(tokens_per_row(parameter, tokens, index) for parameter in (gate, shift, scale)),
        *strides_of("gate", gate),
        *strides_of("shift", shift),
        *strides_of("scale", scale),
        rms,
        constants(tile),
        num_warps=warps,
    )


def forward(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    branch_bias: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    index: Tensor | None,
    rms: bool,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """(residual, y, mean, rstd); no residual without a branch."""
    residual = None if branch is None else torch.empty_like(x)
    y = torch.empty_like(x, dtype=out_dtype)
    mean = x.new_empty(x.shape[:2], dtype=torch.float32)
    rstd = torch.empty_like(mean)
    if x.numel():
        inputs = (x, branch, gate, branch_bias, shift, scale, weight, bias, index)
        launch = _forward_plan(*map(signature, inputs), rms, eps, out_dtype, x.get_device())
        launch(*inputs, residual, y, mean, rstd)
    return residual, y, mean, rstd


class Asked(NamedTuple):
    """The gradients that are asked for: their dtypes, or False and None, and the numbers of rows."""

    x: bool
    branch: torch.dtype | None
    gate: torch.dtype | None
    gate_rows: int
    branch_bias: torch.dtype | None
    shift: torch.dtype | None
    shift_rows: int
    scale: torch.dtype | None
    scale_rows: int
    weight: torch.dtype | None
    bias: torch.dtype | None


@plan
def _backward_plan(
    dresidual, dy, x, branch, gate, branch_bias, scale, weight, bias, mean, rstd, index, rms, asked, device
) -> Backward:
    dy, x, branch = dense("dy", dy), dense("x", x), dense("branch", branch)
    weight, bias = dense("weight", weight), dense("bias", bias)
    dresidual = dense("dresidual", dresidual)
    for name, each in (("branch_bias", branch_bias), ("mean", mean), ("rstd", rstd)):
        dense(name, each)
    gate, scale, index = gate and Like(*gate), scale and Like(*scale), dense("index", index)
    batch, tokens, width = x.shape
    gradients = ((asked.gate, asked.gate_rows), (asked.shift, asked.shift_rows), (asked.scale, asked.scale_rows))
    read = (gate, None, scale)
    counts = [rows if like is None else like.shape[1] for (_, rows), like in zip(gradients, read, strict=True)]
    per_token = [count == tokens and index is None for count in counts]
    written = [dtype for (dtype, _), each in zip(gradients, per_token, strict=True) if each]
    written += [like.dtype for like, each in zip(read, per_token, strict=True) if each and like is not None]
    held = [dy.dtype, x.dtype, asked.branch, branch and branch.dtype, *written]
    rows_of_tokens = (like if each else None for like, each in zip(read, per_token, strict=True))
    loaded = [each.dtype for each in (dy, x, dresidual, branch, *rows_of_tokens) if each is not None]
    summed_gate, summed_shift, summed_scale = (
        dtype is not None and not each for (dtype, _), each in zip(gradients, per_token, strict=True)
    )
    summed_bias, summed_weight = (each is not None and not per_token[2] for each in (asked.bias, asked.weight))
    sum_dy = summed_shift or summed_bias or (summed_scale and bias is not None)
    sum_h = summed_scale or summed_weight
    # With a scale a token, weight and bias have sums of their own.
    sums = [sum_dy, sum_h, summed_gate, asked.branch_bias is not None]
    sums += [each is not None and per_token[2] for each in (asked.bias, asked.weight)]
    itemsize = max_itemsize(*(dtype for dtype in held if dtype is not None))
    tile, warps = tile_of(width, itemsize, *(MANY_SUMS if sum(sums) > 3 and width <= 4096 else BACKWARD))
    gate_shape, *shapes = [None if dtype is None else (batch, rows, width) for dtype, rows in gradients]
    bias_shape, *affine = [
        None if dtype is None else (width,) for dtype in (asked.branch_bias, asked.weight, asked.bias)
    ]
    runs = Runs(x.shape, tile, [count for count in counts if count], (gate_shape, bias_shape, *shapes, *affine), index)
    depth = depth_of(tile, warps, *loaded)
    first = Launch(
        _bwd,
        (runs.programs(depth, device),),
        runs.count,
        tokens,
        runs.row_tokens,
        runs.run_tokens,
        runs.index_rows,
        *runs.strides,
        tokens_per_row(gate, tokens, index),
        tokens_per_row(scale, tokens, index),
        *strides_of("gate", gate),
        *strides_of("scale", scale),
        rms,
        asked.x or any(dtype is not None for dtype in (asked.branch, asked.gate, asked.branch_bias)),
        sum_dy,
        sum_h,
        *per_token,
        *runs.slots,
        depth.stages,
        constants(tile),
        num_warps=warps,
    )
    return Backward(first, runs)


def backward(
    dresidual: Tensor | None,
    dy: Tensor,
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    branch_bias: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    index: Tensor | None,
    rms: bool,
    asked: Asked,
) -> tuple[Tensor | None, ...]:
    """The gradients of x, branch, gate and what follows; ``x`` is what was normalised."""
    inputs = (dresidual, dy, x, branch, gate, branch_bias, scale, weight, bias, mean, rstd)
    dx = torch.empty_like(x) if asked.x else None
    dbranch = None if asked.branch is None else torch.empty_like(x, dtype=asked.branch)
    gradients = [
        gradient_of(x, asked.gate_rows, asked.gate),
        _affine_gradient(x, asked.branch_bias),
        gradient_of(x, asked.shift_rows, asked.shift),
        gradient_of(x, asked.scale_rows, asked.scale),
        _affine_gradient(x, asked.weight),
        _affine_gradient(x, asked.bias),
    ]
    if x.numel() == 0:
        return dx, dbranch, *(None if gradient is None else gradient.zero_() for gradient in gradients)
    launches = _backward_plan(*map(signature, (*inputs, index)), rms, asked, x.get_device())
    launches(inputs, index, (dx, dbranch), gradients, x)
    return dx, dbranch, *gradients


def _affine_gradient(x: Tensor, dtype: torch.dtype | None) -> Tensor | None:
    return None if dtype is None else x.new_empty(x.shape[2], dtype=dtype)


def adaln_fwd(x: Tensor, *arguments: Any) -> tuple[Tensor | None, ...]:
    return forward(x, None, None, None, *arguments)[1:]


def adaln_bwd(dy: Tensor, x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    scale, weight, bias, mean, rstd, index, rms, need_x, *asked = arguments
    tensors = (None, dy, x, None, None, None, scale, weight, bias, mean, rstd, index)
    gradients = backward(*tensors, rms, Asked(need_x, None, None, 0, None, *asked))
    return given(x, (gradients[0], *gradients[4:]))
