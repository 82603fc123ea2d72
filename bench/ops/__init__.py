"""The benches of the ops, one file each: its inputs, shapes and traffic."""

from __future__ import annotations

import importlib
from typing import Any


def bench_of(op: str) -> Any:
    """The module of an op's bench."""
    return importlib.import_module(f"bench.ops.bench_{op}")
