"""``gelu_mlp``: Linear, tanh-GELU, Linear, four times as wide in the middle."""

from __future__ import annotations

import torch

import minisora_kernels as mk
from bench.harness import Problem, Random, cases
from bench.shapes import GELU_MLP, Tokens


def problem(shape: Tokens, dtype: torch.dtype, device: torch.device) -> Problem:
    random, width, hidden = Random(dtype, device), shape.width, 4 * shape.width
    inputs = {
        "x": random(shape.batch, shape.count, width),
        "w1": random(hidden, width, scale=width**-0.5),
        "b1": random(hidden),
        "w2": random(width, hidden, scale=hidden**-0.5),
        "b2": random(width),
    }
    return Problem(inputs, lambda t: mk.gelu_mlp(**t), unread=["b1", "b2"])


@cases(GELU_MLP)
def test_gelu_mlp(bench, shape: Tokens, dtype: str, direction: str):
    bench("gelu_mlp", problem, shape, dtype, direction)
