"""Sources made from another source: smaller clips, and clips followed by images."""

from __future__ import annotations

from typing import cast

import numpy as np
import torch

from .pixels import shrink
from .source import Shape, Source


class ReducedClips(Source):
    """The uint8 clips of another source, made smaller by :func:`shrink` and rounded.

    Raises:
        ValueError: a factor that does not divide height and width.
    """

    def __init__(self, source: Source, factor: int) -> None:
        height, width = source.shape[2:]
        if factor < 1 or height % factor or width % factor:
            raise ValueError(f"data.reduce is {factor}; it must be positive and divide data.size {(height, width)}")
        self.source, self.factor = source, factor
        self.classes, self.captions, self.items = source.classes, source.captions, source.items

    @property
    def shape(self) -> Shape:
        channels, frames, height, width = self.source.shape
        return channels, frames, height // self.factor, width // self.factor

    @property
    def digest(self) -> str | None:
        return self.source.digest

    def __len__(self) -> int:
        return len(self.source)

    def clip(self, index: int, rng: np.random.Generator) -> tuple[np.ndarray, int | tuple[int, ...]]:
        clip, label = self.source.clip(index, rng)
        return shrink(torch.from_numpy(clip).float(), self.factor).round().to(torch.uint8).numpy(), label


class WithImages(Source):
    """Clips of a source followed by ``images`` frames of other clips, for training on both (W.A.L.T, ``walt.py``).

    Each image is a frame drawn from a clip drawn from all, of which the whole is read. Of latents it is the first: only
    that one a causal tokenizer makes of a single frame, as it makes an image's. The label is ``(clip's, *images')``.
    """

    def __init__(self, source: Source, images: int) -> None:
        if images < 1:
            raise ValueError(f"images is {images}; it must be positive")
        self.source, self.images, self.classes = source, images, source.classes

    @property
    def empty_classes(self) -> list[int]:
        return self.source.empty_classes

    @property
    def shape(self) -> Shape:
        channels, frames, height, width = self.source.shape
        return channels, frames + self.images, height, width

    def __len__(self) -> int:
        return len(self.source)

    def clip(self, index: int, rng: np.random.Generator) -> tuple[np.ndarray, tuple[int, ...]]:
        clip, label = self.source.clip(index, rng)
        parts, labels = [clip], [cast(int, label)]  # a source of clips alone has one label per clip
        for _ in range(self.images):
            other, label = self.source.clip(int(rng.integers(len(self))), rng)
            frame = rng.integers(other.shape[1]) if other.dtype == np.uint8 else 0
            parts.append(other[:, frame : frame + 1])
            labels.append(cast(int, label))
        return np.concatenate(parts, axis=1), tuple(labels)
