"""How the kernels for GPUs were proven before a release: ``python -m minisora_kernels`` shows it.

A word stands only where the tests of every change do it (tests/test_proofs.py). None of them is a proof on *this* GPU:
that is ``python -m minisora_kernels verify``.
"""

from __future__ import annotations

WORDS = {
    "interpreted": "Triton's interpreter ran the Python of the kernels; values and gradients by the tolerance rule",
    "executed as IR": "what Triton's compiler made of them was executed on a CPU, by the same rule, without races or "
    "accesses out of bounds",
    "emulated": "their CUDA C++ ran on a CPU, every thread emulated, by the same rule",
    "compiled": "they were compiled to machine code for every architecture of bench/results/aot.json, or by nvcc",
    "run": "they ran on a GPU, and the record is committed",
}

_TRITON = ("interpreted", "executed as IR", "compiled")
PROOFS: dict[str, dict[str, tuple[str, ...]]] = {
    "adaln": {"cuda": ("emulated", "compiled"), "triton": _TRITON},
    "gate_residual": {"triton": _TRITON},
    "gate_residual_adaln": {"triton": _TRITON},
    "gelu_mlp": {"triton": _TRITON},
    "grn": {"triton": _TRITON},
    "guided_step": {"triton": _TRITON},
    "patch_embed": {"triton": _TRITON},
    "unpatchify": {"triton": _TRITON},
    "window_attention": {"triton": _TRITON},
}


def lines() -> list[str]:
    """What was proven, ops of the same proofs in one line."""
    groups: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for op, backends in PROOFS.items():
        for backend, words in backends.items():
            groups.setdefault((backend, words), []).append(op)
    return [
        f"{backend}, {', '.join(words)}{'' if 'run' in words else '; not run on a GPU'}: {', '.join(ops)}"
        for (backend, words), ops in sorted(groups.items())
    ]
