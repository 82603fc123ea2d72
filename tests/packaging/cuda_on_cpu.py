"""Runs CUDA C++ on a CPU: every thread emulated, every PTX instruction read from the source and executed.

Threads are fibers. Warps, the threads of a warp, and blocks run in an order that a seed shuffles; a fiber runs until it
has to wait for others. What a kernel may not do raises RuntimeError, with the thread:

- shared memory: two accesses of which one is a write, by two threads, without a barrier between them (``__syncwarp``
  or ``__syncthreads``: a shuffle or a product is none); a word that nothing wrote; an address that was not asked for
- ``cp.async``: the numbers come when the thread waits for their group; before that the words must not be touched
- a barrier, shuffle or product that not all threads of the warp or block reach, or not the same one

AddressSanitizer sees accesses outside of tensors, UndefinedBehaviorSanitizer addresses that are not aligned.

mma and ldmatrix follow the tables of fragments in NVIDIA's PTX ISA, sections "Matrix Fragments for mma.m16n8k8" and
"mma.m16n8k16 with floating point type", and "ldmatrix". What is not emulated: speed, nvcc, the order of sums in a mma,
races in global memory (blocks that run in another order must give the same bits).
"""

from __future__ import annotations

import re
from pathlib import Path

_ASM = re.compile(r'asm volatile\(\s*("[^"]*")\s*(?::([^;]*?))?\);')
_OPERAND = re.compile(r'"[=+]?([rfln])"\(((?:[^()]|\([^()]*\))*)\)')


def translate(source: str) -> str:
    """Every asm as a call of the emulation: its text and operands, in the order that numbers them."""

    def call(found: re.Match) -> str:
        operands = _OPERAND.findall(found[2] or "")
        return f"emulation::run({found[1]}, {{{', '.join(f'emulation::operand({name})' for _, name in operands)}}});"

    result = _ASM.sub(call, source)
    assert "asm" not in re.sub(r"//.*", "", result), "an asm is not of the form that is read here"
    return result


def write(sources: Path, folder: Path) -> None:
    """The translated files of ``sources``, and what they need to be compiled for a CPU, in ``folder``."""
    for path in sources.iterdir():
        (folder / path.name).write_text(translate(path.read_text()))
    (folder / "emulation.h").write_text((Path(__file__).parent / "cuda_on_cpu.h").read_text())
