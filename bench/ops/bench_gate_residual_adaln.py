"""``gate_residual_adaln``: what joins two branches of a DiT block."""

from __future__ import annotations

import torch

import minisora_kernels as mk
from bench.gpu.traffic import Traffic
from bench.harness.session import Problem, Random, cases
from bench.harness.shapes import MODULATED, Tokens

from .modulated import modulated

SHAPES = MODULATED

TRAFFIC = {
    "gate_residual_adaln_fwd": Traffic({"x": 1, "branch": 1}, {"residual": 1, "y": 1, "mean": 1, "rstd": 1}),
    "gate_residual_adaln_bwd": Traffic({"dresidual": 1, "dy": 1, "residual": 1, "branch": 1}, {"dx": 1, "dbranch": 1}),
}


def problem(shape: Tokens, dtype: torch.dtype, device: torch.device) -> Problem:
    random = Random(dtype, device)
    inputs = {name: random(shape.batch, shape.count, shape.width) for name in ("x", "branch")}
    inputs |= {name: random(shape.batch, shape.rows, shape.width) for name in ("gate", "shift", "scale")}
    return Problem(inputs, lambda t: mk.gate_residual_adaln(**t))


# Small and odd: what the sanitizer runs.
ODD = (Tokens("rows", 2, 21, 100, 3), Tokens("a row a token", 1, 11, 37, 11))
# Small: what a call of them costs the host.
HOST = (Tokens("", 1, 32, 64),)
LAUNCHES = tuple(modulated("gate_residual_adaln"))


@cases(SHAPES)
def test_gate_residual_adaln(bench, shape: Tokens, dtype: str, direction: str):
    bench("gate_residual_adaln", problem, shape, dtype, direction)
