"""Batches of clips, each a pure function of ``(seed, step)``.

What is in a batch never depends on what was read before, so a resumed run sees what it would have seen.
"""

from __future__ import annotations

import functools
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .pixels import to_float
from .source import Source


class Batch(NamedTuple):
    """Float clips ``[B, C, T, H, W]``, class ids ``[B]`` and, of a source that has them, small clips."""

    clips: Tensor
    labels: Tensor
    low: Tensor | None = None


class Prefetching(ABC):
    """Batches by step; those of the ``prefetch`` steps after the one that is asked for are made ahead by a thread.

    ``waited`` is how many seconds :meth:`batch` took in all.
    """

    def __init__(self, prefetch: int) -> None:
        self.prefetch = prefetch
        self.waited = 0.0
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="batches") if prefetch else None
        self._ahead: dict[int, Future[Batch]] = {}

    def batch(self, step: int) -> Batch:
        """Return the batch of a step."""
        start = time.perf_counter()
        try:
            return self._batch(step)
        finally:
            self.waited += time.perf_counter() - start

    def _batch(self, step: int) -> Batch:
        if self._pool is None:
            return self.make(step)
        for wanted in range(step, step + self.prefetch + 1):
            if wanted not in self._ahead:
                self._ahead[wanted] = self._pool.submit(self.make, wanted)
        made = self._ahead.pop(step)
        for passed in [known for known in self._ahead if not step < known <= step + self.prefetch]:
            self._ahead.pop(passed).cancel()
        return made.result()

    def close(self) -> None:
        """End the thread."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    @abstractmethod
    def make(self, step: int) -> Batch:
        """The batch, made now."""


class Batches(Prefetching):
    """``batch(step)``: a :class:`Batch`, a pure function of ``(seed, step)``.

    With images (:class:`WithImages`) the class ids are ``[B, 1 + images]``.

    uint8 clips are brought to [-1, 1], float clips are left as they are. The samples of consecutive steps run through
    the source in a new random order every epoch; what is random in item ``index`` of epoch ``epoch`` comes from
    ``(seed, epoch, index)``.

    Args:
        source: of the clips.
        batch_size: samples of a batch.
        seed: of the order and of what is random in an item.
        prefetch: batches that are made ahead.
        rows: the places in a batch that are read; by default all.
    """

    def __init__(
        self, source: Source, batch_size: int, seed: int, prefetch: int = 2, rows: Sequence[int] | None = None
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be positive")
        if len(source) < 1:
            raise ValueError("the source has no clip")
        super().__init__(prefetch)
        self.source, self.batch_size, self.seed = source, batch_size, seed
        self.rows = range(batch_size) if rows is None else rows
        self._order = functools.lru_cache(maxsize=2)(self._shuffle)

    def _shuffle(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.seed, epoch)).permutation(len(self.source))

    def make(self, step: int) -> Batch:
        clips, labels, low = [], [], []
        for row in self.rows:
            epoch, place = divmod(step * self.batch_size + row, len(self.source))
            index = int(self._order(epoch)[place])
            clip, label = self.source.clip(index, np.random.default_rng((self.seed, epoch, index)))
            clips.append(clip)
            labels.append(label)
            if self.source.low_shape is not None:
                low.append(self.source.low(index))
        stacked = torch.from_numpy(np.stack(clips))
        return Batch(
            to_float(stacked) if stacked.dtype == torch.uint8 else stacked,
            torch.tensor(labels),
            torch.from_numpy(np.stack(low)) if low else None,
        )


def bucket_seed(seed: int, number: int) -> int:
    """The seed of the clips of one bucket, by its place among those that have clips."""
    return int(np.random.SeedSequence((seed, number)).generate_state(1)[0])


class BucketBatches(Prefetching):
    """Batches of one size each from sources of several sizes, the buckets; a pure function of ``(seed, step)``.

    An epoch has ``ceil(clips / batch size)`` batches of each bucket, in a random order of its own. The batches of one
    bucket, whatever lies between them, are those of :class:`Batches`.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        batch_sizes: Sequence[int],
        seed: int,
        prefetch: int = 2,
        rows: Sequence[Sequence[int]] | None = None,
    ) -> None:
        super().__init__(prefetch)
        self.seed = seed
        own = rows or [range(size) for size in batch_sizes]
        self.buckets = [
            Batches(source, size, bucket_seed(seed, number), prefetch=0, rows=part)
            for number, (source, size, part) in enumerate(zip(sources, batch_sizes, own, strict=True))
        ]
        self._counts = [-(-len(bucket.source) // bucket.batch_size) for bucket in self.buckets]
        self._order = functools.lru_cache(maxsize=2)(self._shuffle)

    def _shuffle(self, epoch: int) -> np.ndarray:
        each = np.repeat(np.arange(len(self._counts)), self._counts)
        return np.random.default_rng((self.seed, epoch)).permutation(each)

    def place(self, step: int) -> tuple[int, int]:
        """The bucket that the step takes its batch from, and which of that bucket's batches it is."""
        epoch, place = divmod(step, sum(self._counts))
        order = self._order(epoch)
        bucket = int(order[place])
        return bucket, epoch * self._counts[bucket] + int((order[:place] == bucket).sum())

    def make(self, step: int) -> Batch:
        bucket, number = self.place(step)
        return self.buckets[bucket].make(number)
