"""gate_residual: equation and derivation in minisora_kernels/ops/gate_residual.py.

Forward: a program takes some tokens, reads x and the branch once and writes y once. Backward: a program takes a run of
tokens that share a row of the gate, reads dy and the branch once, writes dbranch once and adds up dgate in fp32
registers; _rows.py adds up the runs. The gradient of a gate with a row a token is written with its token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import constants, load, store
from ._launch import Launch, Like, dense, empty_gradient, plan, signature
from ._rows import (
    BACKWARD,
    FORWARD,
    Runs,
    add,
    chunks,
    columns,
    mask_of,
    max_itemsize,
    row_of,
    run_of,
    store_sum,
    strides_of,
    tile_of,
    tokens_per_row,
    zeros,
)


@triton.jit(do_not_specialize=["count", "tokens", "gate_tokens"])
def _fwd(x_ptr, branch_ptr, gate_ptr, y_ptr, count, tokens, gate_tokens, gate_sample, gate_row, tile: tl.constexpr):
    column = columns(tile)
    token = tl.program_id(0) * tile.rows + tl.arange(0, tile.rows)[:, None, None]
    live = token < count
    at = token.to(tl.int64) * tile.width
    gate = row_of(gate_ptr, gate_sample, gate_row, token // tokens, token % tokens, gate_tokens)
    for c in tl.static_range(chunks(tile)):
        mask = mask_of(live, column[c], tile, c)
        here = at + column[c]
        gated = load(gate + column[c], mask) * load(branch_ptr + here, mask)
        store(y_ptr + here, load(x_ptr + here, mask) + gated, mask)


@triton.jit(do_not_specialize=["tokens", "row_tokens", "run_tokens"])
def _bwd(
    dy_ptr,
    branch_ptr,
    gate_ptr,
    dbranch_ptr,
    dgate_ptr,
    sums_ptr,
    tokens,
    row_tokens,
    run_tokens,
    gate_sample,
    gate_row,
    PER_TOKEN: tl.constexpr,
    SLOT: tl.constexpr,
    tile: tl.constexpr,
):
    column = columns(tile)
    member = tl.arange(0, tile.rows)[:, None, None]
    begin, end, sample, place = run_of(tokens, row_tokens, run_tokens)
    if not PER_TOKEN:
        gate = row_of(gate_ptr, gate_sample, gate_row, sample, place, row_tokens)
    sums = zeros(tile)
    for first in range(begin, end, tile.rows):
        token = first + member
        live = token < end
        at = token.to(tl.int64) * tile.width
        if PER_TOKEN:
            gate = row_of(gate_ptr, gate_sample, gate_row, sample, place + token - begin, 1)
        for c in tl.static_range(chunks(tile)):
            mask = mask_of(live, column[c], tile, c)
            here = at + column[c]
            dy = load(dy_ptr + here, mask)
            dgate = dy * load(branch_ptr + here, mask)
            store(dbranch_ptr + here, dy * load(gate + column[c], mask), mask)
            if PER_TOKEN:
                store(dgate_ptr + here, dgate, mask)
            else:
                sums = add(sums, c, dgate)
    if not PER_TOKEN:
        for c in tl.static_range(chunks(tile)):
            mask = mask_of(True, column[c], tile, c)
            store_sum(dgate_ptr, sums_ptr, SLOT, tl.sum(sums[c], 0)[None], column[c], mask, tile)


@plan
def _forward_plan(x, branch, gate, device) -> Launch:
    x, branch, gate = dense("x", x), dense("branch", branch), Like(*gate)
    batch, tokens, width = x.shape
    tile, warps = tile_of(width, max_itemsize(x.dtype, branch.dtype), *FORWARD)
    numbers = (batch * tokens, tokens, tokens_per_row(gate, tokens), *strides_of("gate", gate))
    return Launch(_fwd, (triton.cdiv(batch * tokens, tile.rows),), *numbers, constants(tile), num_warps=warps)


def gate_residual_fwd(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    y = torch.empty_like(x)
    if x.numel():
        launch = _forward_plan(signature(x), signature(branch), signature(gate), x.get_device())
        launch(x, branch, gate, y)
    return y


@plan
def _backward_plan(dy, branch, gate, device) -> tuple[Launch, tuple[int, int], Launch | None]:
    dy, branch, gate = dense("dy", dy), dense("branch", branch), Like(*gate)
    tokens, width = dy.shape[1:]
    tile, warps = tile_of(width, max_itemsize(dy.dtype, branch.dtype), *BACKWARD)
    runs = Runs(dy.shape, tile, (gate,))
    numbers = (tokens, runs.row_tokens, runs.run_tokens, *strides_of("gate", gate))
    per_token = tokens_per_row(gate, tokens) == 1
    first = Launch(_bwd, (runs.count,), *numbers, per_token, *runs.slots, constants(tile), num_warps=warps)
    return first, runs.sums, runs.second_stage()


def gate_residual_bwd(dy: Tensor, branch: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    dbranch, dgate = torch.empty_like(branch), empty_gradient(gate)
    if dy.numel() == 0:
        return dbranch, dgate.zero_()
    first, size, second = _backward_plan(signature(dy), signature(branch), signature(gate), dy.get_device())
    sums = None if second is None else dy.new_empty(size, dtype=torch.float32)
    first(dy, branch, gate, dbranch, dgate, sums)
    if second is not None:
        second(sums, dgate, None, None, None, None)
    return dbranch, dgate
