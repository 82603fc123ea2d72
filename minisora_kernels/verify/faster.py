"""Is a kernel faster here? Ours, plain PyTorch and torch.compile in turns, in one process.

Device time and host time are told apart on a GPU: a replayed CUDA graph, after a write larger than any L2 cache, and
calls that nobody waits for. On a CPU a call is both.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import automatic, backends
from .cases import Case, speed_cases
from .right import say, tuple_of

L2_BYTES = 256 << 20
# Tokens of width 1152: on a GPU the tensors of a call are 64 to 256 MB.
TOKENS = {"cuda": 32768, "cpu": 2048, "interpreted": 32}
HOST_CALLS = 50
Function = Callable[[], Any]


class Clock:
    """Seconds of a call on the device, by :meth:`prepare`'s function, and on the host (None where they are one)."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._kept: list[Any] = []
        self.flush = torch.empty(L2_BYTES if device.type == "cuda" else 0, dtype=torch.uint8, device=device)

    def prepare(self, function: Function) -> Function:
        """What is timed in place of the function: on a GPU the replay of a graph of it (not run on a GPU yet)."""
        if self.device.type != "cuda":
            function()
            return function
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(3):
                function()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            self._kept.append(function())  # its memory is the graph's
        return graph.replay

    def device_seconds(self, function: Function) -> float:
        if self.device.type != "cuda":
            start = time.perf_counter()
            function()
            return time.perf_counter() - start
        start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        start_event.record()
        function()
        end_event.record()
        torch.cuda.synchronize(self.device)
        return start_event.elapsed_time(end_event) / 1e3

    def host_seconds(self, function: Function) -> float | None:
        if self.device.type != "cuda":
            return None
        samples = []
        for _ in range(3):
            torch.cuda.synchronize(self.device)
            start = time.perf_counter()
            for _ in range(HOST_CALLS):
                function()
            samples.append((time.perf_counter() - start) / HOST_CALLS)
        torch.cuda.synchronize(self.device)
        return statistics.median(samples)


def columns(case: Case, dtype: torch.dtype, backend: str, both: bool, compiled: bool) -> dict[str, Function]:
    """What is timed, by column."""
    leaves = case.leaves(dtype)
    wanted = [leaf for leaf in leaves.values() if leaf.requires_grad]

    def eager(t: dict[str, Tensor]) -> Any:
        return case.call(t, backend="reference")

    calls: dict[str, Callable[[dict[str, Tensor]], Any]] = {
        "ours": lambda t: case.call(t, backend=backend),
        "eager": eager,
    }
    if compiled:
        calls["compile"] = torch.compile(eager, dynamic=False, fullgraph=True)
    with torch.no_grad():
        upstream = [torch.randn_like(value) for value in tuple_of(eager(leaves))]

    def run(call: Callable[[dict[str, Tensor]], Any]) -> Any:
        if not both:
            with torch.no_grad():
                return call(leaves)
        return torch.autograd.grad(tuple_of(call(leaves)), wanted, upstream)

    return {name: partial(run, call) for name, call in calls.items()}


def measure(clock: Clock, functions: dict[str, Function], seconds: float) -> dict[str, Any]:
    """Times in microseconds, ``[device, host]`` per column, and the ratios of ours: median and third quartile."""
    prepared = {name: clock.prepare(function) for name, function in functions.items()}
    host = {name: clock.host_seconds(function) for name, function in functions.items()}
    samples: dict[str, list[float]] = {name: [] for name in functions}
    once = sum(clock.device_seconds(function) for function in prepared.values())
    rounds = min(21, max(5, int(seconds * len(prepared) / once)))
    names = list(prepared)
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            samples[name].append(clock.device_seconds(prepared[name]))
    waited = {name: [max(value, host[name] or 0) for value in values] for name, values in samples.items()}
    return {
        "times": {
            name: [statistics.median(values) * 1e6, None if (own := host[name]) is None else own * 1e6]
            for name, values in samples.items()
        },
        "ratio": _ratio(waited["ours"], waited["eager"]),
        "compile_ratio": _ratio(samples["ours"], samples["compile"]) if "compile" in samples else None,
    }


def _ratio(ours: list[float], others: list[float]) -> list[float]:
    ratios = [mine / other for mine, other in zip(ours, others, strict=True)]
    _, median, third = statistics.quantiles(ratios, n=4, method="inclusive")
    return [median, third]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--op", nargs="+", required=True)
    parser.add_argument("--device", type=torch.device, required=True)
    parser.add_argument("--backend", required=True)
    parser.add_argument("--precision", default="highest")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--warm", action="store_true", help="only compile, for torch.compile's cache on disk")
    options = parser.parse_args()
    device, warm = options.device, options.warm
    torch.set_float32_matmul_precision(options.precision)
    warnings.simplefilter("ignore")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    generator = torch.Generator(device).manual_seed(0)
    stands_in = device.type == "cpu" and backends.DEVICES["triton"] == "cpu"
    tokens = options.tokens or TOKENS["interpreted" if stands_in else device.type]
    cases = speed_cases(lambda *shape: torch.randn(*shape, device=device, generator=generator), tokens)
    clock = Clock(torch.device("cpu") if warm else device)
    for name, make in cases:
        op, _, detail = name.partition(" ")
        if op not in options.op:
            continue
        case = replace(make(), device=str(device))
        for dtype in (torch.float32, torch.bfloat16):
            for both in (True, False) if case.differentiable else (False,):
                regime = automatic.regime(device, dtype, both, detail)
                line: dict[str, Any] = {"op": op, "regime": regime}
                say("case", case=f"{op} {regime}")
                try:
                    functions = columns(case, dtype, options.backend, both, not options.quick)
                    if warm:
                        functions["compile"]()
                    else:
                        line |= measure(clock, functions, 0.1 if options.quick else 0.25)
                except Exception as error:  # it says nothing of other regimes
                    line["failed"] = str(error) or type(error).__name__
                say("result", **line)
                torch._dynamo.reset()
    say("done")


if __name__ == "__main__":
    main()
