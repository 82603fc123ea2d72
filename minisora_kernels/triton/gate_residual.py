"""gate_residual: equation and derivation in minisora_kernels/ops/gate_residual.py.

Forward: a program takes some tokens, reads x and the branch once and writes y once. Backward: a program takes a run of
tokens that share a row of the gate, reads dy and the branch once, writes dbranch once and adds up dgate in fp32 registers;
_rows.py adds up the runs. A gate with a row a token has its gradient written with the token.

Not run on a GPU yet.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._rows import (
    HELD,
    HELD_TWO_SUMS,
    Runs,
    add,
    check_dense,
    chunks,
    columns,
    load,
    min_itemsize,
    row_of,
    run_of,
    store_sum,
    strided,
    tile_of,
    tokens_from,
    tokens_per_row,
    zeros,
)


@triton.jit(do_not_specialize=["count", "tokens", "gate_tokens"])
def _fwd(x_ptr, branch_ptr, gate, y_ptr, count, tokens, gate_tokens, tile: tl.constexpr):
    token = tokens_from(tl.program_id(0) * tile.rows, tile)
    live = token < count
    at = token.to(tl.int64) * tile.width
    gate_row = row_of(gate, token // tokens, token % tokens, gate_tokens)
    for c in tl.static_range(chunks(tile)):
        column, mask = columns(live, tile, c)
        gated = load(gate_row + column, mask) * load(branch_ptr + at + column, mask)
        tl.store(y_ptr + at + column, load(x_ptr + at + column, mask) + gated, mask)


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
    begin, end, sample, place = run_of(tokens, row_tokens, run_tokens)
    if not PER_TOKEN:
        gate_row = row_of(gate, sample, place, row_tokens)
    sums = zeros(tile)
    for first in range(begin, end, tile.rows):
        token = tokens_from(first, tile)
        live = token < end
        at = token.to(tl.int64) * tile.width
        if PER_TOKEN:
            gate_row = row_of(gate, sample, place + token - begin, 1)
        for c in tl.static_range(chunks(tile)):
            column, mask = columns(live, tile, c)
            dy = load(dy_ptr + at + column, mask)
            dgate = dy * load(branch_ptr + at + column, mask)
            tl.store(dbranch_ptr + at + column, dy * load(gate_row + column, mask), mask)
            if PER_TOKEN:
                tl.store(dgate_ptr + at + column, dgate, mask)
            else:
                sums = add(sums, c, dgate)
    if not PER_TOKEN:
        for c in tl.static_range(chunks(tile)):
            store_sum(dgate_ptr, tl.sum(sums[c], 0)[None], tile, c)


def gate_residual_fwd(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    check_dense(x=x, branch=branch)
    batch, tokens, width = x.shape
    y = torch.empty_like(x)
    if x.numel():
        tile, warps = tile_of(width, min_itemsize(x, branch), HELD)
        _fwd[(triton.cdiv(batch * tokens, tile.rows),)](
            x,
            branch,
            strided("gate", gate),
            y,
            batch * tokens,
            tokens,
            tokens_per_row(gate, tokens),
            tile,
            num_warps=warps,
        )
    return y


def gate_residual_bwd(dy: Tensor, branch: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    check_dense(dy=dy, branch=branch)
    tokens, width = dy.shape[1:]
    dbranch, dgate = torch.empty_like(branch), gate.new_empty(gate.shape)
    if dy.numel() == 0:
        return dbranch, dgate.zero_()
    tile, warps = tile_of(width, min_itemsize(dy, branch), HELD_TWO_SUMS)
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
        tile,
        num_warps=warps,
    )
    runs.finish()
    return dbranch, dgate
