"""Compiles every Triton kernel ahead of time, without a GPU: ``python -m bench.aot`` checks ``bench/results/aot.json``.

Every op runs forward and backward on tensors without memory ("meta"). What its launchers would launch on a GPU is
compiled instead, for each of :data:`ARCHITECTURES`, and what became of it is recorded: registers, spills, shared
memory, and the share of a multiprocessor's warps that fit. ``--save`` writes the record anew; without it a kernel that
grew by more than 10% is an error. It says nothing about speed.

One architecture, :data:`WHOLLY`, gets all: the shapes of the benches, and their ``LAUNCHES``, which reach all that a
launcher can choose. The others get the quick shapes. ``--quick`` compiles the ``LAUNCHES`` alone, in one dtype, for
Tritons whose record this is not.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench.gpu.ahead import bytes_ahead
from bench.gpu.architectures import ARCHITECTURES, Architecture
from bench.gpu.traffic import bytes_moved, named
from bench.harness.record import RESULTS, ROOT
from bench.harness.session import DTYPES, Problem, tuple_of
from bench.ops import bench_of
from minisora_kernels import backends, use_backend
from minisora_kernels.__main__ import ops
from minisora_kernels.commands import command
from minisora_kernels.counters import ALLOCATIONS

RECORD = RESULTS / "aot.json"
GROWTH = 1.1
# Of 362 kernels four had other registers on sm_86 than on sm_89, none had other spills or shared memory.
WHOLLY = "sm_90"
# Bound by their products, attention to more than 32 tokens and float32 without tensor cores may spill a little; all
# others are bound by memory and must not.
COMPUTE_BOUND = re.compile(r"(window_)?attention \w+ (forward|query|key)_kernel|patch_embed float32")
# Those that should not and do: what matches a whole name, architecture first, by at most so many bytes a thread, with
# the reason beside it.
SPILLING: dict[str, int] = {
    # ptxas prefers another block on the multiprocessor to the last registers.
    r"sm_\d+ window_attention float32 short_backward_kernel: .*": 40,
    r"sm_90 window_attention bfloat16 short_backward_kernel: temporal 5 head_dim 64 bias": 8,
    r"sm_90 window_attention tf32 short_forward_kernel: temporal 32 head_dim 64 rms weight pairs": 8,
    # Rows turned by halves, without a norm, are turned in the layout of a product.
    r"sm_90 window_attention bfloat16 short_(for|back)ward_kernel: temporal 24 head_dim 72 halves": 64,
    r"sm_8\d adaln float32 _bwd: XL/2 16x256x256 b2": 8,
    r"sm_(90|120) gate_residual bfloat16 _bwd: .*": 8,
    r"sm_90 norm_rope bfloat16 norm_backward_kernel: angles per head": 8,
    # A token of 8192 channels: the columns of a thread and their sums do not fit.
    r"sm_90 gate_residual_adaln \w+ _bwd: D 8192": 176,
    r"sm_90 norm_rope \w+ norm_backward_kernel: 64x128 across heads layer": 8,
    # Around flash attention a program holds q, k and their gradients of 64 tokens.
    r"sm_90 window_attention bfloat16 finish_kernel: .*head_dim 128.*": 272,
}
# Those that must read ahead: the backwards whose shapes are the benches' have as many bytes in flight, on every
# multiprocessor, while they compute. An H200 reads at its full speed with 26 KB, by an estimate.
READS_AHEAD, LEAST_AHEAD = re.compile(r"(adaln|gate_residual|gate_residual_adaln) \w+ _bwd: \w+/2 .*"), 26_000
# "tf32" is float32 whose products may be rounded, as torch.set_float32_matmul_precision("high") has it.
PRECISIONS = {**DTYPES, "float16": torch.float16, "tf32": torch.float32}


class Scratch(TorchDispatchMode):
    """``bytes`` of what is allocated within the block."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._schema.name in ALLOCATIONS:
            self.bytes += result.nbytes
        return result


class Launchers:
    """The launchers of minisora_kernels/triton in place of the raw ops, which would give meta tensors their shapes."""

    def __init__(self, moved: Counter[str]) -> None:
        self._moved = moved

    def __getattr__(self, name: str) -> Any:
        launch = backends.launcher(name)

        def counted(*arguments: Any) -> Any:
            with Scratch() as scratch:
                result = launch(*arguments)
            temporary = max(scratch.bytes - sum(tensor.nbytes for tensor in tuple_of(result)), 0)
            self._moved.update(bytes_moved(name, named(name, arguments, result), temporary))
            return result

        return counted


@contextmanager
def on_meta_tensors() -> Iterator[Counter[str]]:
    """Within the block the backend "triton" takes meta tensors and calls its launchers directly; counts their bytes."""
    moved: Counter[str] = Counter()
    with ExitStack() as stack:
        stack.enter_context(patch.dict(backends.DEVICES, triton="meta"))
        stack.enter_context(patch.object(backends, "unavailable", lambda name: None))
        stack.enter_context(patch.object(torch, "is_autocast_enabled", lambda device: False))  # refuses "meta"
        for op in ops():
            module = importlib.import_module(f"minisora_kernels.ops.{op}")
            stack.enter_context(patch.object(module, "kernels", lambda name: Launchers(moved)))
        stack.enter_context(use_backend("triton"))
        yield moved


def set_target(architecture: Architecture) -> None:
    """Triton compiles for it from here on; one a process."""
    from triton.runtime import driver

    class Driver:
        def get_current_target(self) -> Any:
            return architecture.target

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    driver.set_active(Driver())


def benched(op: str, every: bool = True) -> Iterator[tuple[str, str, Problem]]:
    """Name, dtype and problem of the benches' shapes, or of the quick ones alone; the quick ones in float16 too."""
    bench = bench_of(op)
    for shape in bench.SHAPES if every else filter(lambda shape: shape.quick, bench.SHAPES):
        for dtype in (*shape.dtypes, *(("float16",) if shape.quick else ())):
            yield shape.name, dtype, bench.problem(shape, PRECISIONS[dtype], torch.device("meta"))


def small(op: str) -> Iterator[tuple[str, str, Problem]]:
    """The same of the ``LAUNCHES`` of the benches."""
    for call in bench_of(op).LAUNCHES:
        for dtype in call.dtypes:
            yield call.name, dtype, call.problem(PRECISIONS[dtype])


def quick(op: str) -> Iterator[tuple[str, str, Problem]]:
    """The quick ones, each in one dtype: enough for every branch of every kernel, see bench/gpu/branches.py."""
    for call in filter(lambda call: call.quick, bench_of(op).LAUNCHES):
        yield call.name, call.dtypes[-1], call.problem(PRECISIONS[call.dtypes[-1]])


def launch(problem: Problem) -> None:
    """Forward and backward."""
    outputs = [output for output in tuple_of(problem.call(problem.inputs)) if output.requires_grad]
    if problem.gradient_names:
        torch.autograd.grad(outputs, [problem.inputs[name] for name in problem.gradient_names], outputs)


def launch_all(
    problems: Callable[[str], Iterable[tuple[str, str, Problem]]],
    begin: Callable[[str, str, str], None],
    of: Sequence[str] = (),
) -> dict[str, dict[str, int]]:
    """Launches them for every op, or for those of ``of``; ``begin(op, name, dtype)`` goes first.

    Returns:
        The bytes that each moves, by bench/gpu/traffic.py.
    """
    from minisora_kernels.triton import _window_library

    traffic = {}
    with on_meta_tensors() as moved:
        for op in of or ops():
            for name, dtype, problem in problems(op):
                begin(op, name, dtype)
                moved.clear()
                torch.backends.cuda.matmul.fp32_precision = "tf32" if dtype == "tf32" else "ieee"
                launch(problem)
                if moved:
                    traffic[f"{op} {name} {dtype}"] = dict(moved)
                if problem.gradient_names and problem.constants:  # gradients that the benches do not ask for
                    launch(replace(problem, constants=()))
                if op == "window_attention":  # what goes before and after torch's flash attention, where it can serve
                    with patch.object(_window_library, "serves", lambda device: True):
                        launch(problem)
    return traffic


def kernels_of(
    architecture: Architecture, brief: bool = False, of: Sequence[str] = ()
) -> dict[str, dict[str, dict[str, Any]]]:
    """What would be launched there, and the bytes that the benches move; ``brief``: see ``--quick``; ``of``: these ops.

    Returns:
        ``kernels``: by op, dtype, kernel and the first call that launches it, what became of it; ``traffic``: by op,
        call and dtype, bytes of a forward and a backward (see bench/gpu/traffic.py).
    """
    from triton.runtime.jit import JITFunction

    set_target(architecture)
    found: dict[str, dict[str, Any]] = {}
    seen: set[int] = set()
    kept = []  # an id is another's once its object is gone
    label = call = ""
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        try:
            compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        except Exception as error:  # whatever the compiler raises is what is wrong with this kernel
            compiled = error
        if id(compiled) not in seen:
            seen.add(id(compiled))
            kept.append(compiled)
            name = f"{label} {self.__name__}: {call}"
            more = sum(other.split(" #")[0] == name for other in found)
            found[f"{name} #{more + 1}" if more else name] = resources(
                compiled, architecture, bool(READS_AHEAD.match(name))
            )
        return compiled

    def begin(op: str, name: str, dtype: str) -> None:
        nonlocal label, call
        label, call = f"{op} {dtype}", name

    with patch.object(JITFunction, "run", compile_only):
        whole = architecture.name == WHOLLY
        traffic = launch_all(quick if brief else partial(benched, every=whole), begin, of)
        if whole and not brief:
            launch_all(small, begin, of)
    return {"kernels": found, "traffic": traffic}


def resources(compiled: Any, architecture: Architecture, ahead: bool = False) -> dict[str, Any]:
    """What the compiler made of a kernel, or its error; with ``ahead``, what a multiprocessor has in flight, in bytes.

    A stack in a kernel that indexes no array is what registers spill to. On AMD, registers are the vector ones.
    """
    if isinstance(compiled, Exception):
        return {"error": str(compiled).strip().splitlines()[-1] if str(compiled).strip() else repr(compiled)}
    warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    if not architecture.nvidia:
        text = compiled.asm["amdgcn"]
        registers, stack = (
            int(re.findall(rf"\.{word}:\s+(\d+)", text)[0]) for word in ("vgpr_count", "private_segment_fixed_size")
        )
        return {"warps": warps, "registers": registers, "spilled": stack, "shared": shared}
    from triton.knobs import nvidia

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = [nvidia.cuobjdump.path, "-res-usage", *(["-sass"] if ahead else []), file.name]
        text = subprocess.run(tool, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.findall(rf"{word}:(\d+)", text)[0]) for word in ("REG", "STACK", "LOCAL"))
    occupancy = architecture.occupancy(warps, registers, shared)
    found = {"warps": warps, "registers": registers, "spilled": stack + local, "shared": shared}
    found["occupancy"] = round(occupancy, 2)
    if ahead:
        from minisora_kernels.triton import _tiles

        wanted = max(_tiles.sizes(_tiles.AHEAD).warps // warps, 1)
        programs = min(round(occupancy * architecture.warps / warps), wanted)
        found["ahead"] = programs * bytes_ahead(text, 32 * warps)
    return found


def everything(names: Sequence[str] = tuple(ARCHITECTURES), brief: bool = False) -> dict[str, Any]:
    """The record: :func:`kernels_of` every architecture, in a process each, for Triton keeps one target a process.

    What gets the most kernels is two processes, one for window_attention alone: half of the time is its own.
    """
    import triton

    parts = [["window_attention"], [op for op in ops() if op != "window_attention"]]
    longest_first = sorted(names, key=lambda name: name != WHOLLY)
    tasks = [(name, part) for name in longest_first for part in (parts if name == WHOLLY else [[]])]

    def of(task: tuple[str, list[str]]) -> dict[str, dict[str, dict[str, Any]]]:
        name, part = task
        command = [sys.executable, "-m", "bench.aot", "--alone", name, *part, *(["--quick"] if brief else [])]
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        if ARCHITECTURES[name].nvidia:  # all that is read of a kernel; the rest would fill the disk
            environment["TRITON_STORE_BINARY_ONLY"] = "1"
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        return json.loads(done.stdout.splitlines()[-1])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(zip(tasks, pool.map(of, tasks), strict=True))

    def joined(of_name: str, what: str) -> dict[str, Any]:
        """In the order of the ops, however they were shared out."""
        values = {key: value for (name, _), part in found if name == of_name for key, value in part[what].items()}
        return dict(sorted(values.items(), key=lambda pair: ops().index(pair[0].split(" ")[0])))

    kernels = {name: joined(name, "kernels") for name in names}
    return {
        "triton": triton.__version__,
        "torch": torch.__version__,
        "sources": sources(),
        "kernels": kernels,
        "traffic": joined(longest_first[0], "traffic"),
    }


def sources() -> str:
    """A digest of what decides what is compiled: the code of the kernels, the ops, and the calls that launch them.

    Comments, docstrings, empty lines and spaces within a line are no code.
    """
    folders = ("minisora_kernels/triton", "minisora_kernels/ops", "bench/ops", "bench/harness")
    further = ("bench/gpu/launches.py", "models/denoisers/dit.py")
    paths = [path for folder in folders for path in (ROOT / folder).glob("*.py")]
    total = hashlib.sha256()
    for path in sorted([*paths, *filter(Path.exists, (ROOT / name for name in further))]):
        code = re.sub(r'""".*?"""|#[^\n]*', "", path.read_text(), flags=re.DOTALL)
        code = re.sub(r"(?<=\S)[ \t]+|\n\s*(?=\n)", "", code).strip()
        total.update(path.name.encode() + b"\0" + code.encode() + b"\0")
    return total.hexdigest()


def complaints(new: dict[str, Any], old: dict[str, Any]) -> list[str]:
    """What is wrong with the kernels of ``new``: errors, spills, too much shared memory, growth beyond ``old``.

    Spills and growth are those of one compiler: with another Triton only errors and limits count.
    """
    found = []
    for name, kernels in new["kernels"].items():
        architecture, record = ARCHITECTURES[name], old["kernels"].get(name, {})
        for kernel, values in kernels.items():
            wrong = _wrong(f"{name} {kernel}", values, architecture, new["triton"] == old["triton"])
            found += [f"{name} {kernel}: {text}" for text in wrong]
            if new["triton"] != old["triton"] or "error" in values:
                continue
            if kernel not in record:
                found.append(f"{name} {kernel}: not in the record")
                continue
            for what in ("registers", "shared", "spilled"):
                if values[what] > GROWTH * record[kernel][what]:
                    found.append(f"{name} {kernel}: {what} grew from {record[kernel][what]} to {values[what]}")
        if new["triton"] == old["triton"]:
            lost = (kernel for kernel in record if kernel not in kernels)
            found += [f"{name} {kernel}: in the record, but nothing launches it" for kernel in lost]
    return found


def _wrong(name: str, values: dict[str, Any], architecture: Architecture, same_triton: bool) -> list[str]:
    """What is wrong with one kernel, whatever the record says; spills count for the Triton of the record alone."""
    if "error" in values:
        return [f"does not compile: {values['error']}"]
    found = []
    allowed = max((most for pattern, most in SPILLING.items() if re.fullmatch(pattern, name)), default=0)
    may_spill = not same_triton or not architecture.nvidia or COMPUTE_BOUND.match(name.split(" ", 1)[1])
    if values["spilled"] > allowed and not may_spill:
        found.append(f"spills {values['spilled']} bytes a thread")
    if same_triton and values.get("ahead", LEAST_AHEAD) < LEAST_AHEAD:
        found.append(f"{values['ahead']} bytes in flight on a multiprocessor, there must be {LEAST_AHEAD}")
    if values["shared"] > architecture.shared_per_block:
        found.append(f"{values['shared']} bytes of shared memory, there are {architecture.shared_per_block}")
    return found


def written(record: dict[str, Any]) -> str:
    """The record as JSON, one kernel a line."""
    text = json.dumps(record, indent=1)
    return re.sub(r"\{\s+([^{}]*?)\s+\}", lambda m: "{" + re.sub(r"\s*\n\s*", " ", m[1]) + "}", text) + "\n"


@command(failed=2)
def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--save", action="store_true", help=f"write {RECORD.name} anew")
    parser.add_argument(
        "--architectures", nargs="+", default=list(ARCHITECTURES), choices=ARCHITECTURES, metavar="NAME"
    )
    parser.add_argument(
        "--alone", nargs="+", metavar=("NAME", "OP"), help="print what is of one, and of these ops alone, as JSON"
    )
    parser.add_argument("--quick", action="store_true", help="only the LAUNCHES of the benches, each in one dtype")
    options = parser.parse_args(arguments)
    if options.alone:
        name, *of = options.alone
        print(json.dumps(kernels_of(ARCHITECTURES[name], options.quick, of)))
        return 0
    if options.save and (options.quick or options.architectures != list(ARCHITECTURES)):
        parser.error("--save is for the whole record, without --quick and --architectures")
    new = everything(options.architectures, options.quick)
    if options.save:
        RECORD.write_text(written(new))
    record = json.loads(RECORD.read_text())
    found = complaints(new, record | {"triton": None} if options.quick else record)
    count = sum(map(len, new["kernels"].values()))
    done = f"Triton {new['triton']}: {count} kernels for {', '.join(new['kernels'])}: none spills anew, none grew"
    print("\n".join(found) or done)
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
