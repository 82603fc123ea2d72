"""Which samples of a batch a rank has, and random numbers that do not depend on how many ranks there are.

Every rank draws for all samples of a batch and keeps the rows of its own. The generators of all ranks are therefore
equal after every step: one checkpoint holds them, and any number of ranks goes on from it. Without :func:`sharing` the
functions are torch's.

    one process        B samples          rows 0..B - 1
    rank r of R        B / R samples      rows r B / R .. (r + 1) B / R - 1
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from . import sequence


class Share(NamedTuple):
    """That of ``rank`` among ``ranks`` with samples of their own; ``group`` is theirs."""

    rank: int = 0
    ranks: int = 1
    group: dist.ProcessGroup | None = None

    def rows(self, batch_size: int, parts: int) -> list[int]:
        """The places in a batch that this rank has, where the batch is computed in ``parts``: its rows of each part."""
        part = batch_size // parts
        own = part // self.ranks
        return [i * part + self.rank * own + row for i in range(parts) for row in range(own)]

    def part(self, count: int) -> range:
        """The clips that this rank draws of ``count``."""
        return range(self.rank * count // self.ranks, (self.rank + 1) * count // self.ranks)


# Not a context variable: autograd recomputes what was checkpointed in threads of its own.
_share = Share()


@contextlib.contextmanager
def sharing(share: Share) -> Iterator[None]:
    """In the block the first axis of what models and objectives draw has the samples of this share."""
    global _share
    before, _share = _share, share
    try:
        yield
    finally:
        _share = before


def current() -> Share:
    """The share of the block that is running."""
    return _share


def _all(shape: int | Sequence[int]) -> tuple[int, ...]:
    """The shape with the samples of all ranks."""
    first, *others = (shape,) if isinstance(shape, int) else shape
    return first * _share.ranks, *others


def _own(drawn: Tensor) -> Tensor:
    return drawn if _share.ranks == 1 else drawn.chunk(_share.ranks)[_share.rank]


def rand(shape: int | Sequence[int], **options: Any) -> Tensor:
    """``torch.rand``; the first axis of ``shape`` is this rank's samples."""
    return _own(torch.rand(_all(shape), **options))


def randn(shape: int | Sequence[int], **options: Any) -> Tensor:
    """``torch.randn``; the first axis of ``shape`` is this rank's samples."""
    return _own(torch.randn(_all(shape), **options))


def randint(low: int, high: int, shape: int | Sequence[int], **options: Any) -> Tensor:
    """``torch.randint``; the first axis of ``shape`` is this rank's samples."""
    return _own(torch.randint(low, high, _all(shape), **options))


def multinomial(p: Tensor, count: int, **options: Any) -> Tensor:
    """``torch.multinomial`` with replacement, for this rank's ``count`` samples."""
    return _own(torch.multinomial(p, _all(count)[0], True, **options))


def dropout(x: Tensor, p: float, training: bool, frames: int) -> Tensor:
    """``F.dropout`` of ``x [B, T, ...]``, of all ``frames`` or of this rank's."""
    if _share.ranks * sequence.ranks() == 1 or not training or not p:
        return F.dropout(x, p, training)
    kept = torch.empty(_all((len(x), frames, *x.shape[2:])), dtype=x.dtype, device=x.device).bernoulli_(1 - p)
    return x * (sequence.own(_own(kept), 1) / (1 - p))


def of_all(values: Tensor) -> Tensor:
    """``values [B / R, ...]`` of all ranks' samples, ``[B, ...]``, in the order of the batch; without gradient."""
    if _share.ranks == 1:
        return values
    parts = [torch.empty_like(values) for _ in range(_share.ranks)]
    dist.all_gather(parts, values.contiguous(), group=_share.group)
    return torch.cat(parts)
