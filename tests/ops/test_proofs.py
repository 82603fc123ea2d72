"""The words for how a kernel was proven are true of what the tests of every change do."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
from cases import drawn

from minisora_kernels import proofs
from minisora_kernels.__main__ import main, ops, table_of

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results"


def commands(target: str) -> str:
    """What make would run."""
    make = ["make", "--no-print-directory", "--dry-run", target]
    return subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def run_by_ci() -> set[str]:
    return set(re.findall(r"^make ([\w-]+)", (ROOT / ".ci" / "run").read_text(), re.MULTILINE))


def executed_as_ir(op: str) -> bool:
    """A case small enough for tests/ops/test_gpu_ir.py, which checks itself that it reaches every kernel and branch."""
    limit = int(
        re.search(r"^SMALL = ([\d_]+)", (ROOT / "tests" / "ops" / "test_gpu_ir.py").read_text(), re.MULTILINE)[1]
    )
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


def test_the_words_are_explained():
    assert {word for words in proofs.PROOFS.values() for word in words} <= set(proofs.WORDS)


@pytest.mark.parametrize("op", ops())
def test_the_words_of_triton_are_true(op: str):
    words = proofs.words_of(op, "triton")
    checked = commands("check-gpu-code")
    compiled = json.loads((RESULTS / "aot.json").read_text())["kernels"]
    true = {
        "interpreted": "TRITON_INTERPRET=1" in checked and any(case.op == op for case in drawn(0).values()),
        "executed as IR": "check-gpu-ir" in run_by_ci() and executed_as_ir(op),
        "emulated": False,
        "compiled": all(any(name.split()[0] == op for name in kernels) for kernels in compiled.values()),
        "run": run_on_a_gpu(op, "triton"),
    }
    assert set(words) == {word for word, is_true in true.items() if is_true}


@pytest.mark.parametrize("op", [op for op in ops() if "cuda" in table_of(op)])
def test_the_words_of_cuda_are_true(op: str):
    words = proofs.words_of(op, "cuda")
    tests = ROOT / "tests" / "packaging"
    assert "tests/packaging/test_cuda_build.py" in commands("check-gpu-code")
    run = re.search(rf'^EMULATED = .*"{op}": "(\w+\.py)"', (tests / "test_cuda_build.py").read_text(), re.MULTILINE)
    emulated = (tests / run[1]).read_text() if run else ""
    assert ("emulated" in words) == bool(re.search(rf"ops import .*\b{op}\b", emulated))
    compiled = json.loads((RESULTS / "nvcc.json").read_text())["kernels"]
    assert ("compiled" in words) == all(any(op in name for name in kernels) for kernels in compiled.values())
    assert ("run" in words) == run_on_a_gpu(op, "cuda")


def test_the_table_command_shows_them(capsys):
    main([])
    printed = capsys.readouterr().out
    for line in proofs.lines({op: table_of(op) for op in ops()}):
        assert line in printed
    assert "not run on a GPU" in printed


def test_no_file_of_a_kernel_says_otherwise():
    package = ROOT / "minisora_kernels"
    for path in (*(package / "triton").glob("*.py"), *(package / "ops").glob("*.py"), *(ROOT / "csrc").rglob("*.cu")):
        assert not re.search(r"(?i)not (yet )?run on a gpu", path.read_text()), path
