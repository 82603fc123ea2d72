"""Text as a condition: what models take in the place of class ids.

The null caption, which guidance sets against the caption and which training puts in the place of dropped ones, is a row
that is marked as dropped, or a row without a token. What stands for it is the model's: a learned embedding, no token at
all, or fixed rows that published weights were trained with. An encoder's output for ``""`` is that of another caption,
and guidance between two captions that are equal does nothing.

Source: text tokens in cross-attention with a dropped caption for guidance: PixArt-alpha, Chen et al. 2023
(arXiv 2310.00426).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..parallel import draws


class Text(NamedTuple):
    """A batch of encoded captions; a model takes it as ``y``.

    ``states [B, L, E]`` are the encoder's, floating point; ``mask [B, L]``, bool, is True at the tokens of a caption
    and False at the padding, which no model may read. ``dropped [B]``, bool, is True where the model puts its null
    caption in the place of the caption; None means nowhere. A row without a token is the null caption too.
    """

    states: Tensor
    mask: Tensor
    dropped: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """``(B, L, E)``."""
        return self.states.shape

    @property
    def tokens(self) -> Tensor:
        """The mask ``[B, L]`` of the tokens that are not dropped."""
        return self.mask if self.dropped is None else self.mask & ~self.dropped[..., None]

    def map(self, function: Callable[[Tensor], Tensor]) -> Text:
        """The captions with every tensor replaced by what the function makes of it."""
        dropped = None if self.dropped is None else function(self.dropped)
        return Text(function(self.states), function(self.mask), dropped)

    def to(self, *arguments: Any, **options: Any) -> Text:
        """On another device; takes what ``Tensor.to`` takes for one."""
        return self.map(lambda part: part.to(*arguments, **options))

    def chunk(self, chunks: int) -> list[Text]:
        """The captions in so many parts, as ``Tensor.chunk``."""
        states, mask = self.states.chunk(chunks), self.mask.chunk(chunks)
        dropped = [None] * len(mask) if self.dropped is None else self.dropped.chunk(chunks)
        return [Text(*parts) for parts in zip(states, mask, dropped, strict=True)]

    def with_nulls(self) -> Text:
        """The captions, and after them each of them once more, dropped."""
        kept = torch.zeros_like(self.mask[:, 0]) if self.dropped is None else self.dropped
        parts = (self.states, self.states), (self.mask, self.mask), (kept, torch.ones_like(kept))
        return Text(*map(torch.cat, parts))


def rows(y: Tensor | Text, index: slice | Tensor) -> Tensor | Text:
    """Classes or captions of the samples that ``index`` picks."""
    return y.map(lambda part: part[index]) if isinstance(y, Text) else y[index]


def drop_captions(y: Text, share: float) -> Text:
    """``y`` with each caption dropped with probability ``share``, drawn from torch's generator of y's device."""
    if share <= 0:
        return y
    dropped = draws.rand(y.mask.shape[:-1], device=y.mask.device) < share
    return y._replace(dropped=dropped if y.dropped is None else dropped | y.dropped)


def with_null(y: Text, share: float, null: Tensor) -> Text:
    """``y`` with the model's null caption in its place, and the share of captions dropped that training drops.

    Args:
        y: captions, some of them perhaps null.
        share: probability with which a caption becomes the null caption, drawn from torch's generator of y's device.
        null: ``[E]``, the only token of the null caption; or rows ``[L or more, E]``, which take the places of the
            tokens of the caption that is dropped, and of the first token where a caption has none.

    Returns:
        Text in null's dtype, in which every row has a token and none is marked as dropped.
    """
    y = drop_captions(y, share)
    tokens = y.tokens
    first = torch.arange(tokens.shape[1], device=tokens.device) == 0
    absent = ~tokens.any(1, keepdim=True)
    if null.dim() == 1:
        at, mask = absent & first, tokens | (absent & first)
    else:
        null = null[: tokens.shape[1]]
        at, mask = absent, y.mask | (~y.mask.any(1, keepdim=True) & first)
    return Text(torch.where(at[..., None], null, y.states.to(null.dtype)), mask)
