"""``grn``: response normalisation, with the GELU before it. ``as written`` is one equation after the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import minisora_kernels as mk
from bench.gpu.launches import HALF, Launch, meta
from bench.gpu.traffic import Traffic
from bench.harness.session import Problem, Random, cases
from bench.harness.shapes import Responses
from models.denoisers.cascade_config import SIZES as CASCADE


def _responses(
    stage: str, frames: int, side: int, channels: int, activation: Literal["gelu"] | None, **options
) -> Responses:
    name = f"{stage} {frames}x{side}x{side} C {4 * channels}" + (f" {activation}" if activation else "")
    return Responses(name, frames, side, 4 * channels, activation, **options)


# StableCascade: stage C of 3.6B on frames of 1024x1024 and 512x512 pixels, of 1B, a level of stage B, a small model.
SHAPES = (
    _responses("C 3.6B", 4, 24, CASCADE["c-3.6b"]["widths"][0], "gelu", quick=True),
    _responses("C 3.6B", 4, 24, CASCADE["c-3.6b"]["widths"][0], None),
    _responses("C 3.6B", 8, 12, CASCADE["c-3.6b"]["widths"][0], "gelu"),
    _responses("C 1B", 1, 24, CASCADE["c-1b"]["widths"][0], "gelu"),
    _responses("B", 1, 64, CASCADE["b-1.5b"]["widths"][1], "gelu"),
    _responses("small", 8, 12, 128, "gelu"),
)

TRAFFIC = {
    # A pass for the sums over the sites of a frame, and one that writes.
    "grn_fwd": Traffic({"x": 2}, {"y": 1}),
    "grn_bwd": Traffic({"dy": 2, "x": 2}, {"dx": 1}),
}


def problem(shape: Responses, dtype: torch.dtype, device: torch.device) -> Problem:
    random = Random(dtype, device)
    inputs = {
        "x": random(shape.batch, shape.frames * shape.side**2, shape.width),
        "weight": random(shape.width),
        "bias": random(shape.width),
    }

    def written(t: dict[str, Tensor]) -> Tensor:
        x = t["x"].unflatten(1, (shape.frames, -1))
        if shape.activation:
            x = F.gelu(x)
        norms = x.norm(p=2, dim=2, keepdim=True)
        s = norms / (norms.mean(dim=-1, keepdim=True) + 1e-6)
        return (t["weight"] * (x * s) + t["bias"] + x).flatten(1, 2)

    return Problem(
        inputs,
        lambda t: mk.grn(**t, groups=shape.frames, activation=shape.activation),
        written=("as written", written),
        unread=["bias"],
    )


def _grn(
    width: int,
    activation: Literal["gelu"] | None,
    dtype: torch.dtype,
    dtypes: Mapping[str, torch.dtype] = MappingProxyType({}),
    frozen: Sequence[str] = (),
) -> Problem:
    shapes = {"x": (2, 4 * 96, width), "weight": (width,), "bias": (width,)}
    tensors = {name: meta(dtypes.get(name, dtype), *shape) for name, shape in shapes.items()}
    constants: dict[str, Any] = {name: tensors.pop(name) for name in frozen}
    return Problem(tensors, lambda t: mk.grn(**t, **constants, groups=4, activation=activation))


def launches() -> Iterator[Launch]:
    for activation in (None, "gelu"):
        for width in (7, 512, 2048, 6144, 8192):
            yield Launch(f"C {width} {activation}", partial(_grn, width, activation))
        for name in ("weight", "x"):
            yield Launch(
                f"fp32 {name} {activation}", partial(_grn, 512, activation, dtypes={name: torch.float32}), HALF
            )
        for frozen in (("x",), ("weight",), ("bias",), ("weight", "bias")):
            yield Launch(f"frozen {' and '.join(frozen)} {activation}", partial(_grn, 512, activation, frozen=frozen))


# Small and odd: what the sanitizer runs.
ODD = (Responses("gelu", 3, 5, 100, "gelu"), Responses("plain", 2, 9, 37, None))
# Small: what a call of them costs the host.
HOST = (Responses("", 2, 4, 64, "gelu"),)
LAUNCHES = tuple(launches())


@cases(SHAPES)
def test_grn(bench, shape: Responses, dtype: str, direction: str):
    bench("grn", problem, shape, dtype, direction)
