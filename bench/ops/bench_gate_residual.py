"""``gate_residual``: a branch added to the tokens, weighted by rows."""

from __future__ import annotations

import torch

import minisora_kernels as mk
from bench.gpu.traffic import Traffic
from bench.harness.session import Problem, Random, cases
from bench.harness.shapes import MODULATED, Tokens

from .modulated import modulated

SHAPES = MODULATED[:2]

TRAFFIC = {
    "gate_residual_fwd": Traffic({"x": 1, "branch": 1}, {"y": 1}),
    "gate_residual_bwd": Traffic({"dy": 1, "branch": 1}, {"dbranch": 1}),
}


def problem(shape: Tokens, dtype: torch.dtype, device: torch.device) -> Problem:
    random = Random(dtype, device)
    inputs = {
        "x": random(shape.batch, shape.count, shape.width),
        "branch": random(shape.batch, shape.count, shape.width),
        "gate": random(shape.batch, shape.rows, shape.width),
    }
    return Problem(inputs, lambda t: mk.gate_residual(**t), unread=["x"], aliased=["x"])


# Small and odd: what the sanitizer runs.
ODD = (Tokens("rows", 2, 21, 100, 3), Tokens("a row a token", 1, 11, 37, 11))
# Small: what a call of them costs the host.
HOST = (Tokens("", 1, 32, 64),)
LAUNCHES = tuple(modulated("gate_residual"))


@cases(SHAPES)
def test_gate_residual(bench, shape: Tokens, dtype: str, direction: str):
    bench("gate_residual", problem, shape, dtype, direction)
