"""gate_residual: equation and derivation in minisora_kernels/ops/gate_residual.py.

Forward: a program takes some tokens, reads x and the branch once and writes y once. Backward: a program takes runs of
tokens that share a row of the gate, reads dy and the branch once, ahead of what it computes, writes dbranch once and
adds up dgate and the gradient of the bias in fp32 registers; _rows.py adds up the runs. The gradient of a gate with a
row a token is written with its token. With an index of rows, runs are of tokens that _rows.py has sorted.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import constants, load, store
from ._launch import Launch, Like, dense, plan, signature
from ._rows import (
    BACKWARD,
    FORWARD,
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


@triton.jit(do_not_specialize=["count", "tokens", "index_sample", "index_rows", "gate_tokens"])
def _fwd(
    x_ptr,
    branch_ptr,
    gate_ptr,
    branch_bias_ptr,
    index_ptr,
    y_ptr,
    count,
    tokens,
    index_sample,
    index_rows,
    gate_tokens,
    gate_sample,
    gate_row,
    tile: tl.constexpr,
):
    column = columns(tile)
    token = tl.program_id(0) * tile.rows + tl.arange(0, tile.rows)[:, None, None]
    live = token < count
    at = token.to(tl.int64) * tile.width
    sample = token // tokens
    place = token % tokens
    if index_ptr is not None:
        place = row_by_index(index_ptr + sample.to(tl.int64) * index_sample, place, live, index_rows)
    if gate_ptr is not None:
        gate = row_of(gate_ptr, gate_sample, gate_row, sample, place, gate_tokens)
    for c in tl.static_range(chunks(tile)):
        mask = mask_of(live, column[c], tile, c)
        here = at + column[c]
        gated = load(branch_ptr + here, mask)
        if branch_bias_ptr is not None:
            gated += load(branch_bias_ptr + column[c], mask)
        if gate_ptr is not None:
            gated *= load(gate + column[c], mask)
        store(y_ptr + here, load(x_ptr + here, mask) + gated, mask)


@triton.jit(do_not_specialize=[*RUN_NUMBERS, "gate_tokens"])
def _bwd(
    dy_ptr,
    branch_ptr,
    gate_ptr,
    branch_bias_ptr,
    index_ptr,
    first_ptr,
    order_ptr,
    dbranch_ptr,
    dgate_ptr,
    dbranch_bias_ptr,
    sums_ptr,
    runs,
    tokens,
    row_tokens,
    run_tokens,
    index_rows,
    index_sample,
    first_sample,
    gate_tokens,
    gate_sample,
    gate_row,
    PER_TOKEN: tl.constexpr,
    GATE_SLOT: tl.constexpr,
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
        if gate_ptr is not None and not PER_TOKEN:
            gates = kept(row_of(gate_ptr, gate_sample, gate_row, sample, place, gate_tokens), column, tile)
        if branch_bias_ptr is not None:
            branch_biases = kept(branch_bias_ptr, column, tile)
        sum_gate = zeros(tile)
        sum_bias = zeros(tile)
        for first in tl.range(begin, end, tile.rows, num_stages=STAGES, disable_licm=True):
            token = first + member
            live = token < end
            if order_ptr is not None:
                order = order_ptr + sample.to(tl.int64) * index_sample
                token = sample * tokens + tl.load(order + token, live, other=0)
            at = token.to(tl.int64) * tile.width
            if gate_ptr is not None and PER_TOKEN:
                gate = row_of(gate_ptr, gate_sample, gate_row, sample, place + token - begin, 1)
            for c in tl.static_range(chunks(tile)):
                mask = mask_of(live, column[c], tile, c)
                here = at + column[c]
                dy = load(dy_ptr + here, mask)
                if gate_ptr is not None:
                    if PER_TOKEN:
                        dbranch = dy * load(gate + column[c], mask)
                    else:
                        dbranch = dy * chunk_of(gates, c, mask, tile)
                    if dbranch_ptr is not None:
                        store(dbranch_ptr + here, dbranch, mask)
                    if dbranch_bias_ptr is not None:
                        sum_bias = add(sum_bias, c, dbranch)
                if dgate_ptr is not None:
                    branch = load(branch_ptr + here, mask)
                    if branch_bias_ptr is not None:
                        branch += chunk_of(branch_biases, c, mask, tile)
                    if PER_TOKEN:
                        store(dgate_ptr + here, dy * branch, mask)
                    else:
                        sum_gate = add(sum_gate, c, dy * branch)
        for c in tl.static_range(chunks(tile)):
            mask = mask_of(True, column[c], tile, c)
            if dgate_ptr is not None and not PER_TOKEN:
                total = tl.sum(sum_gate[c], 0)[None]
                store_sum(dgate_ptr, sums_ptr, GATE_SLOT, run, runs, total, column[c], mask, tile)
            if dbranch_bias_ptr is not None:
                total = tl.sum(sum_bias[c], 0)[None]
                store_sum(dbranch_bias_ptr, sums_ptr, BIAS_SLOT, run, runs, total, column[c], mask, tile)


@plan
def _forward_plan(x, branch, gate, branch_bias, index, device) -> Launch:
    x, branch, gate = dense("x", x), dense("branch", branch), gate and Like(*gate)
    dense("branch_bias", branch_bias)
    index, *division = dense_index(index, gate)
    batch, tokens, width = x.shape
    tile, warps = tile_of(width, max_itemsize(x.dtype, branch.dtype), *FORWARD)
    numbers = (batch * tokens, tokens, *division, tokens_per_row(gate, tokens, index), *strides_of("gate", gate))
    return Launch(_fwd, (triton.cdiv(batch * tokens, tile.rows),), *numbers, constants(tile), num_warps=warps)


def gate_residual_fwd(
    x: Tensor, branch: Tensor, gate: Tensor | None, branch_bias: Tensor | None, index: Tensor | None
) -> Tensor:
    y = torch.empty_like(x)
    if x.numel():
        inputs = (x, branch, gate, branch_bias, index)
        _forward_plan(*map(signature, inputs), x.get_device())(*inputs, y)
    return y


@plan
def _backward_plan(dy, branch, gate, branch_bias, index, dbranch, gate_rows, need_bias, device) -> Backward:
    """``dbranch``: its dtype, or None. ``gate_rows``: rows of dgate, or 0."""
    dy, branch, gate = dense("dy", dy), dense("branch", branch), gate and Like(*gate)
    dense("branch_bias", branch_bias)
    index = dense("index", index)
    batch, tokens, width = dy.shape
    dtypes = {dtype for dtype in (dy.dtype, dbranch, branch and branch.dtype) if dtype is not None}
    tile, warps = tile_of(width, max_itemsize(*dtypes), *BACKWARD)
    rows = gate_rows if gate is None else gate.shape[1]
    gradients = ((batch, rows, width) if gate_rows else None, (width,) if need_bias else None)
    runs = Runs(dy.shape, tile, (rows,), gradients, index)
    per_token = rows == tokens and index is None
    numbers = (runs.count, tokens, runs.row_tokens, runs.run_tokens, runs.index_rows, *runs.strides)
    numbers += (1 if index else tokens // rows, *strides_of("gate", gate))
    loaded = (dy, branch, gate if per_token else None)
    depth = depth_of(tile, warps, *(each.dtype for each in loaded if each is not None))
    grid = (runs.programs(depth, device),)
    first = Launch(_bwd, grid, *numbers, per_token, *runs.slots, depth.stages, constants(tile), num_warps=warps)
    return Backward(first, runs)


def gate_residual_bwd(
    dy: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    branch_bias: Tensor | None,
    index: Tensor | None,
    dbranch_dtype: torch.dtype | None,
    gate_dtype: torch.dtype | None,
    gate_rows: int,
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor, ...]:
    dbranch = None if dbranch_dtype is None else torch.empty_like(dy, dtype=dbranch_dtype)
    dbias = None if bias_dtype is None else dy.new_empty(dy.shape[2], dtype=bias_dtype)
    gradients = gradient_of(dy, gate_rows, gate_dtype), dbias
    if dy.numel() == 0:
        return given(dy, (dbranch, *(None if gradient is None else gradient.zero_() for gradient in gradients)))
    inputs = (dy, branch, gate, branch_bias)
    asked = dbranch_dtype, gate_rows, dbias is not None
    launches = _backward_plan(*map(signature, (*inputs, index)), *asked, dy.get_device())
    launches(inputs, index, (dbranch,), gradients, dy)
    return given(dy, (dbranch, *gradients))
