"""``new_op``: what it does, and its shapes and traffic."""

from __future__ import annotations

import torch

import minisora_kernels as mk
from bench.gpu.traffic import Traffic
from bench.harness.session import Problem, Random, cases
from bench.harness.shapes import MODULATED, Tokens

SHAPES = MODULATED[:2]

# How often an element of a large tensor passes: once.
TRAFFIC = {
    "new_op_fwd": Traffic({"x": 1}, {"y": 1}),
    "new_op_bwd": Traffic({"dy": 1}, {"dx": 1}),
}


def problem(shape: Tokens, dtype: torch.dtype, device: torch.device) -> Problem:
    random = Random(dtype, device)
    inputs = {"x": random(shape.batch, shape.count, shape.width)}
    return Problem(inputs, lambda t: mk.new_op(t["x"], 0.5), unread=["x"])


@cases(SHAPES)
def test_new_op(bench, shape: Tokens, dtype: str, direction: str):
    bench("new_op", problem, shape, dtype, direction)
