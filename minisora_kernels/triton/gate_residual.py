"""gate_residual: equation and derivation in minisora_kernels/ops/gate_residual.py.

Forward: a program takes some tokens, reads x and the branch once and writes y once. Backward: a program takes a run of
tokens that share a row of the gate, reads dy and the branch once, writes dbranch once and adds up dgate in fp32
registers; _rows.py adds up the runs. The gradient of a gate with a row a token is written with its token.

Not run on a GPU yet.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import FUSED, check_dense, constants, load, store
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
    strided,
    tile_of,
    tokens_per_row,
    zeros,
)


@triton.jit(do_not_specialize=["count", "tokens", "gate_tokens"])
def _fwd(x_ptr, branch_ptr, gate, y_ptr, count, tokens, gate_tokens, tile: tl.constexpr):
    column = columns(tile)
    token = tl.program_id(0) * tile.rows + tl.arange(0, tile.rows)[:, None, None]
    live = token < count
    at = token.to(tl.int64) * tile.width
    gate_row = row_of(gate, token // tokens, token % tokens, gate_tokens)
    for c in tl.static_range(chunks(tile)):
        mask = mask_of(live, column[c], tile, c)
        here = at + column[c]
        gated = load(gate_row + column[c], mask) * load(branch_ptr + here, mask)
        store(y_ptr + here, load(x_ptr + here, mask) + gated, mask)


@triton.jit(do_not_specialize=["tokens", "row_tokens", "run_tokens"])
def _bwd(
    dy_ptr,
    branch_ptr,
    gate,
    dbranch_ptr,
    dgate_ptr,
    tokens,
    row_tokens,
    run_tokens,
    PER_TOKEN: tl.constexpr,
    tile: tl.constexpr,
):
    column = columns(tile)
    member = tl.arange(0, tile.rows)[:, None, None]
    begin, end, sample, place = run_of(tokens, row_tokens, run_tokens)
    if not PER_TOKEN:
        gate_row = row_of(gate, sample, place, row_tokens)
    sums = zeros(tile)
    for first in range(begin, end, tile.rows):
        token = first + member
        live = token < end
        at = token.to(tl.int64) * tile.width
        if PER_TOKEN:
            gate_row = row_of(gate, sample, place + token - begin, 1)
        for c in tl.static_range(chunks(tile)):
            mask = mask_of(live, column[c], tile, c)
            here = at + column[c]
            dy = load(dy_ptr + here, mask)
            dgate = dy * load(branch_ptr + here, mask)
            store(dbranch_ptr + here, dy * load(gate_row + column[c], mask), mask)
            if PER_TOKEN:
                store(dgate_ptr + here, dgate, mask)
            else:
                sums = add(sums, c, dgate)
    if not PER_TOKEN:
        for c in tl.static_range(chunks(tile)):
            mask = mask_of(True, column[c], tile, c)
            store_sum(dgate_ptr, tl.sum(sums[c], 0)[None], column[c], mask, tile)


def gate_residual_fwd(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    check_dense(x=x, branch=branch)
    batch, tokens, width = x.shape
    y = torch.empty_like(x)
    if x.numel():
        tile, warps = tile_of(width, max_itemsize(x, branch), *FORWARD)
        _fwd[(triton.cdiv(batch * tokens, tile.rows),)](
            x,
            branch,
            strided("gate", gate),
            y,
            batch * tokens,
            tokens,
            tokens_per_row(gate, tokens),
            constants(tile),
            num_warps=warps,
            **FUSED,
        )
    return y


def gate_residual_bwd(dy: Tensor, branch: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    check_dense(dy=dy, branch=branch)
    tokens, width = dy.shape[1:]
    dbranch, dgate = torch.empty_like(branch), gate.new_empty(gate.shape)
    if dy.numel() == 0:
        return dbranch, dgate.zero_()
    tile, warps = tile_of(width, max_itemsize(dy, branch), *BACKWARD)
    runs = Runs(dy, tile, gate)
    _bwd[(runs.count,)](
        dy,
        branch,
        strided("gate", gate),
        dbranch,
        runs.target(dgate),
        tokens,
        runs.row_tokens,
        runs.run_tokens,
        tokens_per_row(gate, tokens) == 1,
        constants(tile),
        num_warps=warps,
        **FUSED,
    )
    runs.finish()
    return dbranch, dgate
