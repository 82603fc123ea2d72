"""Time on this device, and the two ceilings that a time is held against: copies and matrix products."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch

COPY_MEGABYTES = (1, 4, 38, 150)
MATMUL = (4096, 1152, 4608)  # the first Linear of an XL/2 MLP on 4096 tokens
L2_BYTES = 256 << 20  # more than any GPU's L2 cache
# How long a GPU spins before what is timed: a tenth of a millisecond to half a second.
FEWEST_CYCLES, MOST_CYCLES = 1 << 18, 1 << 30
HOST_CALLS = 20  # of an op: fewer launches than a stream holds, or the host would wait for the GPU


class Clock:
    """``clock(function, calls)``: seconds of one call. On a GPU those of the device, and :meth:`host` has the host's.

    Device time lies between events around each call, which starts with nothing in the L2 cache. A kernel that spins
    goes first, until the host has queued everything: so no time of Python's is among it. If the GPU gets to the calls
    before all of them are queued, they are timed again behind a longer spin. A call that waits for the GPU, or queues
    more than a stream holds, leaves all of them behind, and is timed as it is. Not run on a GPU yet.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._cycles: WeakKeyDictionary[Callable[[], Any], int] = WeakKeyDictionary()
        if device.type == "cuda":
            self.flush = torch.empty(L2_BYTES, dtype=torch.uint8, device=device)

    def __call__(self, function: Callable[[], Any], calls: int = 1) -> float:
        if self.device.type != "cuda":
            start = time.perf_counter()
            for _ in range(calls):
                function()
            return (time.perf_counter() - start) / calls
        cycles = self._cycles.get(function, FEWEST_CYCLES)
        while True:
            late, seconds = self._queued(function, calls, cycles)
            if late and cycles:
                cycles = cycles * 8 if cycles < MOST_CYCLES else 0
                continue
            self._cycles[function] = cycles
            return seconds / calls

    def _queued(self, function: Callable[[], Any], calls: int, cycles: int) -> tuple[bool, float]:
        """Whether the GPU got to the first call before the last was queued; and the seconds between the events."""
        torch.cuda.synchronize(self.device)
        torch.cuda._sleep(cycles)
        times = []
        for _ in range(calls):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.flush.zero_()
            start.record()
            function()
            end.record()
            times.append((start, end))
        late = times[0][0].query()
        torch.cuda.synchronize(self.device)
        return late, sum(start.elapsed_time(end) for start, end in times) / 1e3

    def host(self, function: Callable[[], Any], calls: int = HOST_CALLS) -> float:
        """Seconds that the host takes to queue one call, while the GPU lags behind."""
        torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        for _ in range(calls):
            function()
        seconds = time.perf_counter() - start
        torch.cuda.synchronize(self.device)
        return seconds / calls


def ceilings(clock: Clock) -> dict[str, dict[str, float]]:
    """``copy``: GB/s read and written by copies, by size of the tensor in MB; ``matmul``: GFLOP/s by dtype."""
    copy, matmul = {}, {}
    for megabytes in COPY_MEGABYTES:
        source = torch.ones(megabytes * 250_000, device=clock.device)
        target = torch.empty_like(source)
        best = _median(clock, partial(target.copy_, source), max(1, 40 // megabytes))
        copy[str(megabytes)] = 2 * source.nbytes / best / 1e9
    m, k, n = MATMUL
    for name in ("float32", "bfloat16"):
        dtype = getattr(torch, name)
        a, b = torch.ones(m, k, device=clock.device, dtype=dtype), torch.ones(k, n, device=clock.device, dtype=dtype)
        out = torch.empty(m, n, device=clock.device, dtype=dtype)
        matmul[name] = 2 * m * k * n / _median(clock, partial(torch.mm, a, b, out=out), 1) / 1e9
    return {"copy": copy, "matmul": matmul}


def _median(clock: Clock, function: Callable[[], Any], calls: int) -> float:
    function()
    return statistics.median(clock(function, calls) for _ in range(5))
