"""One op, one stem: a directory listing is the support matrix."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
from cases import CASES

import minisora_kernels as mk
from minisora_kernels import backends
from minisora_kernels.__main__ import ops, table
from minisora_kernels.verify.cases import checked

ROOT = Path(__file__).parent.parent
KERNELS = [
    *(ROOT / "csrc" / "cpu").glob("*.cpp"),
    *(ROOT / "csrc" / "cuda").glob("*.cu"),
    *(path for path in (ROOT / "minisora_kernels" / "triton").glob("*.py") if not path.stem.startswith("_")),
]


def test_every_kernel_file_has_the_stem_of_an_op():
    assert KERNELS
    assert {path.stem for path in KERNELS} <= set(ops())


@pytest.mark.parametrize("op", ops())
def test_an_op_claims_a_backend_if_and_only_if_its_file_is_there(op: str):
    claims = set(importlib.import_module(f"minisora_kernels.ops.{op}").BACKENDS) - {"reference"}
    files = {"cpu": f"csrc/cpu/{op}.cpp", "cuda": f"csrc/cuda/{op}.cu", "triton": f"minisora_kernels/triton/{op}.py"}
    assert claims == {backend for backend, path in files.items() if (ROOT / path).exists()}


def test_every_op_has_a_bench():
    benches = {path.stem.removeprefix("bench_") for path in (ROOT / "bench").glob("bench_*.py")}
    assert benches == {*ops(), "model"}


@pytest.mark.parametrize("op", ops())
def test_every_op_is_public_and_tested(op: str):
    assert callable(getattr(mk, op))
    assert (ROOT / "tests" / f"test_{op}.py").exists()
    assert op in {case.op for case in CASES} and op in {case.op for case in checked()}


def test_the_public_names_are_the_ops_and_their_helpers():
    public = {name for name in vars(mk) if not name.startswith("_")}
    modules = {
        "automatic",
        "backends",
        "checks",
        "forcing",
        "modulation",
        "ops",
        "recompute",
        "testing",
        "triton",
        "verify",
    }
    assert public - modules == {*ops(), "Coefficients", "use_backend", "recompute_adaln", "Rope", "rope_3d"}


def test_models_use_the_public_ops_only():
    for path in (ROOT / "models").glob("*.py"):
        for line in path.read_text().splitlines():
            if re.match(r"\s*(from|import) minisora_kernels", line):
                assert re.fullmatch(r"\s*(import minisora_kernels( as mk)?|from minisora_kernels import .*)", line), (
                    f"{path.name}: {line}"
                )


def test_environment_variables_are_read_in_one_place():
    readers = [
        path.name
        for path in (ROOT / "minisora_kernels").rglob("*.py")
        if re.search(r"environ|getenv", path.read_text())
    ]
    assert readers == ["backends.py"]


def test_the_table_command_names_every_op_backend_and_reason(capsys):
    from minisora_kernels.__main__ import main

    main([])
    printed = capsys.readouterr().out
    for op, cells in table():
        assert re.search(rf"{op} +{' +'.join(cells)}", printed)
    for name in backends.BACKENDS:
        assert (backends.unavailable(name) or "available") in printed
    assert "build record" in printed
