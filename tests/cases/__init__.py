"""Small inputs for every op, a file each: a case is run on every backend, dtype and check of test_ops.py."""

from __future__ import annotations

import importlib
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType

from conftest import DEVICE

from minisora_kernels import backends
from minisora_kernels.verify.cases import Case, files_of_ops


def files() -> list[ModuleType]:
    """The files beside this one, and those of ops that have none here: verify's."""
    here = {path.stem: f"{__name__}.{path.stem}" for path in Path(__file__).parent.glob("[!_]*.py")}
    verified = {file.__name__.rpartition(".")[2]: file.__name__ for file in files_of_ops()}
    return [importlib.import_module(name) for _, name in sorted((verified | here).items())]


@cache
def drawn(draw: int) -> dict[str, Case]:
    """Every case by its name, with other numbers for every ``draw``."""
    return {str(case): replace(case, device=DEVICE) for file in files() for case in file.cases(draw)}


CASES = list(drawn(0).values())
# Triton's interpreter takes milliseconds for a program: the longest are for the chunks and threads of a CPU.
# tests/ops/test_triton.py has the widths of models on few tokens.
if backends.INTERPRETED:
    CASES = [case for case in CASES if max(tensor.numel() for tensor in case.tensors.values()) <= 50_000]
