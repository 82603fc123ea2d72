"""Compiles every Triton kernel ahead of time, without a GPU: ``python -m bench.aot`` checks ``bench/results/aot.json``.

Every op runs forward and backward on the named shapes of the benches, on tensors without memory ("meta"). What its
launchers would launch on a GPU is compiled to a cubin for each of :data:`ARCHITECTURES` instead, and what ptxas made of
it is recorded: registers, spills, shared memory, and the share of a multiprocessor's warps that fit. ``--save`` writes
the record anew; without it a kernel that grew by more than 10% is an error. It says nothing about speed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench.harness import DTYPES, Problem, tuple_of
from bench.record import RESULTS, ROOT
from bench.traffic import bytes_moved, named
from minisora_kernels import backends, use_backend
from minisora_kernels.__main__ import ops
from minisora_kernels.counters import ALLOCATIONS

RECORD = RESULTS / "aot.json"
GROWTH = 1.1
# Bound by their products, windows of more than 64 tokens and float32 without tensor cores may spill a little; all
# others are bound by memory and must not.
COMPUTE_BOUND = re.compile(r"window_attention \w+ (forward|backward|dbias)_kernel|patch_embed float32")
# Those that should not and do, by at most so many bytes a thread: ptxas prefers more threads to more registers. With
# twice the warps the float32 ones spill as much.
SPILLING = {
    "sm_80 gate_residual_adaln float16 _bwd 1": 8,
    r"sm_\d+ window_attention float32 short_\w+ \d+": 32,
    r"sm_100 window_attention b?float16 short_backward_kernel \d+": 24,
}
PRECISIONS = {**DTYPES, "float16": torch.float16}


class Architecture:
    """What a multiprocessor of compute capability ``number`` has (CUDA C++ Programming Guide, compute capabilities)."""

    registers = 65536

    def __init__(self, number: int, warps: int, blocks: int, shared: int, shared_per_block: int) -> None:
        self.number, self.warps, self.blocks = number, warps, blocks
        self.shared, self.shared_per_block = shared * 1024, shared_per_block * 1024

    def occupancy(self, warps: int, registers: int, shared: int) -> float:
        """The share of the warps that can be there at once, as far as registers and shared memory tell."""
        per_warp = -(-registers * 32 // 256) * 256
        by_registers = self.registers // per_warp // warps
        by_shared = self.shared // (shared + 1024)  # the system keeps 1 KiB a block
        return min(self.blocks, self.warps // warps, by_registers, by_shared) * warps / self.warps


ARCHITECTURES = {
    architecture.number: architecture
    for architecture in (
        Architecture(80, warps=64, blocks=32, shared=164, shared_per_block=163),
        Architecture(86, warps=48, blocks=16, shared=100, shared_per_block=99),
        Architecture(89, warps=48, blocks=24, shared=100, shared_per_block=99),
        Architecture(90, warps=64, blocks=32, shared=228, shared_per_block=227),
        Architecture(100, warps=64, blocks=32, shared=228, shared_per_block=227),
        Architecture(120, warps=48, blocks=24, shared=100, shared_per_block=99),
    )
}


class Scratch(TorchDispatchMode):
    """``bytes`` of what is allocated within the block."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._schema.name in ALLOCATIONS:
            self.bytes += result.nbytes
        return result


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """In flash-attn's place: the shape alone, and gradients."""
    return q + k + v


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


def kernels_of(architecture: int) -> dict[str, dict[str, dict[str, Any]]]:
    """What the benches would launch there, and the bytes it moves.

    Returns:
        ``kernels``: by op, dtype, kernel and the number of its specialisation, what became of it; ``traffic``: by op,
        shape and dtype, bytes of a forward and a backward (see bench/traffic.py).
    """
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from minisora_kernels.triton import _window_library

    class Driver:
        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", architecture, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    driver.set_active(Driver())
    found: dict[str, Any] = {}
    label = ""
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        if not any(compiled is other for other in found.values()):
            number = sum(name.startswith(f"{label} {self.__name__} ") for name in found)
            found[f"{label} {self.__name__} {number}"] = compiled
        return compiled

    def launch(problem: Problem) -> None:
        outputs = tuple_of(problem.call(problem.inputs))
        if problem.wanted:
            torch.autograd.grad(outputs, [problem.inputs[name] for name in problem.wanted], outputs)

    traffic = {}
    with on_meta_tensors() as moved, patch.object(JITFunction, "run", compile_only):
        for op in ops():
            if "triton" not in importlib.import_module(f"minisora_kernels.ops.{op}").BACKENDS:
                continue
            bench = importlib.import_module(f"bench.bench_{op}")
            (mark,) = (m for m in getattr(bench, f"test_{op}").pytestmark if m.name == "parametrize")
            for shape in dict.fromkeys(param.values[0] for param in mark.args[1]):
                half = ("float16",) if "bfloat16" in shape.dtypes else ()
                for dtype in shape.dtypes + half:
                    label = f"{op} {dtype}"
                    moved.clear()
                    problem = bench.problem(shape, PRECISIONS[dtype], torch.device("meta"))
                    launch(problem)
                    if moved:
                        traffic[f"{op} {shape.name} {dtype}"] = dict(moved)
                    if problem.wanted and problem.constants:  # gradients that the benches do not ask for
                        launch(replace(problem, constants=()))
                    if op == "window_attention":  # what goes before and after flash-attn, where it can serve
                        with patch.object(_window_library, "flash_attention", lambda *_: attention):
                            launch(problem)
    kernels = {name: resources(compiled, ARCHITECTURES[architecture]) for name, compiled in found.items()}
    return {"kernels": kernels, "traffic": traffic}


def resources(compiled: Any, architecture: Architecture) -> dict[str, Any]:
    """What ``cuobjdump`` reads from the cubin. A stack in a kernel that indexes no array is what registers spill to."""
    from triton.knobs import nvidia

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [nvidia.cuobjdump.path, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack, local = (int(re.search(rf"{word}:(\d+)", text)[1]) for word in ("REG", "STACK", "LOCAL"))
    warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    return {
        "warps": warps,
        "registers": registers,
        "spilled": stack + local,
        "shared": shared,
        "occupancy": round(architecture.occupancy(warps, registers, shared), 2),
    }


def everything() -> dict[str, Any]:
    """The record: :func:`kernels_of` every architecture, in a process each, for Triton keeps one target a process."""
    import triton

    def of(architecture: int) -> dict[str, dict[str, dict[str, Any]]]:
        command = [sys.executable, "-m", "bench.aot", "--architecture", str(architecture)]
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        return json.loads(done.stdout.splitlines()[-1])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = dict(zip(ARCHITECTURES, pool.map(of, ARCHITECTURES), strict=True))
    kernels = {f"sm_{number}": each["kernels"] for number, each in found.items()}
    traffic = next(iter(found.values()))["traffic"]
    return {"triton": triton.__version__, "torch": torch.__version__, "kernels": kernels, "traffic": traffic}


def complaints(new: dict[str, Any], old: dict[str, Any]) -> list[str]:
    """What is wrong with the kernels of ``new``: spills, too much shared memory, or growth beyond the record ``old``.

    Growth is that of the same compiler: with another Triton only spills and limits count.
    """
    found = []
    for sm, kernels in new["kernels"].items():
        architecture, record = ARCHITECTURES[int(sm.removeprefix("sm_"))], old["kernels"].get(sm, {})
        for name, kernel in kernels.items():
            known = [most for pattern, most in SPILLING.items() if re.fullmatch(pattern, f"{sm} {name}")]
            if kernel["spilled"] > max(known, default=0) and not COMPUTE_BOUND.match(name):
                found.append(f"{sm} {name}: spills {kernel['spilled']} bytes a thread")
            if kernel["shared"] > architecture.shared_per_block:
                limit = architecture.shared_per_block
                found.append(f"{sm} {name}: {kernel['shared']} bytes of shared memory, there are {limit}")
            if new["triton"] != old["triton"]:
                continue
            if name not in record:
                found.append(f"{sm} {name}: not in the record")
                continue
            for what in ("registers", "shared", "spilled"):
                if kernel[what] > GROWTH * record[name][what]:
                    found.append(f"{sm} {name}: {what} grew from {record[name][what]} to {kernel[what]}")
        if new["triton"] == old["triton"]:
            found += [f"{sm} {name}: in the record, but nothing launches it" for name in record if name not in kernels]
    return found


def written(record: dict[str, Any]) -> str:
    """The record as JSON, one kernel a line."""
    text = json.dumps(record, indent=1)
    return re.sub(r"\{\s+([^{}]*?)\s+\}", lambda m: "{" + re.sub(r"\s*\n\s*", " ", m[1]) + "}", text) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--save", action="store_true", help=f"write {RECORD.name} anew")
    parser.add_argument("--architecture", type=int, choices=ARCHITECTURES, help="print what is of one alone, as JSON")
    options = parser.parse_args()
    if options.architecture:
        print(json.dumps(kernels_of(options.architecture)))
        return 0
    new = everything()
    if options.save:
        RECORD.write_text(written(new))
    found = complaints(new, json.loads(RECORD.read_text()))
    count = sum(map(len, new["kernels"].values()))
    print("\n".join(found) or f"{count} kernels for {len(new['kernels'])} architectures: none spills anew, none grew")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
