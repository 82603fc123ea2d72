"""``norm_rope``: queries of Wan and LTX, whose norm is across all heads, and of models that norm each head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch

import minisora_kernels as mk
from bench.gpu.launches import BOTH, HALF, Launch, meta
from bench.gpu.traffic import Traffic
from bench.harness.session import Problem, Random, cases
from bench.harness.shapes import Heads
from minisora_kernels.modulation import Norm

SHAPES = (
    Heads("Wan 12x128 across heads", 1, 4096, 12, 128, across=True, quick=True),
    Heads("LTX 32x64 across heads, angles per head", 1, 2048, 32, 64, across=True, rope="head"),
    Heads("16x72 per head", 2, 4096, 16, 72),
    Heads("text 24x128 per head, no rotary", 1, 512, 24, 128, rope=""),
)

TRAFFIC = {
    "norm_rope_fwd": Traffic({"x": 1}, {"y": 1}),
    "norm_rope_bwd": Traffic({"dy": 1, "x": lambda values: int(values["norm"] != 0)}, {"dx": 1}),
}


def problem(shape: Heads, dtype: torch.dtype, device: torch.device) -> Problem:
    random = Random(dtype, device)
    sides = (shape.heads, shape.head_dim)
    inputs = {"x": random(shape.batch, shape.count, *sides), "weight": random(*sides, scale=0.1, shift=1.0)}
    rope = None
    if shape.rope:
        angles = Random(torch.float32, device)(shape.count, *sides[shape.rope == "token" :])[..., ::2]
        rope = mk.Rope(angles.cos(), angles.sin())
    return Problem(inputs, lambda t: mk.norm_rope(**t, norm="rms", across_heads=shape.across, rope=rope))


def _rows(
    sides: tuple[int, int],
    norm: Norm | None,
    weights: Sequence[str],
    angles: str,
    dtype: torch.dtype,
    across: bool = False,
    halves: bool = False,
    shared: Sequence[str] = (),
    frozen: Sequence[str] = (),
) -> Problem:
    """``shared``: parameters that all heads share; ``angles``: "", "token", "head" or "sample"."""
    heads, head_dim = sides
    tensors = {"x": meta(dtype, 2, 300, heads, head_dim)}
    tensors |= {name: meta(dtype, *sides[name in shared :]) for name in weights}
    rope = None
    if angles:
        shape = {"token": (300,), "head": (300, heads), "sample": (2, 300, 1)}[angles]
        cos, sin = (meta(torch.float32, *shape, head_dim // 2) for _ in range(2))
        rope = mk.Rope(cos, sin, not halves)
    constants: dict[str, Any] = {name: tensors.pop(name) for name in frozen}
    return Problem(tensors, lambda t: mk.norm_rope(**t, **constants, norm=norm, across_heads=across, rope=rope))


def launches() -> Iterator[Launch]:
    def rows(name: str, *of: Any, dtypes: tuple[str, ...] = HALF, quick: bool = True, **options: Any) -> Launch:
        return Launch(name, partial(_rows, *of, **options), dtypes, quick)

    weight, both = ("weight",), ("weight", "bias")
    for across in (False, True):
        where = "across heads" if across else "per head"
        for sides in ((12, 128), (40, 128), (16, 72), (2, 8)):
            name = f"{sides[0]}x{sides[1]} {where}"
            yield rows(f"{name} rms", sides, "rms", weight, "token", across=across, dtypes=BOTH)
            yield rows(f"{name} layer", sides, "layer", both, "head", across=across, halves=True, quick=False)
        yield rows(f"64x128 {where} layer", (64, 128), "layer", both, "token", across=across)
        yield rows(f"shared {where}", (12, 64), "layer", both, "sample", across=across, shared=both)
        yield rows(f"no parameters {where}", (12, 64), "rms", (), "", across=across)
        for frozen in (("x",), ("weight",), ("bias",)):
            yield rows(f"frozen {frozen[0]} {where}", (12, 64), "layer", both, "", across=across, frozen=frozen)
    yield rows("angles per head", (12, 64), "rms", weight, "head", across=True)
    for halves in (False, True):
        yield rows(f"rotary alone, {'halves' if halves else 'pairs'}", (12, 72), None, (), "token", halves=halves)


# Small and odd: what the sanitizer runs.
ODD = (
    Heads("across heads", 2, 21, 3, 24, across=True),
    Heads("per head", 2, 9, 5, 10, rope="head"),
    Heads("no rotary", 1, 5, 2, 72, rope=""),
)
# Small: what a call of them costs the host.
HOST = (Heads("", 1, 32, 4, 16, across=True),)
LAUNCHES = tuple(launches())


@cases(SHAPES)
def test_norm_rope(bench, shape: Heads, dtype: str, direction: str):
    bench("norm_rope", problem, shape, dtype, direction)
