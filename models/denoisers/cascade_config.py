"""The settings and published sizes of StableCascade's stages; the model is in ``cascade.py``."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

from ..protocols import BaseSettings
from .layers import Grid

LETTERS = "CTAFV"


SIZES: dict[str, dict[str, Any]] = {
    "c-3.6b": {
        "widths": (2048, 2048),
        "heads": (32, 32),
        "levels": ("CTA", "CTA"),
        "down": (8, 24),
        "up": (24, 8),
        "repeats": (1, 1),
        "dropout": (0.1, 0.1),
        "patch": (1, 1),
        "condition_width": 2048,
    },
    "c-1b": {
        "widths": (1536, 1536),
        "heads": (24, 24),
        "levels": ("CTA", "CTA"),
        "down": (4, 12),
        "up": (12, 4),
        "repeats": (1, 1),
        "dropout": (0.1, 0.1),
        "patch": (1, 1),
        "condition_width": 1536,
    },
    "c-tiny": {"levels": ("CTA", "CTA"), "patch": (1, 1)},
    "b-1.5b": {
        "widths": (320, 640, 1280, 1280),
        "heads": (5, 10, 20, 20),
        "levels": ("CT", "CT", "CTA", "CTA"),
        "down": (2, 6, 28, 6),
        "up": (6, 28, 6, 2),
        "repeats": (3, 3, 2, 2),
        "dropout": (0.0, 0.0, 0.1, 0.1),
        "patch": (2, 2),
        "downsample": True,
        "condition_width": 1280,
        "latent_channels": 16,
        "pixel_channels": 3,
    },
    "b-700m": {
        "widths": (320, 576, 1152, 1152),
        "heads": (5, 9, 18, 18),
        "levels": ("CT", "CT", "CTA", "CTA"),
        "down": (2, 4, 14, 4),
        "up": (4, 14, 4, 2),
        "repeats": (2, 2, 2, 2),
        "dropout": (0.0, 0.0, 0.1, 0.1),
        "patch": (2, 2),
        "downsample": True,
        "condition_width": 1280,
        "latent_channels": 16,
        "pixel_channels": 3,
    },
    "b-tiny": {
        "widths": (32, 64),
        "levels": ("CT", "CTA"),
        "repeats": (2, 2),
        "patch": (2, 2),
        "downsample": True,
        "latent_channels": 16,
        "pixel_channels": 3,
    },
}


"""The published sizes, as image models, and a tiny one of each stage. Upstream's code calls the larger B "3B"."""


@dataclass(frozen=True)
class CascadeSettings(BaseSettings):
    """What a stage is, whatever it is trained on. Tuples have an entry a level."""

    name: ClassVar[str] = "cascade"

    widths: tuple[int, ...] = (64, 64)
    """C of each level, a multiple of its heads."""
    heads: tuple[int, ...] = (4, 4)
    """Attention heads per level; ignored where a level has neither A nor V."""
    levels: tuple[str, ...] = ("CTAV", "CTAV")
    """Block letters of C, T, A, F and V, each at most once, C first."""
    down: tuple[int, ...] = (1, 2)
    """Number of repetitions of a level's letters on the way down."""
    up: tuple[int, ...] = (2, 1)
    """Number of repetitions of a level's letters on the way up, from the deepest level."""
    repeats: tuple[int, ...] = (1, 1)
    """Number of times that the blocks of a level run on the way up, from the deepest level."""
    patch: tuple[int, ...] = (1, 1, 1)
    """(1, p, p), or (p, p) for an image model, which needs data.frames = 1."""
    downsample: bool = False
    """Halve height and width from level to level, as stage B does."""
    temporal_convolution: bool = False
    """Add a depthwise convolution over three frames to C, after the one over the frame; it starts at 0."""
    condition_width: int = 64
    """Channels of the conditioning tokens."""
    condition_tokens: int = 4
    """Number of tokens per class."""
    class_dropout: float = 0.1
    """Share of labels or captions that training replaces by the null class or an empty caption; guidance needs it."""
    captions: Literal["tokens", "pooled", "both"] = "tokens"
    """What is read of captions: their tokens; the first token alone, a pooled caption that gives condition_tokens
    tokens; or both, the pooled caption first."""
    null_tokens: int = 0
    """Rows of a fixed null caption, as published weights have; with 0 the null caption has no token."""
    image_width: int = 0
    """Width of the embedding of a picture that may stand beside the caption; 0 for none."""
    further_times: tuple[str, ...] = ()
    """Further inputs of T by name, which are told 0: 'sca', and in stage C 'crp', in published weights."""
    latent_channels: int = 0
    """Channels of the clips that condition stage B, `--low` of models.precompute in training; 0 for none. The published
    16 are features of an EfficientNet, which models.precompute does not compute."""
    latent_dropout: float = 0.1
    """Share of samples whose condition training replaces by zeros, which mean none."""
    pixel_channels: int = 0
    """Channels of an optional picture that also conditions stage B; 0 for none."""
    dropout: tuple[float, ...] = (0.1, 0.1)
    """Dropout inside C and F."""

    @property
    def is_image(self) -> bool:
        return len(self.patch) == 2


S = TypeVar("S", bound="CascadeSettings")


def with_time(image: S, **changes: Any) -> S:
    """The video model of an image model's size, with further changes: V after every A."""
    levels = tuple(letters.replace("A", "AV") for letters in image.levels)
    return dataclasses.replace(image, levels=levels, patch=(1, *image.patch), **changes)


@dataclass(frozen=True, kw_only=True)
class CascadeConfig(CascadeSettings):
    """What a stage is built from; survives ``dataclasses.asdict``, JSON and ``CascadeConfig(**values)``.

    Args:
        input_size: cells of the input: ``(T, H, W)`` for video, ``(H, W)`` for images; each a multiple of ``patch``.
        channels: of the input.
        num_classes: 0 for a model without classes.
        text_width: E of the captions' states; 0 for a model without text. A model may have both; each call gives
            classes or a Text.

    Raises:
        ValueError: a value that does not fit, by name.
    """

    input_size: tuple[int, ...]
    channels: int
    num_classes: int = 0
    text_width: int = 0

    def __post_init__(self) -> None:
        per_level = ("widths", "heads", "levels", "down", "up", "repeats", "dropout")
        for name in ("input_size", "patch", "further_times", *per_level):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if len(self.input_size) not in (2, 3) or any(n < 1 for n in self.input_size):
            raise ValueError(f"input_size is {self.input_size}; it must be (T, H, W) or (H, W), positive")
        if len(self.patch) != len(self.input_size) or any(p < 1 for p in self.patch):
            raise ValueError(f"patch is {self.patch}; it must have one positive number per axis of {self.input_size}")
        if self.patch[:-2] not in ((), (1,)):
            raise ValueError(f"patch is {self.patch}; a token is of one frame, so its first number must be 1")
        if any(n % p for n, p in zip(self.input_size, self.patch, strict=True)):
            raise ValueError(f"patch is {self.patch}; it must divide input_size {self.input_size}")
        if not self.widths:
            raise ValueError("widths is (); there must be at least one level")
        for name in per_level:
            if len(getattr(self, name)) != len(self.widths):
                raise ValueError(f"{name} is {getattr(self, name)}; it must have {len(self.widths)} entries, as widths")
        for name in ("widths", "heads", "down", "up", "repeats"):
            if min(getattr(self, name)) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; all must be positive")
        for letters in self.levels:
            if not letters.startswith("C") or len(set(letters)) < len(letters) or not set(letters) <= set(LETTERS):
                raise ValueError(f"levels is {self.levels}; each must be letters of {LETTERS}, each once, C first")
        if len(self.patch) == 2 and (self.temporal_convolution or "V" in "".join(self.levels)):
            raise ValueError(f"patch is {self.patch}, an image model's, which has no V and no temporal_convolution")
        for letters, width, heads in zip(self.levels, self.widths, self.heads, strict=True):
            if set(letters) & set("AV") and (width % heads or width // heads % 2):
                raise ValueError(f"widths is {self.widths}; each must be an even multiple of heads {self.heads}")
        if self.downsample and min(self.grid[1:]) < 2 ** (len(self.widths) - 1):
            raise ValueError(f"downsample is True; {len(self.widths)} levels need more tokens than {self.grid}")
        for name in ("channels", "condition_width", "condition_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive")
        for name in ("num_classes", "text_width", "latent_channels", "pixel_channels", "null_tokens", "image_width"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0 (none) or positive")
        if self.captions not in ("tokens", "pooled", "both"):
            raise ValueError(f"captions is {self.captions!r}; it may be 'tokens', 'pooled' or 'both'")
        for name in ("null_tokens", "image_width"):
            if getattr(self, name) and not self.text_width:
                raise ValueError(f"{name} is {getattr(self, name)}; it goes with text")
        if len(set(self.further_times)) < len(self.further_times) or not all(map(str.isidentifier, self.further_times)):
            raise ValueError(f"further_times is {self.further_times}; it must be different names")
        for name, shares in (
            ("class_dropout", [self.class_dropout]),
            ("latent_dropout", [self.latent_dropout]),
            ("dropout", self.dropout),
        ):
            if not all(0 <= share <= 1 for share in shares):
                raise ValueError(f"{name} is {getattr(self, name)}; it must be in [0, 1]")

    @property
    def grid(self) -> Grid:
        """Tokens per axis ``(T, H', W')`` of the first level; T is 1 for images."""
        t, h, w = (1,) * (3 - len(self.patch)) + tuple(n // p for n, p in zip(self.input_size, self.patch, strict=True))
        return t, h, w

    @property
    def grids(self) -> list[Grid]:
        """The grid of each level."""
        (t, h, w), factor = self.grid, 2 if self.downsample else 1
        return [(t, h // factor**i, w // factor**i) for i in range(len(self.widths))]
