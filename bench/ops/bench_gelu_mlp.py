"""``gelu_mlp``: Linear, tanh-GELU, Linear, four times as wide in the middle."""

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
    # Around torch's matrix products: h and a, and da, which becomes dh in place.
    "gelu_mlp_fwd": Traffic({"h": 1}, {}),
    "gelu_mlp_bwd": Traffic({"h": 1, "dh": 1}, {"a": 1, "dh": 1}),
}


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


def _mlp(width: int, dtype: torch.dtype, biased: bool = True, frozen: Sequence[str] = (), **options: Any) -> Problem:
    shapes: dict[str, tuple[int, ...]] = {"x": (256, width), "w1": (4 * width, width), "w2": (width, 4 * width)}
    if biased:
        shapes |= {"b1": (4 * width,), "b2": (width,)}
    tensors = {name: meta(dtype, *shape) for name, shape in shapes.items()}
    constants: dict[str, Any] = {"b1": None, "b2": None} | {name: tensors.pop(name) for name in frozen}
    return Problem(tensors, lambda t: mk.gelu_mlp(**{**constants, **t}, **options))


def launches() -> Iterator[Launch]:
    for width in (7, 384, 1024, 1152, 3072):
        yield Launch(f"D {width}", partial(_mlp, width))
    one: tuple[str, ...] = ("bfloat16", "float32")  # the last is what --quick takes
    yield Launch("no bias", partial(_mlp, 384, biased=False), one)
    yield Launch("exact", partial(_mlp, 384, approximate="none"), one)
    yield Launch("frozen", partial(_mlp, 384, frozen=("w1", "b1", "w2", "b2")), one)
    yield Launch("frozen exact", partial(_mlp, 384, frozen=("w1", "b1", "w2", "b2"), approximate="none"), one)


# Small and odd: what the sanitizer runs.
ODD = (Tokens("odd", 2, 21, 67),)
# Small: what a call of them costs the host.
HOST = (Tokens("", 1, 32, 64),)
LAUNCHES = tuple(launches())


@cases(SHAPES)
def test_gelu_mlp(bench, shape: Tokens, dtype: str, direction: str):
    bench("gelu_mlp", problem, shape, dtype, direction)
