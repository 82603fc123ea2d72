"""The words for how a kernel was proven are true of what the tests of every change do."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import pytest
from cases import drawn

from minisora_kernels import proofs
from minisora_kernels.__main__ import main, ops

ROOT = Path(__file__).parent.parent
MAKEFILE = (ROOT / "Makefile").read_text()
RESULTS = ROOT / "bench" / "results"


def target(name: str) -> str:
    """The recipe of a target that CI makes, and of those that it makes."""
    recipe = re.search(rf"^{name}:.*\n((?:\t.*\n?)*)", MAKEFILE, re.MULTILINE)[1]
    return recipe + "".join(target(other) for other in re.findall(r"\$\(MAKE\)[^\n]* (gpu-ir-\w+)", recipe))


def run_by_ci() -> set[str]:
    return set(re.findall(r"^make ([\w-]+)", (ROOT / ".ci" / "run").read_text(), re.MULTILINE))


def executed_as_ir(op: str) -> bool:
    """A case small enough for tests/test_gpu_ir.py, which checks itself that it reaches every kernel and branch."""
    limit = int(re.search(r"^SMALL = ([\d_]+)", (ROOT / "tests" / "test_gpu_ir.py").read_text(), re.MULTILINE)[1])
    sizes = (max(t.numel() for t in case.tensors.values()) for case in drawn(0).values() if case.op == op)
    return any(0 < size <= limit for size in sizes)


def run_on_a_gpu(op: str, backend: str) -> bool:
    """Whether a committed record of the benches, made on a GPU, has the op on that backend."""
    found = [json.loads(path.read_text()) for path in RESULTS.glob("*/*.json")]
    machines = [record for record in found if isinstance(record.get("machine"), dict) and "cases" in record]
    return any(
        case["op"] == op and backend in str(case["kernels"])
        for record in machines
        if record["machine"]["device"] == "cuda"
        for case in record["cases"]
    )


def test_every_kernel_for_gpus_has_its_proofs_and_no_others():
    claimed = {op: set(backends) for op, backends in proofs.PROOFS.items()}
    there = {
        op: set(importlib.import_module(f"minisora_kernels.ops.{op}").BACKENDS) & {"cuda", "triton"} for op in ops()
    }
    assert claimed == {op: backends for op, backends in there.items() if backends}
    assert {word for backends in proofs.PROOFS.values() for words in backends.values() for word in words} <= set(
        proofs.WORDS
    )


@pytest.mark.parametrize("op", proofs.PROOFS)
def test_the_words_of_triton_are_true(op: str):
    words = proofs.PROOFS[op]["triton"]
    compiled = json.loads((RESULTS / "aot.json").read_text())["kernels"]
    true = {
        "interpreted": "TRITON_INTERPRET=1" in target("check-gpu-code") and any(c.op == op for c in drawn(0).values()),
        "executed as IR": "check-gpu-ir" in run_by_ci() and executed_as_ir(op),
        "emulated": False,
        "compiled": all(any(name.split()[0] == op for name in kernels) for kernels in compiled.values()),
        "run": run_on_a_gpu(op, "triton"),
    }
    assert set(words) == {word for word, is_true in true.items() if is_true}


def test_the_words_of_cuda_are_true():
    for op, backends in proofs.PROOFS.items():
        if "cuda" in backends:
            text = (ROOT / "tests" / "test_cuda_build.py").read_text()
            assert "tests/test_cuda_build.py" in target("check-gpu-code")
            assert ("emulated" in backends["cuda"]) == bool(re.search(rf"ops import .*\b{op}\b", text))
            assert ("run" in backends["cuda"]) == run_on_a_gpu(op, "cuda")


def test_the_table_command_shows_them(capsys):
    main([])
    printed = capsys.readouterr().out
    for line in proofs.lines():
        assert line in printed
    assert "not run on a GPU" in printed


def test_no_file_of_a_kernel_says_otherwise():
    package = ROOT / "minisora_kernels"
    for path in (*(package / "triton").glob("*.py"), *(package / "ops").glob("*.py"), *(ROOT / "csrc").rglob("*.cu")):
        assert not re.search(r"(?i)not (yet )?run on a gpu", path.read_text()), path
