"""Time on this device, and the two ceilings that a time is held against: copies and matrix products."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

COPY_MEGABYTES = (1, 4, 38, 150)
MATMUL = (4096, 1152, 4608)  # the first Linear of an XL/2 MLP on 4096 tokens
L2_BYTES = 256 << 20  # more than any GPU's L2 cache


class Clock:
    """``clock(function, calls)``: seconds of one call.

    On a GPU by events, each call after a write that is larger than the L2 cache (not run on a GPU yet).
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            self.flush = torch.empty(L2_BYTES, dtype=torch.uint8, device=device)

    def __call__(self, function: Callable[[], Any], calls: int = 1) -> float:
        if self.device.type != "cuda":
            start = time.perf_counter()
            for _ in range(calls):
                function()
            return (time.perf_counter() - start) / calls
        total = 0.0
        for _ in range(calls):
            start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.flush.zero_()
            start_event.record()
            function()
            end_event.record()
            torch.cuda.synchronize(self.device)
            total += start_event.elapsed_time(end_event) / 1e3
        return total / calls


def ceilings(clock: Clock) -> dict[str, dict[str, float]]:
    """``copy``: GB/s read and written by copies, by size of the tensor in MB; ``matmul``: GFLOP/s by dtype."""
    copy, matmul = {}, {}
    for megabytes in COPY_MEGABYTES:
        source = torch.ones(megabytes * 250_000, device=clock.device)
        target = torch.empty_like(source)
        best = _median(clock, lambda source=source, target=target: target.copy_(source), max(1, 40 // megabytes))
        copy[str(megabytes)] = 2 * source.nbytes / best / 1e9
    m, k, n = MATMUL
    for name in ("float32", "bfloat16"):
        dtype = getattr(torch, name)
        a, b = torch.ones(m, k, device=clock.device, dtype=dtype), torch.ones(k, n, device=clock.device, dtype=dtype)
        out = torch.empty(m, n, device=clock.device, dtype=dtype)
        matmul[name] = 2 * m * k * n / _median(clock, lambda a=a, b=b, out=out: torch.mm(a, b, out=out), 1) / 1e9
    return {"copy": copy, "matmul": matmul}


def _median(clock: Clock, function: Callable[[], Any], calls: int) -> float:
    function()
    return statistics.median(clock(function, calls) for _ in range(5))
