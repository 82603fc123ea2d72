"""``adaln``: LayerNorm, then scale and shift by rows."""

from __future__ import annotations

import torch

import minisora_kernels as mk
from bench.harness import Problem, Random, cases
from bench.shapes import MODULATED, Tokens


def problem(shape: Tokens, dtype: torch.dtype, device: torch.device) -> Problem:
    random = Random(dtype, device)
    inputs = {
        "x": random(shape.batch, shape.count, shape.width),
        "shift": random(shape.batch, shape.rows, shape.width),
        "scale": random(shape.batch, shape.rows, shape.width),
    }
    return Problem(inputs, lambda t: mk.adaln(**t))


@cases(MODULATED)
def test_adaln(bench, shape: Tokens, dtype: str, direction: str):
    bench("adaln", problem, shape, dtype, direction)
