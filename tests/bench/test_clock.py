"""Device time and host time, on a GPU that is a line of times: what is queued starts when all before it has ended."""

from __future__ import annotations

import itertools

import pytest
import torch
from test_bench import synthetic

from bench.bench_model import BLOCK
from bench.harness import clock, report, shapes
from bench.harness.clock import Clock
from bench.harness.session import Session
from bench.ops import bench_of
from minisora_kernels.__main__ import ops

HOST, DEVICE, FLUSH = 50e-6, 10e-6, 65e-6  # of a call, and of the write that empties the cache
HZ = 2e9


class GPU:
    """``now`` is the host's time, ``free`` when the device has done all that is queued."""

    def __init__(self) -> None:
        self.now = self.free = 0.0
        self.spins: list[int] = []

    def queue(self, host: float, device: float) -> None:
        self.now += host
        self.free = max(self.free, self.now) + device

    def synchronize(self, device: torch.device | None = None) -> None:
        self.now = max(self.now, self.free)

    def sleep(self, cycles: int) -> None:
        self.spins.append(cycles)
        self.queue(1e-6, cycles / HZ)

    def event(self, enable_timing: bool) -> Event:
        return Event(self)

    def zero_(self) -> None:
        self.queue(1e-6, FLUSH)


class Event:
    def __init__(self, gpu: GPU) -> None:
        self.gpu = gpu

    def record(self) -> None:
        self.at = max(self.gpu.free, self.gpu.now)

    def query(self) -> bool:
        return self.at <= self.gpu.now

    def elapsed_time(self, end: Event) -> float:
        return (end.at - self.at) * 1e3


@pytest.fixture
def gpu(monkeypatch) -> GPU:
    gpu = GPU()
    monkeypatch.setattr(clock.time, "perf_counter", lambda: gpu.now)
    monkeypatch.setattr(torch.cuda, "synchronize", gpu.synchronize)
    monkeypatch.setattr(torch.cuda, "_sleep", gpu.sleep)
    monkeypatch.setattr(torch.cuda, "Event", gpu.event)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: gpu)
    return gpu


def test_device_time_holds_no_host_time(gpu: GPU):
    timed = Clock(torch.device("cuda"))
    call = lambda: gpu.queue(HOST, DEVICE)  # noqa: E731
    assert timed(call, 1) == pytest.approx(DEVICE)
    assert timed.host(call) == pytest.approx(HOST)
    assert gpu.spins == [clock.FEWEST_CYCLES]


def test_the_spin_gets_longer_until_all_is_queued_and_stays_so(gpu: GPU):
    timed = Clock(torch.device("cuda"))
    call = lambda: gpu.queue(HOST, DEVICE)  # noqa: E731
    assert timed(call, 40) == pytest.approx(DEVICE)
    assert gpu.spins == [1 << 18, 1 << 21, 1 << 24]
    timed(call, 40)
    assert gpu.spins[3:] == [1 << 24]


def test_a_call_that_waits_is_timed_as_it_is(gpu: GPU):
    timed = Clock(torch.device("cuda"))

    def call() -> None:
        gpu.queue(HOST, DEVICE)
        gpu.synchronize()
        gpu.queue(HOST, DEVICE)

    assert timed(call) == pytest.approx(DEVICE + HOST + DEVICE)
    assert gpu.spins[-1] == 0 and max(gpu.spins) == clock.MOST_CYCLES
    timed(call)
    assert gpu.spins[-2:] == [0, 0]


def test_shapes_on_a_gpu_move_enough_and_have_names_of_their_own():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    tables = [bench_of(op).SHAPES for op in ops()]
    for shape in itertools.chain(*tables):
        assert shapes.on_device(shape, cpu) is shape
        there = shapes.on_device(shape, cuda)
        moved = 2 * shapes.elements(there)
        assert shapes.GPU_BYTES <= moved <= max(2 * shapes.GPU_BYTES, 2 * shapes.elements(shape))
        assert there is shape or f"b{there.batch}" in there.name.split()
        assert shapes.on_device(there, cuda) == there
    (per_frame,) = {shapes.on_device(s, cuda).name for s in shapes.MODULATED if "per frame" in s.name}
    assert per_frame == "XL/2 16x256x256 b16 per frame"
    for table in tables:
        names = [shapes.on_device(shape, cuda).name for shape in table]
        assert len(set(names)) == len(names)
    assert shapes.on_device(BLOCK[0], cuda) is BLOCK[0]


def test_the_harness_and_the_report_have_the_hosts_time(gpu: GPU):
    session = Session(torch.device("cpu"))
    functions = {"ours": lambda: gpu.queue(HOST, DEVICE), "eager": lambda: gpu.queue(2 * HOST, DEVICE)}
    assert session.host(functions) == {}
    session.device = torch.device("cuda")
    session.clock = Clock(session.device)
    host = session.host(functions)["host"]
    assert host["ours"]["median"] == pytest.approx(HOST) and host["eager"]["q3"] == pytest.approx(2 * HOST)

    made = synthetic()
    before = report.timings(made)
    made["cases"][0]["host"] = host
    header, first, second = report.timings(made)
    assert "host ms" in header and " 0.05 " in first and second == before[2]
