"""What the tests of ``python -m minisora_kernels verify`` share."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import KERNEL_BACKENDS

from minisora_kernels.verify.record import Entry, Key

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
QUICK = ("--quick", "--tokens", "32", "--device", "cpu")

needs_cpu = pytest.mark.skipif(KERNEL_BACKENDS != ["cpu"], reason="the cpu kernels are not under test")


def start(*arguments: str, root: Path = ROOT, code: str | None = None, **variables: str) -> subprocess.Popen:
    """The command, or other Python code, on the package under ``root``."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("MINISORA_")}
    command = [sys.executable, "-m", "minisora_kernels", *arguments] if code is None else [sys.executable, "-c", code]
    return subprocess.Popen(
        command,
        cwd=root,
        env={**kept, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process: subprocess.Popen, status: int = 0) -> str:
    output, errors = process.communicate(timeout=300)
    assert process.returncode == status, output + errors
    return output + errors


def entry(
    backend: str = "cpu",
    op: str = "adaln",
    regime: str = "float32 forward",
    ratio: list[float] | None = [0.5, 0.6],  # noqa: B006 - never changed
    compile_ratio: list[float] | None = None,
    wrong: str = "",
) -> Entry:
    times: dict = {"ours": [10.0, None], "eager": [20.0, None]}
    return Entry(backend, op, regime, not wrong, None if wrong else 0.5, wrong, "float32", times, ratio, compile_ratio)


KEY = Key("cuda", "NVIDIA H200", "cc9.0", "2.11.0+cu130", "3.6.0", "ab" * 32)
