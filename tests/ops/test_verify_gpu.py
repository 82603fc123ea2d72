"""What ``verify`` does on a GPU alone: captures, other work, times. A stand-in takes the place of torch.cuda."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from conftest import KERNEL_BACKENDS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minisora_kernels.verify import faster, right
from minisora_kernels.verify.cases import Case, checked

pytestmark = pytest.mark.skipif(KERNEL_BACKENDS != ["cpu"], reason="the cpu kernels are not under test")
HOST, DEVICE = 50e-6, 10e-6


class Stream:
    def __init__(self, gpus: GPUs, device: Any = None) -> None:
        self.gpus, self.device = gpus, gpus.current if device is None else torch.device(device).index or 0
        self.waited: list[Stream] = []

    def wait_stream(self, other: Stream) -> None:
        self.waited.append(other)


class Graph:
    """Captures the calls of torch on ``stream``, and makes them again on the same memory."""

    def __init__(self, gpus: GPUs) -> None:
        self.gpus, self.calls, self.seconds = gpus, [], 0.0
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        self.gpus.queue(1e-6, self.seconds)
        with torch.no_grad():
            for func, args, kwargs, results in self.calls:
                again = func(*args, **kwargs)
                for old, new in zip(tree_leaves(results), tree_leaves(again), strict=True):
                    if isinstance(old, torch.Tensor) and old is not new:
                        old.detach().copy_(new)


class Recorder(TorchDispatchMode):
    """Tensors of ``gpus.place``: what is called goes to that device's current stream."""

    def __init__(self, gpus: GPUs, graph: Graph, stream: Stream) -> None:
        super().__init__()
        self.gpus, self.graph, self.stream = gpus, graph, stream

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        if self.gpus.streams[self.gpus.place] is self.stream:
            self.graph.calls.append((func, args, kwargs or {}, results))
        return results


class GPUs:
    """Two devices, the first of which is the current one. The tensors lie in the memory of the CPU."""

    def __init__(self, place: int) -> None:
        self.current, self.place, self.now, self.free = 0, place, 0.0, 0.0
        self.streams = [Stream(self, "cuda:0"), Stream(self, "cuda:1")]
        self.graphs: list[Graph] = []
        self.capturing: Graph | None = None
        self.synchronized = 0
        self.default_capture_stream: Stream | None = None

    def queue(self, host: float, device: float) -> None:
        self.now += host
        if self.capturing is not None:
            self.capturing.seconds += device
            return
        self.free = max(self.free, self.now) + device

    def synchronize(self, device: Any = None) -> None:
        self.synchronized += 1
        self.now = max(self.now, self.free)

    def event(self, enable_timing: bool) -> Event:
        return Event(self)

    def make_graph(self) -> Graph:
        self.graphs.append(Graph(self))
        return self.graphs[-1]

    @contextmanager
    def device(self, device: Any) -> Iterator[None]:
        before, self.current = self.current, torch.device(device).index or 0
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.streams[stream.device] = self.streams[stream.device], stream
        try:
            with self.device(f"cuda:{stream.device}"):
                yield
        finally:
            self.streams[stream.device] = before

    @contextmanager
    def graph(self, graph: Graph, stream: Stream | None = None) -> Iterator[None]:
        if stream is None:  # as torch has it
            stream = self.default_capture_stream = self.default_capture_stream or Stream(self)
        self.capturing = graph
        with self.stream(stream), Recorder(self, graph, stream):
            yield
        self.capturing = None


class Event:
    def __init__(self, gpus: GPUs) -> None:
        self.gpus = gpus

    def record(self) -> None:
        self.at = max(self.gpus.free, self.gpus.now)

    def elapsed_time(self, end: Event) -> float:
        return (end.at - self.at) * 1e3


@pytest.fixture(params=[0, 1])
def gpus(request, monkeypatch) -> GPUs:
    """The cases are on cuda:0, the current device, or on cuda:1."""
    gpus = GPUs(request.param)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device=None: Stream(gpus, device))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: gpus.streams[torch.device(device).index or 0])
    monkeypatch.setattr(torch.cuda, "Event", gpus.event)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", gpus.make_graph)
    for name in ("stream", "device", "graph", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, getattr(gpus, name))
    return gpus


@dataclass
class OnGPU(Case):
    """``device`` names a GPU that is stood in for."""

    def leaves(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        return Case.leaves(replace(self, device="cpu"), dtype)


def on_gpu(op: str, gpus: GPUs) -> OnGPU:
    case = next(case for case in checked() if case.op == op)
    return OnGPU(**{**vars(case), "device": f"cuda:{gpus.place}"})


@pytest.mark.parametrize("op", ["gate_residual", "adaln", "guided_step"])
def test_a_captured_call_has_the_bits_of_a_call_on_whatever_device(op: str, gpus: GPUs):
    right.check_capture(on_gpu(op, gpus), torch.float32, "cpu")
    (graph,) = gpus.graphs
    assert graph.replays == 1 and any("minisora" in str(call[0]) for call in graph.calls)
    assert gpus.current == 0


@pytest.mark.parametrize("fault", ["output", "gradient"])
def test_a_kernel_that_a_graph_does_not_hold_is_found(fault: str, gpus: GPUs):
    """It launches on the device's own stream, not on the current one."""
    case = on_gpu("gate_residual", gpus)
    call, own = case.call, gpus.streams[gpus.place]

    def on_own_stream(*_: torch.Tensor) -> None:
        gpus.streams[gpus.place] = own

    def broken(t, backend):
        if fault == "output":
            on_own_stream()
        y = call(t, backend=backend)
        if fault == "gradient":
            y.register_hook(on_own_stream)
        return y

    said = {"output": "output 0", "gradient": "gradient of (x|branch|gate)"}[fault]
    with pytest.raises(AssertionError, match=f"{said}: other bits in a captured graph"):
        right.check_capture(replace(case, call=broken), torch.float32, "cpu")


def test_other_work_is_on_a_stream_of_its_own_and_is_waited_for(gpus: GPUs, monkeypatch):
    ones, device = torch.ones, torch.device("cuda", gpus.place)
    before, on = gpus.streams[gpus.place], []
    monkeypatch.setattr(torch, "ones", lambda *shape, device: ones(*shape))
    monkeypatch.setattr(torch, "mm", lambda a, b: on.append(gpus.streams[gpus.place]))
    with right.busy(device):
        assert gpus.streams[gpus.place] is before and gpus.current == 0 and not gpus.synchronized
    assert len(on) >= 100 and before not in on and len(set(on)) == 1 and gpus.synchronized


def test_times_of_the_device_and_of_the_host_are_apart(gpus: GPUs, monkeypatch):
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, device=None, **options: empty(8, **options))
    monkeypatch.setattr(faster.time, "perf_counter", lambda: gpus.now)
    clock = faster.Clock(torch.device("cuda", gpus.place))
    clock.flush.fill_(1)
    queued = []

    def call() -> torch.Tensor:
        queued.append(gpus.streams[gpus.place])
        gpus.queue(HOST, DEVICE)
        return torch.ones(2) * 2

    with gpus.device(clock.device):  # as the worker has it
        replay = clock.prepare(call)
    (graph,) = gpus.graphs
    assert len(queued) == 4 and gpus.streams[gpus.place] not in queued and graph.calls

    gpus.synchronize()
    assert clock.device_seconds(replay) == pytest.approx(DEVICE + 1e-6)
    assert graph.replays == 1 and not clock.flush.any()  # the L2 cache holds nothing of the call before
    assert clock.host_seconds(call) == pytest.approx(HOST)
    found = faster.measure(clock, {"ours": call, "eager": lambda: (call(), call())}, 1e-3)
    assert found["times"] == {
        name: pytest.approx([(calls * DEVICE + 1e-6) * 1e6, calls * HOST * 1e6])
        for name, calls in (("ours", 1), ("eager", 2))
    }
    assert found["ratio"] == pytest.approx([0.5, 0.5])  # of the host's times, which are the longer ones
