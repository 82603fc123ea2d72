"""The named shapes of the benches, derived from the models' size tables.

A name says the model size and the clip: ``XL/2 16x256x256 b2`` is DiT-XL with patch 1x2x2 on 16 latent frames of
256x256 pixels, batch 2. Latents have an eighth of the pixels per side. Shapes with ``quick`` are what ``--quick`` runs.
The longest are run in bfloat16 only: a whole run is to take less than 25 minutes on two cores.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from math import ceil, prod
from typing import Any, Literal

import torch

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


def model_tokens(size: str, clip: Triple, batch: int, per_frame: bool = False, **options) -> Tokens:
    name = f"{size}/2 {'x'.join(map(str, clip))} b{batch}" + (" per frame" if per_frame else "")
    return Tokens(name, batch, prod(tokens(*clip)), SIZES[size]["width"], clip[0] if per_frame else 1, **options)


# What goes through an MLP.
MLPS = (
    model_tokens("S", (16, 256, 256), 1),
    model_tokens("B", (16, 256, 256), 1, quick=True),
    model_tokens("XL", (16, 256, 256), 1, dtypes=LONG),
)

# Where a model modulates its tokens by rows; two of them for what has no rows of its own.
MODULATED = (
    model_tokens("XL", (16, 256, 256), 2, quick=True),
    model_tokens("S", (4, 256, 256), 2),
    model_tokens("XL", (16, 512, 512), 1),
    model_tokens("XL", (16, 256, 256), 2, per_frame=True),
    model_tokens("XL", (16, 480, 640), 1, dtypes=LONG),
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


@dataclass(frozen=True)
class Heads:
    """Queries or keys ``[batch, count, heads, head_dim]``, and whose angles they turn by: a token's, or a head's.

    ``rope`` is "", "token" or "head".
    """

    name: str
    batch: int
    count: int
    heads: int
    head_dim: int
    across: bool = False
    rope: str = "token"
    quick: bool = False
    dtypes: tuple[str, ...] = DTYPES


@dataclass(frozen=True)
class Keys:
    """Queries ``[batch, count, heads, head_dim]`` and ``keys`` tokens that they attend to.

    With ``padded`` some keys of each sample do not count, half of them in the last one. With ``turned`` there are a
    norm across heads and rotary tables.
    """

    name: str
    batch: int
    count: int
    keys: int
    heads: int
    head_dim: int
    padded: bool = False
    turned: bool = False
    quick: bool = False
    dtypes: tuple[str, ...] = DTYPES

    @property
    def lengths(self) -> list[int]:
        return [self.keys - self.keys * (b + 1) // (2 * self.batch) for b in range(self.batch)]


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


def video_patches(channels: int, size: Triple, patch: Triple, quick: bool = False) -> Patches:
    name = f"{channels}x{'x'.join(map(str, size))} patch {'x'.join(map(str, patch))}"
    return Patches(name, channels, size, patch, quick=quick)


@dataclass(frozen=True)
class Responses:
    """What the middle of a ResBlock normalises: ``[batch, frames * side^2, width]``, with the GELU before it or not."""

    name: str
    frames: int
    side: int
    width: int
    activation: Literal["gelu"] | None
    batch: int = 1
    quick: bool = False
    dtypes: tuple[str, ...] = DTYPES


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


@dataclass(frozen=True)
class Model:
    """A DiT on latents, and how many samples it gets."""

    name: str
    config: DiTConfig
    batch: int = 1
    quick: bool = False
    dtypes: tuple[str, ...] = DTYPES


def elements(shape: Any) -> int:
    """Of the tensors that a forward of the shape's op must read and write, but for weights; of Patches the fewer of
    the two ops that have them.
    """
    if isinstance(shape, Tokens):
        return 2 * shape.batch * shape.count * shape.width
    if isinstance(shape, Windows):
        return 4 * shape.batch * prod(shape.grid) * shape.heads * shape.head_dim
    if isinstance(shape, Heads):
        return 2 * shape.batch * shape.count * shape.heads * shape.head_dim
    if isinstance(shape, Keys):
        return 2 * shape.batch * (shape.count + shape.keys) * shape.heads * shape.head_dim
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
