"""``new_op``: what it does, and its shapes and traffic."""

from __future__ import annotations

from functools import partial

import torch

import minisora_kernels as mk
from bench.gpu.launches import Launch, meta
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


# Small and odd: what the sanitizer runs.
ODD = (Tokens("odd", 2, 21, 67),)
# Small: what a call of them costs the host.
HOST = (Tokens("", 1, 32, 64),)


def _launch(width: int, dtype: torch.dtype) -> Problem:
    return Problem({"x": meta(dtype, 2, 48, width)}, lambda t: mk.new_op(t["x"], 0.5))


# Between them they make the launcher choose whatever it can choose: bench/aot.py compiles them.
LAUNCHES = tuple(Launch(f"D {width}", partial(_launch, width)) for width in (7, 1152))


@cases(SHAPES)
def test_new_op(bench, shape: Tokens, dtype: str, direction: str):
    bench("new_op", problem, shape, dtype, direction)
