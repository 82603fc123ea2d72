"""The settings of W.A.L.T; the model is in ``walt.py``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ..objectives.common import TIMESTEPS
from ..protocols import BaseSettings
from .layers import Grid

PAST_FRAMES = 2


@dataclass(frozen=True)
class WALTSettings(BaseSettings):
    """What a W.A.L.T is, whatever it is trained on."""

    name: ClassVar[str] = "walt"
    needs_ddpm: ClassVar[tuple[str, ...]] = ("self_conditioning", "past", "low_resolution")

    width: int = 192
    """D, a multiple of heads."""
    depth: int = 6
    heads: int = 3
    patch: tuple[int, int, int] = (1, 1, 1)
    """Frames (always 1), rows and columns per token."""
    mlp_ratio: float = 4.0
    """Hidden width of the MLP over the width."""
    spatial_window: tuple[int, int] = (16, 16)
    """Rows and columns of a window in even layers; a shorter axis is one window."""
    spatiotemporal_window: tuple[int, int, int] = (5, 8, 8)
    """Frames, rows and columns of a window in odd layers."""
    lora_rank: int = 2
    """Rank r of the matrix by which a layer's modulation differs from the first layer's."""
    cross_attention: Literal["all", "spatial"] = "all"
    """Layers that read the text; with data.images only 'spatial'."""
    class_dropout: float = 0.1
    """Share of labels or captions that training drops; guidance needs it."""
    self_conditioning: float = 0.9
    """Share of training samples that get an estimate of the data; 0 turns self-conditioning off. Objective 'ddpm'
    only."""
    past: float = 0.0
    """Share of training samples that get their first frames; 0 turns frame prediction off. Objective 'ddpm' only."""
    low_resolution: bool = False
    """Make a 2x super-resolution stage: the clip at half the height and width is an input. Objective 'ddpm' only."""
    low_noise: int = 200
    """Highest level of the noise that training adds to the small clip, below 1000; with low_resolution only."""

    def check_images(self, images: int, *, text: bool) -> None:
        if images and text and self.cross_attention != "spatial":
            raise ValueError(f"data.images is {images}; with text.encoder it needs model.cross_attention 'spatial'")


@dataclass(frozen=True, kw_only=True)
class WALTConfig(WALTSettings):
    """What a W.A.L.T is built from; survives ``dataclasses.asdict``, JSON and ``WALTConfig(**values)``.

    Args:
        input_size: cells of the input, pixels or latents: ``(T, H, W)``, H and W multiples of ``patch``; T = 1 for
            images.
        channels: of the input.
        num_classes: 0 for a model without.
        text_width: E of the captions' states; 0 for a model without text. Not together with classes.

    Raises:
        ValueError: a value that does not fit, by name.
    """

    input_size: tuple[int, int, int]
    channels: int
    num_classes: int = 0
    text_width: int = 0

    def __post_init__(self) -> None:
        for name, count in (("input_size", 3), ("patch", 3), ("spatial_window", 2), ("spatiotemporal_window", 3)):
            value = tuple(getattr(self, name))
            object.__setattr__(self, name, value)
            if len(value) != count or any(n < 1 for n in value):
                raise ValueError(f"{name} is {value}; it must be {count} positive numbers")
        if self.patch[0] != 1:
            raise ValueError(f"patch is {self.patch}; a token must be of one frame: (1, rows, columns)")
        if any(n % p for n, p in zip(self.input_size, self.patch, strict=True)):
            raise ValueError(f"patch is {self.patch}; it must divide input_size {self.input_size}")
        for name in ("channels", "width", "depth", "heads", "lora_rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive")
        if self.width % self.heads:
            raise ValueError(f"width is {self.width}; it must be a multiple of heads = {self.heads}")
        if int(self.width * self.mlp_ratio) < 1:
            raise ValueError(f"mlp_ratio is {self.mlp_ratio}; the MLP must have at least one hidden unit")
        for name in ("num_classes", "text_width"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0 (none) or positive")
        if self.num_classes and self.text_width:
            raise ValueError(f"text_width is {self.text_width}; with {self.num_classes} classes it must be 0")
        if self.cross_attention not in ("all", "spatial"):
            raise ValueError(f"cross_attention is {self.cross_attention!r}; it may be 'all' or 'spatial'")
        for name in ("class_dropout", "self_conditioning", "past"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be in [0, 1]")
        if self.past and self.input_size[0] == 1:
            raise ValueError(f"past is {self.past}; with one frame there is none to predict: it must be 0")
        if self.low_resolution and any(n % 2 for n in self.input_size[1:]):
            raise ValueError(f"low_resolution is True; input_size {self.input_size} must have an even height and width")
        if not 0 <= self.low_noise < TIMESTEPS:
            raise ValueError(f"low_noise is {self.low_noise}; it must be in 0..{TIMESTEPS - 1}")

    @property
    def grid(self) -> Grid:
        """Tokens per axis ``(T', H', W')``."""
        t, h, w = (n // p for n, p in zip(self.input_size, self.patch, strict=True))
        return t, h, w

    @property
    def known_frames(self) -> int:
        """The most first frames of a clip that training tells; 0 without ``past``."""
        return min(PAST_FRAMES, self.input_size[0] - 1) if self.past else 0

    def window(self, layer: int) -> Grid:
        """The window of a layer, no longer than the grid on any axis: within a frame in even layers."""
        sizes = self.spatiotemporal_window if layer % 2 else (1, *self.spatial_window)
        t, h, w = (min(size, n) for size, n in zip(sizes, self.grid, strict=True))
        return t, h, w
