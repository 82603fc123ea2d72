"""What a source of training clips is.

A source yields uint8 clips ``[C, T, H, W]``, which :class:`models.data.batches.Batches` turns into float batches in
[-1, 1]. A source of latents (``latents.py``) yields float clips, which stay as they are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

# Frames, height and width of a bucket; channels, frames, height and width of a clip.
Bucket = tuple[int, int, int]
Shape = tuple[int, int, int, int]


class Item(NamedTuple):
    """A file of a source, with the number of its class or caption."""

    path: Path
    label: int
    text: str | None = None


class Source(ABC):
    """Clips by index.

    Attributes:
        classes: names of the classes; empty for clips without labels.
        captions: the captions, which labels count; empty for clips without.
        items: the files that the clips are cut from; empty for clips that are not cut from files.
        encoder: what encoded the clips, if they are latents (see :class:`models.data.encoder.Decoder`).
        buckets: ``(T, H, W)`` of the buckets that latents were made with.
        low_shape: ``(C, T, h, w)`` of the small clips for a second stage; None for a source without.
    """

    classes: tuple[str, ...] = ()
    captions: tuple[str, ...] = ()
    items: Sequence[Item] = ()
    encoder: Mapping[str, Any] | None = None
    buckets: Sequence[Bucket] = ()
    low_shape: Shape | None = None

    @property
    def empty_classes(self) -> list[int]:
        """The ids of the classes that no file has, as far as files are known."""
        return sorted(set(range(len(self.classes))) - {item.label for item in self.items}) if self.items else []

    @property
    @abstractmethod
    def shape(self) -> Shape:
        """``(C, T, H, W)`` of every clip."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def clip(self, index: int, rng: np.random.Generator) -> tuple[np.ndarray, int | tuple[int, ...]]:
        """``[C, T, H, W]``, uint8 or float32, and its class or caption (0 without); of ``index`` and ``rng`` only."""

    @property
    def digest(self) -> str | None:
        """A checksum of the files, which stays the same when they are moved; None for clips that no file holds."""
        return None

    def low(self, index: int) -> np.ndarray:
        """The small clip of ``low_shape``, float32.

        Raises:
            ValueError: a source without small clips.
        """
        raise ValueError(f"{type(self).__name__} has no small clips")

    def split(self, buckets: Sequence[Bucket]) -> list[Source]:
        """A source for each bucket ``(frames, height, width)`` that gets a clip.

        Raises:
            ValueError: a source that cannot be split.
        """
        raise ValueError(f"data.buckets is {buckets}; {type(self).__name__} cannot be split into buckets")
