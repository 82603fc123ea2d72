"""Launches of the ops that take tokens and rows of parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

import minisora_kernels as mk
from bench.gpu.launches import BOTH, HALF, Launch, meta
from bench.harness.session import Problem
from bench.harness.shapes import Triple
from minisora_kernels.modulation import TRITON_WIDEST

MODULATION = ("gate", "shift", "scale")
PARAMETERS = (*MODULATION, "weight", "bias")
NAMES = {
    "adaln": ("x", "shift", "scale", "weight", "bias"),
    "gate_residual": ("x", "branch", "gate", "branch_bias"),
    "gate_residual_adaln": ("x", "branch", "gate", "branch_bias", "shift", "scale", "weight", "bias"),
}
TOKENS = 48
PER_SAMPLE, PER_TOKEN = (1, 1, 1), (TOKENS,) * 3
WIDTHS = (7, 768, 1024, 1151, 3072)


@dataclass(frozen=True)
class Form:
    """What a call may differ in. ``index`` is the shape of one, ``frozen`` get no gradient."""

    name: str
    rows: Triple = PER_SAMPLE
    affine: bool = False
    branch_bias: bool = False
    index: tuple[int, ...] = ()
    norm: str = "layer"
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)
    absent: Sequence[str] = ()
    frozen: Sequence[str] = ()


FORMS = (
    Form("affine", affine=True),
    Form("rms", norm="rms"),
    Form("affine rms", affine=True, norm="rms"),
    Form("per token", PER_TOKEN),
    Form("affine per token", PER_TOKEN, affine=True),
    Form("gate per token", (TOKENS, 1, 1)),
    Form("shift per token", (1, TOKENS, 1), affine=True),
    Form("scale per token", (1, 1, TOKENS), affine=True),
    Form("rows of 6, 4, 3", (6, 4, 3), affine=True),
    Form("a run a row", (12, 12, 12)),
    Form("no shift", absent=("shift",)),
    Form("no scale", affine=True, absent=("scale",)),
    Form("no gate", absent=("gate",)),
    Form("no rows", affine=True, absent=MODULATION),
    Form("frozen parameters", affine=True, frozen=PARAMETERS),
    Form("frozen parameters per token", PER_TOKEN, affine=True, frozen=PARAMETERS),
    Form("frozen tokens", frozen=("x", "branch", "gate")),
    Form("frozen affine tokens", affine=True, frozen=("x", "branch", "gate")),
    Form("frozen rows", frozen=MODULATION),
    Form("frozen x", frozen=("x",)),
    Form("frozen branch", frozen=("branch",)),
    Form("fp32 modulation", affine=True, dtypes=dict.fromkeys(PARAMETERS, torch.float32)),
    Form("fp32 stream", dtypes={"x": torch.float32}),
    Form("fp32 stream per token", PER_TOKEN, dtypes={"x": torch.float32}),
    Form("branch bias", affine=True, branch_bias=True),
    Form("branch bias per token", PER_TOKEN, branch_bias=True),
    Form("branch bias, frozen branch", branch_bias=True, frozen=("branch",)),
    Form("branch bias, no gate", branch_bias=True, absent=("gate",)),
    Form("index", (3, 3, 3), affine=True, index=(TOKENS,)),
    Form("index per sample", (3, 3, 3), index=(2, TOKENS)),
    Form("index, no scale", (3, 3, 3), affine=True, index=(TOKENS,), absent=("scale",)),
    Form("index, branch bias", (3, 3, 3), affine=True, branch_bias=True, index=(TOKENS,)),
)


def _modulated(op: str, width: int, form: Form, dtype: torch.dtype) -> Problem:
    shapes: dict[str, tuple[int, ...]] = {"x": (2, TOKENS, width), "branch": (2, TOKENS, width)}
    shapes |= {name: (2, count, width) for name, count in zip(MODULATION, form.rows, strict=True)}
    if form.branch_bias:
        shapes["branch_bias"] = (width,)
    if form.affine:
        shapes |= {"weight": (width,)} if form.norm == "rms" else {"weight": (width,), "bias": (width,)}
    names = [name for name in NAMES[op] if name in shapes and name not in form.absent]
    tensors = {name: meta(form.dtypes.get(name, dtype), *shapes[name]) for name in names}
    options: dict[str, Any] = dict.fromkeys(name for name in NAMES[op] if name in form.absent)
    options |= {} if op == "gate_residual" else {"norm": form.norm}
    options |= {"index": meta(torch.int64, *form.index)} if form.index else {}
    # Not as the problem's constants: of those bench.aot launches the gradients too.
    options |= {name: tensors.pop(name) for name in names if name in form.frozen}
    return Problem(tensors, lambda t: getattr(mk, op)(**t, **options))


def differs(op: str, form: Form) -> bool:
    """Whether the form says anything of an op's own tensors, and leaves a gradient to compute."""
    if form.branch_bias:
        return op != "adaln"
    if op == "gate_residual" and (form.affine or form.norm == "rms"):
        return False
    particular, own = {*form.absent, *form.frozen}, set(NAMES[op])
    return not particular or bool(particular & own and own - set(form.frozen))


def modulated(op: str) -> Iterator[Launch]:
    for form in FORMS:
        if differs(op, form):
            yield Launch(form.name, partial(_modulated, op, 1152, form), HALF if form.dtypes else BOTH)
    for width in (*WIDTHS, TRITON_WIDEST):
        dtypes = BOTH if width in (7, TRITON_WIDEST) else HALF
        yield Launch(f"D {width}", partial(_modulated, op, width, Form("")), dtypes)
