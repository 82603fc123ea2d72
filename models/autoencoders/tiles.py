"""Decoding in parts that overlap, to save memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tile:
    """The parts in which :meth:`CausalTokenizer.decode` takes latents, to save memory.

    In time the parts are consecutive and every convolution keeps the frames that the next part needs: the result is
    that of the whole, but for the rounding of convolutions of another size. In space they overlap and are blended:
    group norm takes the statistics of a part for those of the frame, and what lies outside of it is zero, so the result
    is not that of the whole. How far off it is depends on how much the parts differ from the frame. Of its largest
    value a fresh network is off by up to 6% with parts of 24 out of 32 rows and columns that share 8, by 17% with parts
    of 16, where the frame is alike everywhere; where half of it is flat, by 21% and 40%
    (``tests/models/test_tokenizer.py``).
    So take parts in time first, and in space the largest that memory allows.

    Raises:
        ValueError: a value that does not fit, by name.
    """

    frames: int | None = None
    """Latent frames of a part; None for all."""
    size: tuple[int, int] | None = None
    """Latent rows and columns of a part; None for whole frames."""
    overlap: int = 4
    """Latent rows and columns that neighbours share."""

    def __post_init__(self) -> None:
        if self.frames is not None and self.frames < 1:
            raise ValueError(f"frames is {self.frames}; it must be positive, or None")
        if self.size is not None and not 0 <= self.overlap < min(self.size):
            raise ValueError(f"overlap is {self.overlap}; it must be at least 0 and less than size {self.size}")


def starts(length: int, part: int, overlap: int) -> list[int]:
    """Where parts of a line begin that share ``overlap`` cells or, the last two, more."""
    last = max(length - part, 0)
    return [*range(0, last, part - overlap), last]


def ramp(start: int, part: int, length: int, overlap: int, like: Tensor) -> Tensor:
    """Weights ``[part]`` of the cells from ``start`` on, for a line of ``length`` cells.

    1, but towards a neighbour: there they are 0 for a quarter of the overlap, which the zeros around a part spoil most,
    and rise linearly over the next half. The weights of two neighbours add up to 1.
    """
    places = torch.arange(part, device=like.device, dtype=like.dtype) + 0.5
    weights = torch.ones_like(places)
    for distance, cut in ((places, start > 0), (part - places, start + part < length)):
        if cut:
            weights = weights * ((distance - overlap / 4) / max(overlap / 2, 0.5)).clamp(0, 1)
    return weights
