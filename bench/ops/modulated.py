"""Launches of the ops that take tokens and rows of parameters."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

import minisora_kernels as mk
from bench.gpu.launches import BOTH, HALF, Launch, meta
from bench.harness.session import Problem
from bench.harness.shapes import Triple
from minisora_kernels.modulation import TRITON_WIDEST

MODULATION = ("gate", "shift", "scale")
NAMES = {
    "adaln": ("x", "shift", "scale", "weight", "bias"),
    "gate_residual": ("x", "branch", "gate"),
    "gate_residual_adaln": ("x", "branch", "gate", "shift", "scale", "weight", "bias"),
}
TOKENS = 48
PER_SAMPLE, PER_TOKEN = (1, 1, 1), (TOKENS,) * 3
WIDTHS = (7, 768, 1024, 1151, 3072)

# name, rows of gate, shift and scale, affine, norm, dtypes of their own
ROWS: tuple[tuple, ...] = (
    ("affine", PER_SAMPLE, True, "layer", {}),
    ("rms", PER_SAMPLE, False, "rms", {}),
    ("affine rms", PER_SAMPLE, True, "rms", {}),
    ("per token", PER_TOKEN, False, "layer", {}),
    ("affine per token", PER_TOKEN, True, "layer", {}),
    ("gate per token", (TOKENS, 1, 1), False, "layer", {}),
    ("shift per token", (1, TOKENS, 1), True, "layer", {}),
    ("scale per token", (1, 1, TOKENS), True, "layer", {}),
    ("rows of 6, 4, 3", (6, 4, 3), True, "layer", {}),
    ("a run a row", (12, 12, 12), False, "layer", {}),
)
MIXED: tuple[tuple, ...] = (
    ("fp32 modulation", PER_SAMPLE, True, "layer", dict.fromkeys((*MODULATION, "weight", "bias"), torch.float32)),
    ("fp32 stream", PER_SAMPLE, False, "layer", {"x": torch.float32}),
    ("fp32 stream per token", PER_TOKEN, False, "layer", {"x": torch.float32}),
)


def _modulated(
    op: str, width: int, rows: Triple, affine: bool, norm: str, dtypes: dict[str, torch.dtype], dtype: torch.dtype
) -> Problem:
    shapes: dict[str, tuple[int, ...]] = {"x": (2, TOKENS, width), "branch": (2, TOKENS, width)}
    shapes |= {name: (2, count, width) for name, count in zip(MODULATION, rows, strict=True)}
    if affine:
        shapes |= {"weight": (width,)} if norm == "rms" else {"weight": (width,), "bias": (width,)}
    tensors = {name: meta(dtypes.get(name, dtype), *shapes[name]) for name in NAMES[op] if name in shapes}
    options = {} if op == "gate_residual" else {"norm": norm}
    return Problem(tensors, lambda t: getattr(mk, op)(**t, **options))


def modulated(op: str) -> Iterator[Launch]:
    for name, rows, affine, norm, dtypes in ROWS + MIXED:
        if op != "gate_residual" or not (affine or norm == "rms"):
            call = partial(_modulated, op, 1152, rows, affine, norm, dtypes)
            yield Launch(name, call, HALF if dtypes else BOTH)
    for width in (*WIDTHS, TRITON_WIDEST):
        dtypes = BOTH if width in (7, TRITON_WIDEST) else HALF
        yield Launch(f"D {width}", partial(_modulated, op, width, PER_SAMPLE, False, "layer", {}), dtypes)
