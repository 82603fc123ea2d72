"""uint8 pixels and floats in [-1, 1], and clips at a smaller size."""

from __future__ import annotations

import torch
from torch import Tensor


def shrink(clips: Tensor, factor: int) -> Tensor:
    """The means of factor x factor cells: float ``[..., H, W]`` to ``[..., H / factor, W / factor]``."""
    return clips.unflatten(-1, (-1, factor)).unflatten(-3, (-1, factor)).mean((-3, -1))


def to_float(clips: Tensor) -> Tensor:
    """uint8 0..255 to float32 -1..1."""
    return clips.float() / 127.5 - 1


def to_bytes(clips: Tensor) -> Tensor:
    """Float -1..1 to uint8 0..255, clamped and rounded.

    Raises:
        ValueError: a value that is not finite, which would be black.
    """
    if not (finite := clips.isfinite()).all():
        raise ValueError(f"{int((~finite).sum())} of {clips.numel()} values of the clips are not finite")
    return ((clips.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
