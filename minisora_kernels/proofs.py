"""How the kernels for GPUs were proven before a release: ``python -m minisora_kernels`` shows it.

A word stands only where the tests of every change do it (tests/ops/test_proofs.py). None of them is a proof on *this*
GPU: that is ``python -m minisora_kernels verify``.
"""

from __future__ import annotations

from collections.abc import Mapping

from .backends import Table

WORDS = {
    "interpreted": "Triton's interpreter ran the Python of the kernels; values and gradients by the tolerance rule",
    "executed as IR": "what Triton's compiler made of them was executed on a CPU, by the same rule, without races or "
    "accesses out of bounds",
    "emulated": "their CUDA C++ and PTX ran on a CPU, every thread emulated, by the same rule, without races or "
    "accesses out of bounds; calls of cuBLASLt reached a stand-in that is written from its documentation",
    "compiled": "they were compiled to machine code for every architecture of bench/results/aot.json or nvcc.json",
    "run": "they ran on a GPU, and the record is committed",
}

# Of every op that has such a kernel.
PROOFS = {"cuda": ("emulated", "compiled"), "triton": ("interpreted", "executed as IR", "compiled")}
# Ops whose kernels on the backend are those of a library: there is no code for a GPU to compile.
LIBRARY = {"cuda": ("gelu_mlp",)}


def words_of(op: str, backend: str) -> tuple[str, ...]:
    """What was proven of the kernels that the op has on a backend."""
    by_library = op in LIBRARY.get(backend, ())
    return tuple(word for word in PROOFS[backend] if not (by_library and word == "compiled"))


def lines(tables: Mapping[str, Table]) -> list[str]:
    """The same of all ops: a line per backend and words."""
    found: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for backend in PROOFS:
        for op, table in tables.items():
            if backend in table:
                found.setdefault((backend, words_of(op, backend)), []).append(op)
    return [
        f"{backend}, {', '.join(words)}{'' if 'run' in words else '; not run on a GPU'}: {', '.join(names)}"
        for (backend, words), names in found.items()
    ]
