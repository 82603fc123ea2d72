"""Compiles csrc/cuda with nvcc, without a GPU: ``python -m bench.nvcc`` checks ``bench/results/nvcc.json``.

For every architecture that setup.py builds, and as it builds: registers, spilled bytes, stack and shared memory of the
kernels. ``--save`` writes the record anew, which takes seven minutes of a core; without it a kernel that spills, or
grew by more than 10%, is an error. It says nothing about speed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from unittest import mock

import torch

from bench.aot import GROWTH, written
from bench.harness.record import RESULTS, ROOT
from minisora_kernels.commands import command

RECORD = RESULTS / "nvcc.json"
# The others get the kernels of bfloat16: those of float16 differ in the types of their products and conversions.
WHOLLY = "sm_90"
SOURCES = ROOT / "csrc" / "cuda"
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
TYPES = {"8BFloat16E": "bfloat16", "4HalfE": "float16"}
_ENTRY = re.compile(
    r"Compiling entry function '(\S+)' for '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
    r"(\d+) bytes spill loads.*?Used (\d+) registers",
    re.DOTALL,
)


def digest() -> str:
    """Of what is compiled: the sources without comments and white space."""
    total = hashlib.sha256()
    for path in sorted([*SOURCES.parent.glob("*.h"), *SOURCES.iterdir()]):
        text = re.sub(r"//.*", "", path.read_text())
        total.update(path.name.encode() + b"\0" + re.sub(r"\s+", "", text).encode() + b"\0")
    return total.hexdigest()


def architectures() -> list[str]:
    """What setup.py builds for, as nvcc calls it."""
    with mock.patch("setuptools.setup"):
        listed = runpy.run_path(str(ROOT / "setup.py"))["CUDA_ARCHITECTURES"]
    return [f"sm_{entry.removesuffix('+PTX').replace('.', '')}" for entry in listed.split(";")]


def shared(head_dim: int, tile: int, backward: bool) -> int:
    """Bytes that a block of a window_attention kernel asks for, at most: ``Layout::bytes`` in its source.

    tests/packaging/test_cuda_build.py has the compiler compare the two.
    """
    rows = 2 * tile * head_dim
    stage = rows * (4 if backward else 3)
    stages = 2 if stage <= 20 << 10 else 1
    once = 8 * head_dim + (8 * head_dim + 2 * rows if backward else 0)
    return stages * (stage + 4 * tile) + once


def name_of(mangled: str) -> tuple[str, int]:
    """A kernel's name in the record, and its shared memory."""
    found = re.search(r"window_attention_(forward|backward)IN3c10(\w+?E)Li(\d+)ELi(\d+)E", mangled)
    if found is None:
        if "window_attention_sums" not in mangled:
            raise ValueError(f"{mangled} is no kernel that bench/nvcc.py knows")
        return "window_attention sums", 4 * 32 * 32
    direction, dtype, head_dim, tile = found[1], TYPES[found[2]], int(found[3]), int(found[4])
    name = f"window_attention {dtype} {direction}: head_dim {head_dim}, tile {tile}"
    return name, shared(head_dim, tile, direction == "backward")


def kernels(said: str) -> dict[str, dict[str, int]]:
    """What ``ptxas -v`` says of every kernel, by name."""
    result: dict[str, dict[str, int]] = {}
    for mangled, _, stack, stored, loaded, registers in _ENTRY.findall(said):
        name, bytes_ = name_of(mangled)
        spilled = max(int(stored), int(loaded))
        result[name] = {"registers": int(registers), "spilled": spilled, "stack": int(stack), "shared": bytes_}
    return dict(sorted(result.items()))


def sources(architecture: str, folder: Path) -> list[Path]:
    """Copies of the sources, without the choice of float16 but for the architecture :data:`WHOLLY`."""
    shutil.copytree(SOURCES, folder, dirs_exist_ok=True)
    found = sorted(folder.glob("*.cu"))
    for path in found if architecture != WHOLLY else ():
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(line for line in lines if "ScalarType::Half) return with_" not in line))
    return found


def compiled(architecture: str) -> dict[str, dict[str, int]]:
    """The kernels as nvcc compiles them."""
    number = architecture.removeprefix("sm_")
    with mock.patch("setuptools.setup"):
        abi = runpy.run_path(str(ROOT / "setup.py"))["STABLE_ABI"]
    include = Path(torch.__file__).parent / "include"
    result: dict[str, dict[str, int]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for source in sources(architecture, Path(folder)):
            flags = ["-std=c++20", "-O3", abi, "-DUSE_CUDA", f"-I{include}", f"-I{SOURCES}"]
            flags += ["--expt-relaxed-constexpr", "-gencode", f"arch=compute_{number},code={architecture}"]
            flags += ["-Xptxas", "-v", "-c", str(source)]
            done = subprocess.run([str(NVCC), *flags, "-o", f"{folder}/a.o"], capture_output=True, text=True)
            if done.returncode:
                raise ValueError(f"nvcc does not compile {source} for {architecture}: {done.stderr[-1000:]}")
            result |= kernels(done.stderr)
    return result


def worse(recorded: dict[str, dict[str, int]], found: dict[str, dict[str, int]]) -> Iterable[str]:
    """What is wrong with kernels beside those of the record."""
    for name, kernel in found.items():
        if kernel["spilled"] or kernel["stack"]:
            yield f"{name}: spills {kernel['spilled']} bytes, has a stack of {kernel['stack']}"
        if name not in recorded:
            yield f"{name}: is not in the record"
        elif kernel["registers"] > GROWTH * recorded[name]["registers"]:
            yield f"{name}: takes {kernel['registers']} registers, {recorded[name]['registers']} before"
    yield from (f"{name}: is in the record alone" for name in recorded.keys() - found.keys())


def version() -> str:
    said = subprocess.run([str(NVCC), "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"V([\d.]+)", said)
    return found[1] if found else "of unknown version"


@command(failed=2)
def main(arguments: list[str]) -> bool:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help="write the record anew")
    options = parser.parse_args(arguments)
    if NVCC is None:
        raise ValueError("nvcc was not found; it comes with the CUDA toolkit, or with pip as nvidia-cuda-nvcc")
    found: dict[str, dict[str, dict[str, int]]] = {}
    for architecture in architectures():
        found[architecture] = compiled(architecture)
        print(f"{architecture}: {len(found[architecture])} kernels", flush=True)
    if options.save:
        record = {"nvcc": version(), "torch": torch.__version__, "sources": digest(), "kernels": found}
        RECORD.write_text(written(record))
    recorded = json.loads(RECORD.read_text())["kernels"]
    errors = [f"{sm} {error}" for sm, each in found.items() for error in worse(recorded.get(sm, {}), each)]
    print("\n".join(errors) or "none spills, none grew")
    return bool(errors)


if __name__ == "__main__":
    sys.exit(main())
