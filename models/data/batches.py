"""Batches of clips, each a pure function of ``(seed, step)``.

What is in a batch never depends on what was read before, so a resumed run sees what it would have seen.
"""

from __future__ import annotations

import functools
import gc
import signal
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .pixels import to_float
from .source import Source


class Batch(NamedTuple):
    """Float clips ``[B, C, T, H, W]``, class ids ``[B]`` and, of a source that has them, small clips."""

    clips: Tensor
    labels: Tensor
    low: Tensor | None = None


class Prefetching(ABC, Dataset[Batch]):
    """Batches by step; those of the ``prefetch`` steps after the one that is asked for are made ahead.

    A thread makes them, or ``workers`` processes, each with a copy of what the source keeps in memory. ``waited`` is
    how many seconds :meth:`batch` took in all.
    """

    def __init__(self, prefetch: int, workers: int = 0) -> None:
        self.prefetch, self.workers = prefetch, workers
        self.waited = 0.0
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="batches") if prefetch and not workers else None
        self._ahead: dict[int, Future[Batch]] = {}
        # Of the processes: the batches that follow, and the last one that was taken, with its step.
        self._coming: Any = None
        self._taken: tuple[int, Batch] | None = None

    def batch(self, step: int) -> Batch:
        """Return the batch of a step."""
        start = time.perf_counter()
        try:
            return self._batch(step)
        finally:
            self.waited += time.perf_counter() - start

    def __getitem__(self, step: int) -> Batch:
        return self.make(step)

    def _of_processes(self, step: int) -> Batch:
        taken = self._taken
        if taken is not None and taken[0] == step:
            return taken[1]
        if self._coming is None or taken is None or taken[0] + 1 != step:
            loader = DataLoader(
                self,
                batch_size=None,
                sampler=range(step, sys.maxsize),
                num_workers=self.workers,
                collate_fn=_as_it_is,
                multiprocessing_context="fork",
                worker_init_fn=_ignore_signals,
                prefetch_factor=max(1, self.prefetch // self.workers),
                generator=torch.Generator(),  # else it would draw from the generator that drops labels
            )
            self._coming = _started(loader)
        self._taken = step, next(self._coming)
        return self._taken[1]

    def _batch(self, step: int) -> Batch:
        if self.workers:
            return self._of_processes(step)
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
        """End the thread or the processes."""
        if self._coming is not None:
            self._coming._shutdown_workers()  # which ignore the signal that would end them with this process
            self._coming = None
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    @abstractmethod
    def make(self, step: int) -> Batch:
        """The batch, made now."""


def _started(loader: DataLoader[Batch]) -> Iterator[Batch]:
    """The loader's batches; its processes start now.

    A process is a copy of this one without its threads. What the garbage collector finds here it must not free there: a
    film's decoder, for one, would wait for threads of its own.
    """
    gc.collect()
    gc.freeze()
    try:
        return iter(loader)
    finally:
        gc.unfreeze()


def _as_it_is(batch: Any) -> Any:
    return batch


def _ignore_signals(_: int) -> None:
    """What ends the run leaves its processes at work until the run has saved; they end with it."""
    for name in ("SIGTERM", "SIGINT", "SIGHUP"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)


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
        workers: processes that make them; 0 for a thread.
    """

    def __init__(
        self,
        source: Source,
        batch_size: int,
        seed: int,
        prefetch: int = 2,
        rows: Sequence[int] | None = None,
        workers: int = 0,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be positive")
        if len(source) < 1:
            raise ValueError("the source has no clip")
        super().__init__(prefetch, workers)
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
        workers: int = 0,
    ) -> None:
        super().__init__(prefetch, workers)
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
