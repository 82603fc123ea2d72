"""Small calls of every op that between them make its launcher choose whatever it can choose.

The benches' shapes are what models run most; these are the rest: every form of a window, every width of a head, rows
of parameters of every kind, widths that no chunk divides, dtypes that meet. `bench.aot` compiles both. The tensors are
"meta" ones, for only shapes, strides and dtypes count. tests/bench/test_aot.py finds kernels, and branches of constants
in them, that none of these calls compiles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import prod

import torch
from torch import Tensor

import minisora_kernels as mk
from bench.harness.session import Problem
from minisora_kernels.modulation import TRITON_WIDEST

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
BOTH, HALF, TF32 = ("float32", "bfloat16"), ("bfloat16",), ("tf32",)  # see PRECISIONS of bench/aot.py
Triple = tuple[int, int, int]


@dataclass(frozen=True)
class Launch:
    """A call by name: ``problem(dtype)`` has its tensors. ``dtypes`` are those it is made in."""

    name: str
    problem: Callable[[torch.dtype], Problem]
    dtypes: tuple[str, ...] = BOTH


def meta(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


# ---- tokens modulated by rows

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
)
MIXED: tuple[tuple, ...] = (
    ("fp32 modulation", PER_SAMPLE, True, "layer", dict.fromkeys((*MODULATION, "weight", "bias"), F32)),
    ("fp32 stream", PER_SAMPLE, False, "layer", {"x": F32}),
    ("fp32 stream per token", PER_TOKEN, False, "layer", {"x": F32}),
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


# ---- windows


@dataclass(frozen=True)
class Style:
    """``weights``: dimensions of the norm's weights, 0 for none; ``halves``: rotary pairing, None for no rotation."""

    norm: str | None = None
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
        cos, sin = (meta(F32, prod(grid), head_dim // 2) for _ in range(2))
        rope = mk.Rope(cos, sin, not style.halves)
    return Problem(tensors, lambda t: mk.window_attention(grid=grid, window=window, qk_norm=style.norm, rope=rope, **t))


def _windows(kind: str, grid: Triple, window: Triple, side: int, style: Style, dtypes: tuple[str, ...]) -> Launch:
    return Launch(f"{kind} head_dim {side} {style}", partial(_window, grid, window, side, style), dtypes)


def windows() -> Iterator[Launch]:
    def temporal(length: int, side: int, style: Style, dtypes: tuple[str, ...] = HALF) -> Launch:
        return _windows(f"temporal {length}", (length, 4, 4), (length, 1, 1), side, style, dtypes)

    def spatial(length: int, side: int, style: Style, dtypes: tuple[str, ...] = HALF) -> Launch:
        return _windows(f"spatial {length}", (4, 1, length), (1, 1, length), side, style, dtypes)

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
    yield spatial(1024, 64, FULL, ("float32",))
    yield temporal(6, 8, FULL, BOTH)  # the narrowest head
    for style in (PLAIN, FULL):
        for length in (5, 16, 32):
            yield temporal(length, 64, style, TF32)
        for side in (64, 128):
            yield spatial(256, side, style, TF32)
    # On several axes, and at an edge that cuts windows.
    for style in (PLAIN, BIASED, FULL):
        yield _windows("edges 2x3x4", (5, 7, 6), (2, 3, 4), 64, style, HALF)
        yield _windows("W.A.L.T 5x8x8", (5, 16, 16), (5, 8, 8), 64, style, HALF)
        yield _windows("joint 4x16x16", (4, 16, 16), (4, 16, 16), 64, style, HALF)


# ---- the other ops


def _patches(
    channels: int, patch: Triple, width: int, biased: bool, placed: bool, dtype: torch.dtype, batch: int = 2
) -> Problem:
    count = (2, 8, 8)
    size = [n * p for n, p in zip(count, patch, strict=True)]
    tensors = {"x": meta(dtype, batch, channels, *size), "weight": meta(dtype, width, channels, *patch)}
    if biased:
        tensors["bias"] = meta(dtype, width)
    if placed:
        tensors["pos"] = meta(dtype, prod(count), width)
    return Problem(tensors, lambda t: mk.patch_embed(**t))


def patches() -> Iterator[Launch]:
    # elements of a patch: 1, 16, 32, 64, 128 (on either side of a short one), 768; odd ones
    for channels, patch in (
        (1, (1, 1, 1)),
        (4, (1, 2, 2)),
        (4, (2, 2, 2)),
        (16, (1, 2, 2)),
        (16, (2, 2, 2)),
        (3, (1, 16, 16)),
        (3, (1, 14, 14)),
    ):
        yield Launch(f"C {channels} {patch}", partial(_patches, channels, patch, 1152, True, True))
    for biased, placed in ((True, False), (False, True), (False, False)):
        name = f"{'bias' if biased else 'no bias'}, {'pos' if placed else 'no pos'}"
        yield Launch(name, partial(_patches, 4, (1, 2, 2), 1152, biased, placed))
        yield Launch(f"{name}, pixels", partial(_patches, 3, (1, 16, 16), 1152, biased, placed))
    for patch in ((1, 2, 2), (1, 16, 16)):
        yield Launch(f"C 4 {patch} tf32", partial(_patches, 4, patch, 1152, True, True), TF32)
    yield Launch("D 33", partial(_patches, 4, (1, 2, 2), 33, True, True))


def _grn(width: int, activation: str | None, dtypes: dict[str, torch.dtype], dtype: torch.dtype) -> Problem:
    shapes = {"x": (2, 4 * 96, width), "weight": (width,), "bias": (width,)}
    tensors = {name: meta(dtypes.get(name, dtype), *shape) for name, shape in shapes.items()}
    return Problem(tensors, lambda t: mk.grn(**t, groups=4, activation=activation))


def responses() -> Iterator[Launch]:
    for activation in (None, "gelu"):
        for width in (7, 512, 2048, 6144, 8192):
            yield Launch(f"C {width} {activation}", partial(_grn, width, activation, {}))
        for name in ("weight", "x"):
            yield Launch(f"fp32 {name} {activation}", partial(_grn, 512, activation, {name: F32}), HALF)


def _mlp(width: int, biased: bool, dtype: torch.dtype) -> Problem:
    shapes: dict[str, tuple[int, ...]] = {"x": (256, width), "w1": (4 * width, width), "w2": (width, 4 * width)}
    if biased:
        shapes |= {"b1": (4 * width,), "b2": (width,)}
    tensors = {name: meta(dtype, *shape) for name, shape in shapes.items()}
    return Problem(tensors, lambda t: mk.gelu_mlp(t["x"], t["w1"], t.get("b1"), t["w2"], t.get("b2")))


def mlps() -> Iterator[Launch]:
    for width in (7, 384, 1024, 1152, 3072):
        yield Launch(f"D {width}", partial(_mlp, width, True))
    yield Launch("no bias", partial(_mlp, 384, False), ("bfloat16", "float32"))  # the last is what --quick takes


def _step(learned: bool, guided: bool, noisy: bool, dtypes: dict[str, torch.dtype], dtype: torch.dtype) -> Problem:
    shape, predicted = (2, 4, 8, 16, 16), (2, 8 if learned else 4, 8, 16, 16)
    shapes: dict[str, tuple[int, ...]] = {"x": shape, "cond": predicted, "coefficients": (2, 5)}
    shapes |= {"null": predicted} if guided else {}
    shapes |= {"z": shape} if noisy else {}
    tensors = {name: meta(dtypes.get(name, dtype), *sizes) for name, sizes in shapes.items()}
    return Problem(tensors, lambda t: mk.guided_step(**t), constants=tuple(tensors))


def steps() -> Iterator[Launch]:
    single = {"coefficients": F32}
    for learned in (False, True):
        for guided in (False, True):
            for noisy in (False, True):
                words = {"learned": learned, "guided": guided, "z": noisy}
                name = ", ".join(word for word, there in words.items() if there) or "plain"
                yield Launch(name, partial(_step, learned, guided, noisy, single))
    yield Launch("fp32 state", partial(_step, True, True, True, single | {"x": F32, "z": F32}), HALF)


def _tokens(channels: int, patch: Triple, dtype: torch.dtype) -> Problem:
    grid = (4, 8, 8)
    tensors = {"tokens": meta(dtype, 2, prod(grid), prod(patch) * channels)}
    return Problem(tensors, lambda t: mk.unpatchify(t["tokens"], grid, patch, channels))


def videos() -> Iterator[Launch]:
    for channels in (1, 3, 4, 8, 16, 32, 96):
        yield Launch(f"C {channels}", partial(_tokens, channels, (1, 2, 2)))
    for patch in ((1, 1, 1), (2, 2, 2), (1, 16, 16)):
        yield Launch(f"patch {patch}", partial(_tokens, 3, patch))


LAUNCHES: dict[str, tuple[Launch, ...]] = {
    **{op: tuple(modulated(op)) for op in NAMES},
    "window_attention": tuple(windows()),
    "patch_embed": tuple(patches()),
    "grn": tuple(responses()),
    "gelu_mlp": tuple(mlps()),
    "guided_step": tuple(steps()),
    "unpatchify": tuple(videos()),
}
