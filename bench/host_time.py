"""What a call costs the host, without a GPU: ``python -m bench.host_time`` checks ``bench/results/host.json``.

Every op runs forward and backward through the real launch path: op, dispatcher, launcher, Triton's launch, down to the
driver, in whose place stands bench/stub_driver.c. Nothing is computed. Tensors are small and lie in the CPU's memory.
Recorded are the launches of a call and its thread CPU time, also as a ratio to a bare Triton launch of the same run,
in which a slow day cancels. ``--save`` writes the record anew; without it an op is an error that launches more than the
record says, or, on the record's processor, whose ratio grew by more than half.

What a GPU adds is not in it: the driver's own work for a launch, and the change of the current device.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from bench.harness.counters import raw_ops
from bench.harness.record import RESULTS, commit, machine, round_floats
from bench.harness.session import BOTH, FWD, Problem, tuple_of
from bench.ops import bench_of
from minisora_kernels import backends, use_backend
from minisora_kernels.__main__ import ops
from minisora_kernels.commands import command

RECORD = RESULTS / "host.json"
SOURCE = Path(__file__).with_name("stub_driver.c")
GROWTH = 1.5
# Times are compared where these are the record's. Another processor had ratios up to 1.4 times the record's.
TIMED = ("torch", "triton", "cpu")
CALLS, ROUNDS, TRIES = 100, 9, 4
TARGET = ("cuda", 90, 32)  # what the stub says it is


@cache
def shapes() -> dict[str, tuple[str, Any]]:
    """By name: the op, and a small shape of its bench."""
    return {f"{op} {shape.name}".strip(): (op, shape) for op in ops() for shape in bench_of(op).HOST}


def build_stub(folder: Path) -> Path:
    """The stub, compiled into ``folder`` under the driver's name.

    Raises:
        subprocess.CalledProcessError: it does not compile.
    """
    import triton

    library = folder / "libcuda.so.1"
    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    flags = ["-O1", "-Wall", "-shared", "-fPIC", f"-Wl,-soname,{library.name}", f"-I{include}"]
    subprocess.run([os.environ.get("CC", "cc"), *flags, str(SOURCE), "-o", str(library)], check=True)
    return library


@contextmanager
def stubbed() -> Iterator[ctypes.CDLL]:
    """Within the block the backend "triton" takes CPU tensors and launches into the stub, which is handed over.

    Only once a process, before anything else asks Triton for its driver, and not with the interpreter.
    """
    if backends.INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET=1: the interpreter launches nothing")
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver
    from triton.runtime import driver

    with tempfile.TemporaryDirectory() as folder:
        library = build_stub(Path(folder))
        os.environ["TRITON_LIBCUDA_PATH"] = folder  # Triton links what it builds against it
        stub = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)

        class Driver(CudaDriver):
            def __init__(self) -> None:
                super().__init__()
                # functions of torch.cuda, which has no device here
                self.get_current_device: Callable[[], int] = lambda: 0
                self.get_current_stream: Callable[..., int] = lambda device=None: 0
                self.get_device_capability: Callable[..., tuple[int, int]] = lambda device=0: divmod(TARGET[1], 10)

            def get_current_target(self) -> GPUTarget:
                return GPUTarget(*TARGET)

        driver.set_active(Driver())
        library_of_ops = torch.library.Library("minisora_triton", "IMPL")
        for name in raw_ops():
            library_of_ops.impl(name, launch_of(name), "CPU")
        try:
            with (
                patch.dict(backends.DEVICES, triton="cpu"),
                patch.dict(backends._unavailable, triton=None),
                use_backend("triton"),
            ):
                yield stub
        finally:
            library_of_ops._destroy()


def launch_of(name: str) -> Callable[..., Any]:
    """What backends.define registers for a GPU, but for the change of the current device."""

    def launch(*arguments: Any) -> Any:
        return backends.launcher(name)(*arguments)

    return launch


def bare_launch() -> Callable[[], Any]:
    """A launch of a kernel of two tensors, an integer and a constant, as Triton does it."""
    import triton
    import triton.language as tl

    @triton.jit
    def copy(x, y, size, BLOCK: tl.constexpr):
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(y + at, tl.load(x + at, at < size), at < size)

    x, y = torch.ones(128), torch.empty(128)
    return lambda: copy[(1,)](x, y, 128, BLOCK=128)


def problem_of(name: str) -> Problem:
    op, shape = shapes()[name]
    return bench_of(op).problem(shape, torch.bfloat16, torch.device("cpu"))


def call_of(name: str, direction: str) -> Callable[[], Any]:
    """A call without arguments; forward and backward with the gradients of every input that a training asks for."""
    problem = problem_of(name)
    wanted = [problem.inputs[each] for each in problem.gradient_names]
    upstream = tuple_of(problem.call(problem.inputs))

    def forward() -> None:
        with torch.no_grad():
            problem.call(problem.inputs)

    def both() -> None:
        outputs = tuple_of(problem.call(problem.inputs))
        torch.autograd.grad(outputs, wanted, upstream)

    upstream = tuple(torch.ones_like(value) for value in upstream)
    return both if direction == BOTH else forward


def directions_of(name: str) -> tuple[str, ...]:
    return (FWD, BOTH) if problem_of(name).gradient_names else (FWD,)


def seconds_of(function: Callable[[], Any], calls: int = CALLS) -> float:
    """CPU time of this thread a call: what else runs on the machine counts only through the caches."""
    start = time.thread_time()
    for _ in range(calls):
        function()
    return (time.thread_time() - start) / calls


def measured(stub: ctypes.CDLL, names: list[str], rounds: int = ROUNDS) -> dict[str, Any]:
    """Per call and direction: launches, and the least time of the rounds, in which all take turns."""
    launches = ctypes.c_long.in_dll(stub, "stub_launches")
    functions = {(name, direction): call_of(name, direction) for name in names for direction in directions_of(name)}
    bare = bare_launch()
    counts: dict[tuple[str, str], int] = {}
    times: dict[tuple[str, str], list[float]] = {key: [] for key in functions}
    bare_times: list[float] = []
    for key, function in functions.items():
        function()  # compiles
        before = launches.value
        function()
        counts[key] = launches.value - before
    for _ in range(rounds):
        bare_times.append(seconds_of(bare))
        for key, function in functions.items():
            times[key].append(seconds_of(function))
    least = min(bare_times)
    found: dict[str, Any] = {"bare": least * 1e6, "calls": {}}
    for (name, direction), seconds in times.items():
        entry = {"launches": counts[name, direction], "us": min(seconds) * 1e6, "ratio": min(seconds) / least}
        found["calls"].setdefault(name, {})[direction] = entry
    return found


def head() -> dict[str, Any]:
    import triton

    versions = {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__}
    return {"commit": commit(), "cpu": machine(torch.device("cpu"))["cpu"], **versions}


def complaints(new: dict[str, Any], old: dict[str, Any]) -> dict[str, list[str]]:
    """What is wrong with the calls of ``new`` beside the record ``old``, by name.

    Times are compared where all of :data:`TIMED` is the record's; launches are compared in any case.
    """
    found: dict[str, list[str]] = {}
    same = all(new[what] == old[what] for what in TIMED)
    for name, directions in new["calls"].items():
        for direction, call in directions.items():
            record = old["calls"].get(name, {}).get(direction)
            if record is None:
                found.setdefault(name, []).append(f"{name} {direction}: not in the record")
                continue
            if call["launches"] > record["launches"]:
                text = f"{name} {direction}: {call['launches']} launches, the record has {record['launches']}"
                found.setdefault(name, []).append(text)
            if same and call["ratio"] > GROWTH * record["ratio"]:
                text = f"{name} {direction}: {call['ratio']:.1f} bare launches, the record has {record['ratio']:.1f}"
                found.setdefault(name, []).append(text)
    return found


def least_of(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Two measurements as one: per call the smaller ratio, with its time."""
    calls = {
        name: {
            direction: min(call, second["calls"].get(name, {}).get(direction, call), key=lambda entry: entry["ratio"])
            for direction, call in directions.items()
        }
        for name, directions in first["calls"].items()
    }
    return {**first, "calls": calls}


def checked(measure: Callable[[list[str]], dict[str, Any]], old: dict[str, Any]) -> list[str]:
    """What is wrong after up to :data:`TRIES` measurements of what seemed slower: noise does not stay."""
    new = measure(list(shapes()))
    found = complaints(new, old)
    for _ in range(TRIES - 1):
        if not found:
            break
        new = least_of(new, measure(list(found)))
        found = complaints(new, old)
    return [text for texts in found.values() for text in texts]


def table(found: dict[str, Any]) -> list[str]:
    lines = [f"a bare Triton launch: {found['bare']:.1f} us of thread CPU time"]
    for name, directions in found["calls"].items():
        for direction, call in directions.items():
            text = f"{name} {direction}: {call['us']:.0f} us, {call['launches']} launches"
            lines.append(f"{text}, as long as {call['ratio']:.1f} bare launches")
    return lines


@command(failed=2)
def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--save", action="store_true", help=f"write {RECORD.name} anew")
    parser.add_argument(
        "--before", type=Path, metavar="FILE", help="with --save: a record of an earlier commit, made on this machine"
    )
    options = parser.parse_args(arguments)
    if options.before is not None and not options.save:
        parser.error("--before is for --save")
    before = None if options.before is None else json.loads(options.before.read_text())
    torch.set_num_threads(1)
    with stubbed() as stub:
        if options.save:
            found = {**head(), **measured(stub, list(shapes()), rounds=3 * ROUNDS)}
            print("\n".join(table(found)))
            if before is not None:
                found["before"] = {key: before[key] for key in ("commit", "triton", "bare", "calls")}
            temporary = RECORD.with_suffix(".part")
            temporary.write_text(json.dumps(round_floats(found), indent=1) + "\n")
            temporary.replace(RECORD)
            return 0
        old = json.loads(RECORD.read_text())

        def measure(names: list[str]) -> dict[str, Any]:
            found = {**head(), **measured(stub, names)}
            print("\n".join(table(found)), flush=True)
            return found

        wrong = checked(measure, old)
    timed = all(head()[what] == old[what] for what in TIMED)
    print("\n".join(wrong) or f"no call {'costs' if timed else 'launches'} more than the record says")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
