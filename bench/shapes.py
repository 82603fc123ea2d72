"""The named shapes of the benches, derived from the models' size tables.

A name says the model size and the clip: ``XL/2 16x256x256 b2`` is DiT-XL with patch 1x2x2 on 16 latent frames of
256x256 pixels, batch 2. Latents have an eighth of the pixels per side. Shapes with ``quick`` are what ``--quick`` runs.
The longest are run in bfloat16 only: a whole run is to take less than 25 minutes on two cores.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from math import ceil, prod
from typing import Any

import torch

from models.denoisers.cascade_config import SIZES as CASCADE
from models.denoisers.dit import SIZES, DiTConfig

Triple = tuple[int, int, int]

# On a GPU an op moves at least as much: what an H200 copies in 60 us, where a launch of Python's takes up to 50.
GPU_BYTES = 256 << 20

DTYPES = ("float32", "bfloat16")
LONG = ("bfloat16",)


def latents(frames: int, height: int, width: int) -> Triple:
    """Size of the latents of a clip of ``height x width`` pixels, as its autoencoder leaves them."""
    return frames, height // 8, width // 8


def tokens(frames: int, height: int, width: int) -> Triple:
    """Grid of tokens of that clip, patch 1x2x2."""
    t, h, w = latents(frames, height, width)
    return t, h // 2, w // 2


@dataclass(frozen=True)
class Tokens:
    """``[batch, N, width]`` tokens with ``rows`` rows of modulation per sample."""

    name: str
    batch: int
    count: int
    width: int
    rows: int = 1
    quick: bool = False
    dtypes: tuple[str, ...] = DTYPES


def _tokens(size: str, clip: Triple, batch: int, per_frame: bool = False, **options) -> Tokens:
    name = f"{size}/2 {'x'.join(map(str, clip))} b{batch}" + (" per frame" if per_frame else "")
    return Tokens(name, batch, prod(tokens(*clip)), SIZES[size]["width"], clip[0] if per_frame else 1, **options)


GATE_RESIDUAL = (_tokens("XL", (16, 256, 256), 2, quick=True), _tokens("S", (4, 256, 256), 2))
MODULATED = (
    *GATE_RESIDUAL,
    _tokens("XL", (16, 512, 512), 1),
    _tokens("XL", (16, 256, 256), 2, per_frame=True),
    _tokens("XL", (16, 480, 640), 1, dtypes=LONG),
)


@dataclass(frozen=True)
class Windows:
    """``[batch, T*H*W, 3, heads, head_dim]`` and the windows on that grid."""

    name: str
    grid: Triple
    window: Triple
    heads: int
    head_dim: int
    batch: int = 1
    norm_and_rope: bool = False
    bias: bool = False
    quick: bool = False
    dtypes: tuple[str, ...] = DTYPES

    @property
    def temporal(self) -> bool:
        return self.window == (self.grid[0], 1, 1)


def _windows(kind: str, size: str, grid: Triple, window: Triple, **options) -> Windows:
    heads = SIZES[size]["heads"]
    head_dim = SIZES[size]["width"] // heads
    suffix = " norm+rope" if options.get("norm_and_rope") else " bias" if options.get("bias") else ""
    return Windows(f"{kind} {heads}x{head_dim}{suffix}", grid, window, heads, head_dim, **options)


WINDOW_ATTENTION = (
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


@dataclass(frozen=True)
class Patches:
    """A video ``[batch, channels, T, H, W]`` and its patches of ``width`` channels."""

    name: str
    channels: int
    size: Triple
    patch: Triple
    width: int = SIZES["XL"]["width"]
    batch: int = 1
    quick: bool = False
    dtypes: tuple[str, ...] = DTYPES

    @property
    def grid(self) -> Triple:
        t, h, w = (n // p for n, p in zip(self.size, self.patch, strict=True))
        return t, h, w


def _patches(channels: int, size: Triple, patch: Triple, quick: bool = False) -> Patches:
    name = f"{channels}x{'x'.join(map(str, size))} patch {'x'.join(map(str, patch))}"
    return Patches(name, channels, size, patch, quick=quick)


PATCH_EMBED = (
    *(
        _patches(4, latents(16, side, side), patch, quick=(side, patch) == (256, (1, 2, 2)))
        for side in (256, 512)
        for patch in ((1, 2, 2), (2, 2, 2))
    ),
    _patches(3, (16, 64, 64), (2, 4, 4)),
    _patches(3, (16, 256, 256), (1, 16, 16)),
)
UNPATCHIFY = tuple(
    _patches(channels, latents(16, side, side), (1, 2, 2), quick=(channels, side) == (8, 256))
    for channels in (4, 8)  # 8: with a learned variance
    for side in (256, 512)
)


GELU_MLP = (
    _tokens("S", (16, 256, 256), 1),
    _tokens("B", (16, 256, 256), 1, quick=True),
    _tokens("XL", (16, 256, 256), 1, dtypes=LONG),
)


@dataclass(frozen=True)
class Responses:
    """What the middle of a ResBlock normalises: ``[batch, frames * side^2, width]``, with the GELU before it or not."""

    name: str
    frames: int
    side: int
    width: int
    activation: str | None
    batch: int = 1
    quick: bool = False
    dtypes: tuple[str, ...] = DTYPES


def _responses(stage: str, frames: int, side: int, channels: int, activation: str | None, **options) -> Responses:
    name = f"{stage} {frames}x{side}x{side} C {4 * channels}" + (f" {activation}" if activation else "")
    return Responses(name, frames, side, 4 * channels, activation, **options)


# StableCascade: stage C of 3.6B on frames of 1024x1024 and 512x512 pixels, of 1B, a level of stage B, a small model.
GRN = (
    _responses("C 3.6B", 4, 24, CASCADE["c-3.6b"]["widths"][0], "gelu", quick=True),
    _responses("C 3.6B", 4, 24, CASCADE["c-3.6b"]["widths"][0], None),
    _responses("C 3.6B", 8, 12, CASCADE["c-3.6b"]["widths"][0], "gelu"),
    _responses("C 1B", 1, 24, CASCADE["c-1b"]["widths"][0], "gelu"),
    _responses("B", 1, 64, CASCADE["b-1.5b"]["widths"][1], "gelu"),
    _responses("small", 8, 12, 128, "gelu"),
)


@dataclass(frozen=True)
class Latents:
    """``[batch, channels, T, H, W]`` in a step of Euler, or of DDPM with a learned variance."""

    name: str
    size: Triple
    ancestral: bool
    batch: int
    channels: int = 4
    quick: bool = False
    dtypes: tuple[str, ...] = DTYPES


def _latents(clip: Triple, ancestral: bool, batch: int, **options) -> Latents:
    name = f"{'ddpm' if ancestral else 'euler'} {'x'.join(map(str, clip))} b{batch}"
    return Latents(name, latents(*clip), ancestral, batch, **options)


GUIDED_STEP = tuple(
    _latents((16, side, side), ancestral, 4, quick=side == 256) for ancestral in (False, True) for side in (256, 512)
)


@dataclass(frozen=True)
class Model:
    """A DiT on latents, and how many samples it gets."""

    name: str
    config: DiTConfig
    batch: int = 1
    quick: bool = False
    dtypes: tuple[str, ...] = DTYPES


def _model(size: str, clip: Triple, depth: int | None = None, **options) -> Model:
    settings: dict = {**SIZES[size], **({} if depth is None else {"depth": depth})}
    config = DiTConfig(
        input_size=latents(*clip),
        patch=(1, 2, 2),
        channels=4,
        attention="factorized",
        num_classes=10,
        class_dropout=0.0,
        **settings,
    )
    return Model(f"factorized {size}/2 {'x'.join(map(str, clip))} b1", config, **options)


BLOCK = (_model("XL", (16, 256, 256), quick=True, depth=2, dtypes=LONG),)
TRAINING_STEP = (
    _model("B", (16, 256, 256), dtypes=LONG),
    _model("S", (16, 256, 256), dtypes=LONG),
    _model("S", (8, 256, 256), dtypes=("float32",)),
)
SAMPLING_STEP = TRAINING_STEP[:2]  # in float32 a sampling run does
# A short clip: the shorter, the more of a step goes into what does not depend on the tokens.
SAMPLING_RUN = (_model("XL", (1, 256, 256), depth=2),)


def elements(shape: Any) -> int:
    """Of the tensors that a forward of the shape's op must read and write, but for weights; of Patches the fewer of
    the two ops that have them.
    """
    if isinstance(shape, Tokens):
        return 2 * shape.batch * shape.count * shape.width
    if isinstance(shape, Windows):
        return 4 * shape.batch * prod(shape.grid) * shape.heads * shape.head_dim
    if isinstance(shape, Patches):
        return 2 * shape.batch * shape.channels * prod(shape.size)
    if isinstance(shape, Responses):
        return 2 * shape.batch * shape.frames * shape.side**2 * shape.width
    return 4 * shape.batch * shape.channels * prod(shape.size)  # Latents: x, two predictions, x'


def on_device(shape: Any, device: torch.device) -> Any:
    """The shape that is run there: on a GPU with a batch that moves :data:`GPU_BYTES`."""
    if device.type != "cuda" or isinstance(shape, Model):
        return shape
    times = ceil(GPU_BYTES / (2 * elements(shape)))
    if times <= 1:
        return shape
    batch = times * shape.batch
    return replace(shape, name=re.sub(r" b\d+\b|$", f" b{batch}", shape.name, count=1), batch=batch)
