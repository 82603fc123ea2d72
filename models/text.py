"""Text as a condition of a model."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Text(NamedTuple):
    """A batch of encoded captions: ``states [B, L, E]`` and the ``mask [B, L]``, bool, True where there is a token."""

    states: Tensor
    mask: Tensor
