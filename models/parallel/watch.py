"""Where every rank stands, so that a run that stalls says which rank holds up the others."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import NamedTuple

import torch.distributed as dist

from .ranks import Ranks

_log = logging.getLogger(__name__)
# Patience until the run ends, whatever the main thread waits for.
END = 2


class Seen(NamedTuple):
    """What a rank has said of itself: how often, and where it stood."""

    beats: int
    step: int
    order: int
    place: str

    def __str__(self) -> str:
        return f"step {self.step}, where it {self.place}"


class Watch:
    """A thread that tells the others where this rank stands, and looks where they stand when nothing moves.

    Args:
        ranks: of the run, whose :meth:`models.parallel.ranks.Ranks.at` the training calls.
        patience: seconds in one place after which the thread says who holds up the others. After as many again it ends
            the process, unless the training moved on, or an error ended it.
    """

    def __init__(self, ranks: Ranks, patience: float) -> None:
        self.ranks, self.patience = ranks, patience
        self.pause = min(1.0, patience / 20)
        self.report = ""
        self._beats = 0
        self._over = threading.Event()
        # Not the store of the process group: a rank that waits there would hold up this thread too.
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self._store = dist.TCPStore(*address, is_master=False, timeout=timedelta(seconds=max(patience / 4, 1)))
        self._beat()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        self._over.set()
        self._thread.join(self.patience)

    def _beat(self) -> None:
        self._beats += 1
        step, order, place, _ = self.ranks.place
        self._store.set(f"minisora/{self.ranks.rank}", f"{self._beats} {step} {order} {place}")

    def _seen(self) -> list[Seen]:
        found = []
        for rank in range(self.ranks.size):
            beats, step, order, place = self._store.get(f"minisora/{rank}").decode().split(" ", 3)
            found.append(Seen(int(beats), int(step), int(order), place))
        return found

    def _stands(self, seconds: float) -> bool:
        return time.monotonic() - self.ranks.place.since > seconds

    def _run(self) -> None:
        while not self._over.wait(self.pause):
            try:
                self._beat()
                if self._stands(self.patience) and not self.report:
                    self.report = self._compared()
                    _log.error(self.report)
            except Exception as error:  # the store is a process of another rank, or of torchrun
                if self._stands(self.patience) and not self.report:
                    self.report = f"nothing moved for {self.patience:g} s, and the store of the ranks is gone: {error}"
                    _log.error(self.report)
            if not self._stands(self.patience):
                self.report = ""
            elif self._stands(END * self.patience):
                os._exit(1)

    def _compared(self) -> str:
        before = self._seen()
        for _ in range(4):
            time.sleep(self.pause)
            self._beat()
        now = self._seen()
        silent = [i for i, (first, last) in enumerate(zip(before, now, strict=True)) if first.beats == last.beats]
        least = min((seen.step, seen.order) for seen in now)
        behind = silent or [i for i, seen in enumerate(now) if (seen.step, seen.order) == least]
        told = "does not answer, and was last in" if silent else "stands in"
        named = "; ".join(f"rank {i} {told} {now[i]}" for i in behind)
        others = "; ".join(f"rank {i} waits in {seen}" for i, seen in enumerate(now) if i not in behind)
        return f"nothing moved for {self.patience:g} s: {named}" + (f"; {others}" if others else "")


@contextlib.contextmanager
def watching(ranks: Ranks, patience: float) -> Iterator[None]:
    """In the block a run that stalls ends with an error that names the rank that the others wait for, and its step.

    Raises:
        RuntimeError: an error ended the block after the run had stalled.
    """
    if ranks.size == 1:
        yield
        return
    watch = Watch(ranks, patience)
    try:
        yield
    except Exception as error:
        if watch.report:
            raise RuntimeError(watch.report) from error
        raise
    finally:
        watch.close()
