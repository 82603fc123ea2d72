"""The raw ops of csrc/cuda for CPU tensors, from the library that ``MINISORA_EMULATED`` names.

tests/packaging/test_cuda_build.py makes it, and runs emulated_*.py in processes that have AddressSanitizer from their
start on.
"""

from __future__ import annotations

import os
from typing import Any

import torch

import minisora_kernels  # noqa: F401 - defines the schemas

_library = torch.library.Library("minisora_emulated", "DEF")


def load(*names: str) -> Any:
    """The raw ops of these names, as attributes."""
    for name in names:
        _library.define(str(getattr(torch.ops.minisora, name).default._schema).removeprefix("minisora::"))
    torch.ops.load_library(os.environ["MINISORA_EMULATED"])
    return torch.ops.minisora_emulated
