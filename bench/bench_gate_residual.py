"""``gate_residual``: a branch added to the tokens, weighted by rows."""

from __future__ import annotations

import torch

import minisora_kernels as mk
from bench.harness import Problem, Random, cases
from bench.shapes import GATE_RESIDUAL, Tokens


def problem(shape: Tokens, dtype: torch.dtype, device: torch.device) -> Problem:
    random = Random(dtype, device)
    inputs = {
        "x": random(shape.batch, shape.count, shape.width),
        "branch": random(shape.batch, shape.count, shape.width),
        "gate": random(shape.batch, shape.rows, shape.width),
    }
    return Problem(inputs, lambda t: mk.gate_residual(**t), unread=["x"], aliased=["x"])


@cases(GATE_RESIDUAL)
def test_gate_residual(bench, shape: Tokens, dtype: str, direction: str):
    bench("gate_residual", problem, shape, dtype, direction)
