"""Text as a condition: what models take in the place of class ids.

The null caption, which guidance sets against the caption and which training puts in the place of dropped ones, is a row
without a token. What stands for it is the model's, for instance a learned embedding: an encoder's output for ``""`` is
that of another caption, and guidance between two captions that are equal does nothing.

Source: text tokens in cross-attention with a dropped caption for guidance: PixArt-alpha, Chen et al. 2023
(arXiv 2310.00426).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Text(NamedTuple):
    """A batch of encoded captions; a model takes it as ``y``.

    ``states [B, L, E]`` are the encoder's, floating point; ``mask [B, L]``, bool, is True at the tokens of a caption
    and False at the padding, which no model may read. A row without a token is the null caption.
    """

    states: Tensor
    mask: Tensor

    @property
    def shape(self) -> torch.Size:
        """``(B, L, E)``."""
        return self.states.shape

    def to(self, *arguments: Any, **options: Any) -> Text:
        """On another device; takes what ``Tensor.to`` takes for one."""
        return Text(*(part.to(*arguments, **options) for part in self))

    def chunk(self, chunks: int) -> list[Text]:
        """The captions in so many parts, as ``Tensor.chunk``."""
        return [Text(*parts) for parts in zip(*(part.chunk(chunks) for part in self), strict=True)]

    def null(self) -> Text:
        """One null caption, of the same length."""
        return Text(torch.zeros_like(self.states[:1]), torch.zeros_like(self.mask[:1]))


def rows(y: Tensor | Text, index: slice | Tensor) -> Tensor | Text:
    """Classes or captions of the samples that ``index`` picks."""
    return Text(*(part[index] for part in y)) if isinstance(y, Text) else y[index]


def drop_captions(mask: Tensor, share: float) -> Tensor:
    """``mask [..., L]`` without the tokens of captions that become null, each with probability ``share``."""
    return mask & (torch.rand((*mask.shape[:-1], 1), device=mask.device) >= share) if share > 0 else mask


def with_null(y: Text, share: float, null: Tensor) -> Text:
    """``y`` with a learned embedding for the null caption, and the share of captions dropped that training drops.

    Args:
        y: captions, some of them perhaps null.
        share: probability with which a caption becomes the null caption, drawn from torch's generator of y's device.
        null: ``[E]``, the only token of the null caption.

    Returns:
        Text in null's dtype, in which every row has a token.
    """
    states, mask = y
    mask = drop_captions(mask, share)
    first = torch.arange(mask.shape[1], device=mask.device) == 0
    absent = ~mask.any(1, keepdim=True) & first
    return Text(torch.where(absent[..., None], null, states.to(null.dtype)), mask | absent)
