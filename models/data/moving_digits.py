"""Moving handwritten digits, drawn as a pure function of the index and the random generator."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from .source import Bucket, Shape, Source


@functools.cache
def _handwritten() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    return np.round(digits.images * (255 / 16)).astype(np.uint8), digits.target


class MovingDigits(Source):
    """Real handwritten digits of 8x8 pixels that move diagonally over a black canvas and bounce off its edges.

    The images are scikit-learn's 1797 (Alpaydin & Kaynak, UCI 1998); every fifth is ``held_out``, the others are for
    training. Image, place and one of four directions are drawn; a digit moves one pixel a frame on both axes.
    """

    classes = tuple("0123456789")

    def __init__(self, *, frames: int, size: tuple[int, int], stride: int = 1, held_out: bool = False) -> None:
        if min(size) < 9:
            raise ValueError(f"size is {size}; a digit of 8x8 pixels needs 9 or more to move in")
        if frames < 1 or stride < 1:
            raise ValueError(f"frames {frames} and stride {stride} must be positive")
        images, labels = _handwritten()
        chosen = (np.arange(len(images)) % 5 == 4) == held_out
        self.images, self.labels = images[chosen], labels[chosen]
        self.frames, self.size, self.stride = frames, size, stride

    @property
    def shape(self) -> Shape:
        return 1, self.frames, *self.size

    def __len__(self) -> int:
        return len(self.images)

    def clip(self, index: int, rng: np.random.Generator) -> tuple[np.ndarray, int]:
        clip = np.zeros(self.shape, dtype=np.uint8)
        room = np.array(self.size) - 8
        start = rng.integers(0, room + 1)
        speed = rng.choice((-1, 1), size=2) * self.stride
        for frame in range(self.frames):
            # A bounce is a triangle wave of the place that the digit would have without walls.
            place = (start + speed * frame) % (2 * room)
            top, left = np.minimum(place, 2 * room - place)
            clip[0, frame, top : top + 8, left : left + 8] = self.images[index]
        return clip, int(self.labels[index])

    def split(self, buckets: Sequence[Bucket]) -> list[Source]:
        """A source for each bucket ``(frames, height, width)``, with equally many digits, for all suit them alike."""
        order = np.random.default_rng(0).permutation(len(self))
        parts: list[Source] = []
        for number, (frames, height, width) in enumerate(buckets):
            chosen = np.sort(order[number :: len(buckets)])
            part = MovingDigits(frames=frames, size=(height, width), stride=self.stride)
            part.images, part.labels = self.images[chosen], self.labels[chosen]
            parts.append(part)
        return parts
