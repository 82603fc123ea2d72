"""``make new-op`` writes an op that works: it passes lint and, on every backend, what every op must pass."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OP = "made_up_2"
FOLDERS = ("minisora_kernels", "csrc", "models", "bench", "tests", "tools")
FILES = {
    "bench/ops/bench_made_up_2.py",
    "csrc/cpu/made_up_2.cpp",
    "minisora_kernels/ops/made_up_2.py",
    "minisora_kernels/triton/made_up_2.py",
    "minisora_kernels/verify/cases/made_up_2.py",
    "tests/ops/test_made_up_2.py",
}


def copy(target: Path) -> Path:
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "results", "build_record.json")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, target / folder, ignore=ignored)
    for file in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / file, target)
    return target


def contents(root: Path) -> dict[str, bytes]:
    return {str(file.relative_to(root)): file.read_bytes() for file in root.rglob("*") if file.is_file()}


def new_op(root: Path, op: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "tools/new_op.py", op], cwd=root, capture_output=True, text=True)


@pytest.fixture
def checkout(tmp_path):
    return copy(tmp_path / "checkout")


def test_it_writes_the_files_of_an_op_and_two_lines(checkout):
    before = contents(checkout)
    assert new_op(checkout, OP).returncode == 0
    after = contents(checkout)
    init = "minisora_kernels/__init__.py"
    assert after.keys() - before.keys() == FILES
    assert {name for name in before if before[name] != after[name]} == {init}
    lines = after[init].decode().splitlines()
    lines.remove("from .ops.made_up_2 import made_up_2 as made_up_2")
    lines.remove('    "made_up_2",')
    assert lines == before[init].decode().splitlines()
    for name in FILES:
        assert b"new_op" not in after[name].replace(b"tests/test_new_op.py", b"") and b"NewOp" not in after[name]
        if name.endswith(".py"):
            ast.parse(after[name])
    ruff = shutil.which("ruff", path=os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])))
    if ruff is not None:
        for command in (["check"], ["format", "--check"]):
            done = subprocess.run([ruff, *command, *sorted(FILES - {"csrc/cpu/made_up_2.cpp"}), init], cwd=checkout)
            assert done.returncode == 0


@pytest.mark.parametrize(
    ("op", "reason"),
    [
        ("adaln", "which is in use: minisora_kernels/ops/adaln.py, csrc/cpu/adaln.cpp"),
        ("rope_3d", "which is in use: minisora_kernels/__init__.py"),
        ("triton", "which is in use: tests/ops/test_triton.py"),
        ("Scale", "it may be words in lower case"),
        ("../x", "it may be words in lower case"),
        ("", "it may be words in lower case"),
    ],
)
def test_a_name_that_is_in_use_or_is_none_is_refused_and_nothing_is_written(checkout, op, reason):
    before = contents(checkout)
    done = new_op(checkout, op)
    assert done.returncode == 2 and reason in done.stderr
    assert contents(checkout) == before


@pytest.mark.slow  # compiles the kernel and runs Triton's interpreter
def test_the_op_passes_the_checks_of_every_op(checkout):
    assert new_op(checkout, OP).returncode == 0
    for source in (checkout / "csrc" / "cpu").glob("*.cpp"):
        if source.stem != OP:
            source.unlink()  # the others take minutes to compile
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MINISORA_")}
    environment |= {"MINISORA_CPU": "native", "MINISORA_CUDA": "0", "OMP_NUM_THREADS": "2"}

    def run(*command: str, **more: str) -> str:
        call = [sys.executable, *command]
        done = subprocess.run(call, cwd=checkout, env=environment | more, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    pytest_ = ("-m", "pytest", "-v", "-p", "no:cacheprovider")
    run("setup.py", "build_ext", "--inplace")
    available = "from minisora_kernels import backends; print(backends.unavailable('cpu'))"
    if run("-c", available).strip() == "None":
        assert "[made_up_2-tokens" in run(*pytest_, "tests/ops/test_ops.py", f"tests/ops/test_{OP}.py", "--op", OP)
    else:
        assert shutil.which("c++") is None, "the kernel was not built"
    pytest.importorskip("triton")
    tests = ("tests/ops/test_ops.py", "tests/ops/test_triton_traffic.py", "--op", OP)
    assert "made_up_2 tokens" in run(*pytest_, *tests, TRITON_INTERPRET="1")
    pytest.importorskip("pytest_benchmark")
    run(*pytest_, f"bench/ops/bench_{OP}.py", "--benchmark-disable", "--quick")
