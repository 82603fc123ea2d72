"""``window_attention``: temporal, spatial, joint, and W.A.L.T's windows with a relative position bias.

The reference takes two batched products and a softmax up to 64 tokens a window and with a bias, and SDPA above. SDPA on
temporal windows, which code bases write, is a column of its own: its flash backward is slow on short sequences, though
its forward can be faster than the reference.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import minisora_kernels as mk
from bench.gpu.launches import BOTH, HALF, TF32, Launch, meta
from bench.gpu.traffic import Traffic
from bench.harness.session import Problem, Random, cases
from bench.harness.shapes import DTYPES, LONG, Triple, Windows
from minisora_kernels.modulation import Norm
from minisora_kernels.ops.window_attention import rotate
from models.denoisers.dit import SIZES


def _windows(kind: str, size: str, grid: Triple, window: Triple, **options) -> Windows:
    heads = SIZES[size]["heads"]
    head_dim = SIZES[size]["width"] // heads
    suffix = " norm+rope" if options.get("norm_and_rope") else " bias" if options.get("bias") else ""
    return Windows(f"{kind} {heads}x{head_dim}{suffix}", grid, window, heads, head_dim, **options)


SHAPES = (
    *(
        _windows(
            f"temporal T{frames} S{side * side}",
            size,
            (frames, side, side),
            (frames, 1, 1),
            norm_and_rope=norm_and_rope,
            quick=(frames, side, size) == (16, 16, "XL"),
            dtypes=DTYPES if side == 16 or (frames, size) == (16, "XL") else LONG,
        )
        for frames in (16, 32)
        for side in (16, 32)
        for size in ("XL", "L")
        for norm_and_rope in (False, True)
    ),
    _windows("spatial 16x(16x16)", "XL", (16, 16, 16), (1, 16, 16)),
    _windows("spatial 4x(32x32)", "L", (4, 32, 32), (1, 32, 32)),
    _windows("joint 4x16x16", "XL", (4, 16, 16), (4, 16, 16)),
    _windows("joint 4x16x16", "XL", (4, 16, 16), (4, 16, 16), norm_and_rope=True, dtypes=LONG),
    *(
        _windows(
            f"W.A.L.T {'x'.join(map(str, window))} b2",
            size,
            (5, 16, 16),
            window,
            batch=2,
            bias=True,
            quick=(window, size) == ((5, 8, 8), "XL"),
        )
        for window in ((1, 16, 16), (5, 8, 8))
        for size in ("L", "XL")
    ),
)


def _length(values: dict[str, Any]) -> int:
    return values["wt"] * values["wh"] * values["ww"]


def _long(values: dict[str, Any]) -> bool:
    from minisora_kernels.triton import window_attention

    return _length(values) > window_attention.SHORT


def _passes(values: dict[str, Any], backward: bool) -> int:
    """Blocks that a long window is cut into; each passes over the whole window."""
    from minisora_kernels.triton import window_attention

    qkv, length = values["qkv"], _length(values)
    return -(-length // window_attention.tiles_of(qkv.dtype, qkv.shape[-1], length)[backward].block)


def _count(values: dict[str, Any]) -> int:
    """Of all samples; each reads the bias."""
    sides = ((values[n], values[f"w{n}"]) for n in "thw")
    return values["qkv"].shape[0] * math.prod(-(-n // size) for n, size in sides)


def _bias_backward(values: dict[str, Any]) -> int:
    """Long windows: for dq, and for dk and dv."""
    return _count(values) * (2 if _long(values) else 1)


TRAFFIC = {
    # The backward reads q and k once more for the gradient of their norm, if they have one. What of a long window is
    # read more than once comes from the caches: k and v of a window and head are 100 KB at 320 tokens; so does the
    # bias, which all windows share. Where q and k are prepared by a pass of their own (windows of more than 512 tokens;
    # not counted in the interpreter), reading what was prepared counts as reading qkv. Edge windows count as whole.
    "window_attention_fwd": Traffic(
        {
            "qkv": lambda values: (1 + 2 * _passes(values, False)) / 3 if _long(values) else 1,
            "bias": _count,
        },
        {"out": 1, "softmax": 1},
    ),
    "window_attention_bwd": Traffic(
        {
            "dout": lambda values: 1 + _passes(values, True) if _long(values) else 1,
            "qkv": lambda values: 5 / 3 + (_passes(values, True) if _long(values) else 0),
            "softmax": 1,
            "out": lambda values: int(_long(values)),
            "bias": _bias_backward,
        },
        {"dqkv": 1},
    ),
}


def problem(shape: Windows, dtype: torch.dtype, device: torch.device) -> Problem:
    random = Random(dtype, device)
    t, h, w = shape.grid
    inputs = {"qkv": random(shape.batch, t * h * w, 3, shape.heads, shape.head_dim)}
    norm: Norm | None = None
    rope = None
    if shape.norm_and_rope:
        inputs |= {name: random(shape.head_dim, scale=0.1, shift=1.0) for name in ("q_weight", "k_weight")}
        norm, rope = "rms", mk.rope_3d(shape.grid, shape.head_dim, device=device)
    if shape.bias:
        length = shape.window[0] * shape.window[1] * shape.window[2]
        inputs["bias"] = random(shape.heads, length, length)

    def call(tensors: dict[str, Any]) -> Tensor:
        return mk.window_attention(grid=shape.grid, window=shape.window, qk_norm=norm, rope=rope, **tensors)

    def sdpa(tensors: dict[str, Tensor]) -> Tensor:
        q, k, v = tensors["qkv"].unbind(2)
        if rope is not None:
            q, k = F.rms_norm(q, q.shape[-1:], eps=1e-6), F.rms_norm(k, k.shape[-1:], eps=1e-6)
            q, k = rotate(q * tensors["q_weight"], rope), rotate(k * tensors["k_weight"], rope)
        # (b t s) heads d -> (b s) heads t d
        q, k, v = (part.unflatten(1, (t, h * w)).transpose(1, 2).flatten(0, 1).transpose(1, 2) for part in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v)
        return out.transpose(1, 2).unflatten(0, (-1, h * w)).transpose(1, 2).reshape(shape.batch, t * h * w, -1)

    written = ("SDPA", sdpa) if shape.temporal else None
    return Problem(inputs, call, written=written, slow_backward=h * w > 256)


@dataclass(frozen=True)
class Style:
    """``weights``: dimensions of the norm's weights, 0 for none; ``halves``: rotary pairing, None for no rotation."""

    norm: Norm | None = None
    weights: int = 0
    halves: bool | None = None
    bias: bool = False

    def __str__(self) -> str:
        parts = [self.norm, {1: "weight", 2: "weight a head"}.get(self.weights), "bias" if self.bias else None]
        parts.append(None if self.halves is None else "halves" if self.halves else "pairs")
        return " ".join(part for part in parts if part) or "plain"


PLAIN, BIASED = Style(), Style(bias=True)
FULL = Style("rms", 1, halves=False)
STYLES = (
    PLAIN,
    BIASED,
    FULL,
    Style("rms", 1, halves=True),
    Style("rms", 2, halves=False),
    Style("layer", 2, halves=True, bias=True),
    Style("layer", 1),
    Style("rms"),
    Style(halves=False),
    Style(halves=True),
)
# One for each tile of a short window: of 16 places with several windows or one, of 32, of 64.
SHORT = (5, 16, 24, 48)
SIDES = (64, 72, 96, 128)


def _window(
    grid: Triple, window: Triple, head_dim: int, style: Style, dtype: torch.dtype, heads: int = 16, batch: int = 2
) -> Problem:
    tensors = {"qkv": meta(dtype, batch, prod(grid), 3, heads, head_dim)}
    if style.weights:
        shape = (head_dim,) if style.weights == 1 else (heads, head_dim)
        tensors |= {name: meta(dtype, *shape) for name in ("q_weight", "k_weight")}
    if style.bias:
        tensors["bias"] = meta(dtype, heads, prod(window), prod(window))
    rope = None
    if style.halves is not None:
        cos, sin = (meta(torch.float32, prod(grid), head_dim // 2) for _ in range(2))
        rope = mk.Rope(cos, sin, not style.halves)
    return Problem(tensors, lambda t: mk.window_attention(grid=grid, window=window, qk_norm=style.norm, rope=rope, **t))


def _launch(kind: str, grid: Triple, window: Triple, side: int, style: Style, dtypes: tuple[str, ...]) -> Launch:
    call = partial(_window, grid, window, side, style)
    return Launch(f"{kind} head_dim {side} {style}", call, dtypes, quick=side <= 72 or style == FULL)


def launches() -> Iterator[Launch]:
    def temporal(length: int, side: int, style: Style, dtypes: tuple[str, ...] = HALF) -> Launch:
        return _launch(f"temporal {length}", (length, 4, 4), (length, 1, 1), side, style, dtypes)

    def spatial(length: int, side: int, style: Style, dtypes: tuple[str, ...] = HALF) -> Launch:
        return _launch(f"spatial {length}", (4, 1, length), (1, 1, length), side, style, dtypes)

    for side in SIDES:
        for style in (PLAIN, BIASED, FULL):
            for length in SHORT:
                yield temporal(length, side, style, BOTH if side == 72 else HALF)
            yield spatial(256, side, style, BOTH if side in (72, 128) else HALF)
    for style in STYLES:
        for length in (5, 48):
            yield temporal(length, 64, style)
        yield spatial(256, 64, style)
        if not style.bias:
            yield spatial(1024, 64, style)  # norm and rotation in a pass of their own, and flash-attn's route
    for side in SIDES[1:]:
        yield spatial(1024, side, FULL)
    for style in (BIASED, Style("rms", 1, halves=False, bias=True)):
        yield spatial(1024, 64, style)
    yield temporal(16, 72, Style("layer", 1))  # whose padding must stay zero
    yield temporal(16, 72, Style("layer", 2, halves=True, bias=True))  # whose halves are padded each
    for style in (Style("rms", 1, halves=True), Style(halves=True)):
        yield temporal(24, 72, style)
        yield temporal(48, 72, style)
    yield spatial(1024, 64, FULL, ("float32",))
    yield temporal(6, 8, FULL, BOTH)  # the narrowest head
    for style in (PLAIN, FULL):
        for length in (5, 16, 32):
            yield temporal(length, 64, style, TF32)
        for side in (64, 128):
            yield spatial(256, side, style, TF32)
    # On several axes, and at an edge that cuts windows.
    for style in (PLAIN, BIASED, FULL):
        yield _launch("edges 2x3x4", (5, 7, 6), (2, 3, 4), 64, style, HALF)
        yield _launch("W.A.L.T 5x8x8", (5, 16, 16), (5, 8, 8), 64, style, HALF)
        yield _launch("joint 4x16x16", (4, 16, 16), (4, 16, 16), 64, style, HALF)


# Small and odd: what the sanitizer runs.
ODD = (
    Windows("packed", (5, 2, 3), (5, 1, 1), 3, 24),
    Windows("norm and rope", (19, 2, 2), (19, 1, 1), 3, 24, norm_and_rope=True),
    Windows("edge windows, bias", (5, 5, 5), (2, 3, 4), 2, 24, bias=True),
    Windows("long", (3, 5, 5), (3, 5, 5), 2, 24, norm_and_rope=True),
    Windows("long, bias", (3, 6, 5), (3, 5, 5), 2, 24, bias=True),
)
# Small: what a call of them costs the host.
HOST = (
    Windows("short", (16, 2, 2), (16, 1, 1), 4, 16),
    Windows("short norm+rope", (16, 2, 2), (16, 1, 1), 4, 16, norm_and_rope=True),
    Windows("short bias", (16, 2, 2), (16, 1, 1), 4, 16, bias=True),
    Windows("long", (16, 4, 4), (16, 4, 4), 4, 16),
)
LAUNCHES = tuple(launches())


@cases(SHAPES)
def test_window_attention(bench, shape: Windows, dtype: str, direction: str):
    bench("window_attention", problem, shape, dtype, direction)
