"""``adaln``: LayerNorm, then scale and shift by rows."""

from __future__ import annotations

import torch

import minisora_kernels as mk
from bench.gpu.traffic import Traffic
from bench.harness.session import Problem, Random, cases
from bench.harness.shapes import MODULATED, Tokens

from .modulated import modulated

SHAPES = MODULATED

TRAFFIC = {
    "adaln_fwd": Traffic({"x": 1}, {"y": 1, "mean": 1, "rstd": 1}),
    "adaln_bwd": Traffic({"dy": 1, "x": 1}, {"dx": 1}),
}


def problem(shape: Tokens, dtype: torch.dtype, device: torch.device) -> Problem:
    random = Random(dtype, device)
    inputs = {
        "x": random(shape.batch, shape.count, shape.width),
        "shift": random(shape.batch, shape.rows, shape.width),
        "scale": random(shape.batch, shape.rows, shape.width),
    }
    return Problem(inputs, lambda t: mk.adaln(**t))


# Small and odd: what the sanitizer runs.
ODD = (Tokens("rows", 2, 21, 100, 3), Tokens("a row a token", 1, 11, 37, 11))
# Small: what a call of them costs the host.
HOST = (Tokens("", 1, 32, 64),)
LAUNCHES = tuple(modulated("adaln"))


@cases(SHAPES)
def test_adaln(bench, shape: Tokens, dtype: str, direction: str):
    bench("adaln", problem, shape, dtype, direction)
