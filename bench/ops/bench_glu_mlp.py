"""``glu_mlp``: Linear, SwiGLU, Linear, with as many weights as a plain MLP that is four times as wide in the middle."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch

import minisora_kernels as mk
from bench.gpu.launches import Launch, meta
from bench.gpu.traffic import Traffic
from bench.harness.session import Problem, Random, cases
from bench.harness.shapes import MLPS, Tokens

SHAPES = MLPS

TRAFFIC = {
    # Around torch's matrix products: h and a. The first half of dh holds da before.
    "glu_mlp_fwd": Traffic({"h": 1}, {}),
    "glu_mlp_bwd": Traffic({"h": 1, "dh": 0.5}, {"a": 1, "dh": 1}),
}


def problem(shape: Tokens, dtype: torch.dtype, device: torch.device) -> Problem:
    random, width, hidden = Random(dtype, device), shape.width, 8 * shape.width // 3
    inputs = {
        "x": random(shape.batch, shape.count, width),
        "w1": random(2 * hidden, width, scale=width**-0.5),
        "b1": random(2 * hidden),
        "w2": random(width, hidden, scale=hidden**-0.5),
        "b2": random(width),
    }
    return Problem(inputs, lambda t: mk.glu_mlp(**t), unread=["b1", "b2"])


def _mlp(
    width: int, dtype: torch.dtype, biased: bool = True, apart: bool = False, frozen: Sequence[str] = (), **options: Any
) -> Problem:
    hidden = 3 * width
    rows = hidden if apart else 2 * hidden
    shapes: dict[str, tuple[int, ...]] = {"x": (256, width), "w1": (rows, width), "w2": (width, hidden)}
    if biased:
        shapes |= {"b1": (rows,), "b2": (width,)}
    if apart:
        shapes |= {"w3": (hidden, width)}
    tensors = {name: meta(dtype, *shape) for name, shape in shapes.items()}
    constants: dict[str, Any] = {"b1": None, "b2": None} | {name: tensors.pop(name) for name in frozen}
    return Problem(tensors, lambda t: mk.glu_mlp(**{**constants, **t}, **options))


def launches() -> Iterator[Launch]:
    for width in (7, 384, 1024, 1152, 3072):
        yield Launch(f"D {width}", partial(_mlp, width))
    one: tuple[str, ...] = ("bfloat16", "float32")  # the last is what --quick takes
    yield Launch("no bias", partial(_mlp, 384, biased=False), one)
    yield Launch("apart", partial(_mlp, 384, apart=True, gate_first=False), one)
    for activation in ("gelu", "gelu_tanh"):
        yield Launch(activation, partial(_mlp, 384, activation=activation), one)
    yield Launch("frozen", partial(_mlp, 384, frozen=("w1", "b1", "w2", "b2")), one)


# Small and odd: what the sanitizer runs.
ODD = (Tokens("odd", 2, 21, 67),)
# Small: what a call of them costs the host.
HOST = (Tokens("", 1, 32, 64),)
LAUNCHES = tuple(launches())


@cases(SHAPES)
def test_glu_mlp(bench, shape: Tokens, dtype: str, direction: str):
    bench("glu_mlp", problem, shape, dtype, direction)
