"""``gate_residual_adaln``: what joins two branches of a DiT block."""

from __future__ import annotations

import torch

import minisora_kernels as mk
from bench.harness import Problem, Random, cases
from bench.shapes import MODULATED, Tokens


def problem(shape: Tokens, dtype: torch.dtype, device: torch.device) -> Problem:
    random = Random(dtype, device)
    inputs = {name: random(shape.batch, shape.count, shape.width) for name in ("x", "branch")}
    inputs |= {name: random(shape.batch, shape.rows, shape.width) for name in ("gate", "shift", "scale")}
    return Problem(inputs, lambda t: mk.gate_residual_adaln(**t))


@cases(MODULATED)
def test_gate_residual_adaln(bench, shape: Tokens, dtype: str, direction: str):
    bench("gate_residual_adaln", problem, shape, dtype, direction)
