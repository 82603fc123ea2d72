"""The build is optional and says why it did not happen; it uses the torch that is there."""

from __future__ import annotations

import json
import os
import platform
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from unittest import mock

import pytest
import torch

from minisora_kernels import backends

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "build_backend"))

import backend as build_backend  # noqa: E402


def build(tmp_path: Path, **environment: str) -> dict:
    """The record of a build that compiles nothing."""
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path)],
        cwd=ROOT,
        env={**{key: value for key, value in os.environ.items() if key != "CXX"}, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "minisora_kernels" / "build_record.json").read_text())
    reasons = record["cpu"].get("left_out") or {"cpu kernels": record["cpu"]["not_built"]}
    assert all(f"no {part}: {reason}" in done.stdout for part, reason in reasons.items())
    return record


def test_without_a_compiler_the_build_succeeds_and_says_so(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "minisora_kernels").mkdir()
    (tmp_path / "minisora_kernels" / "_cpu_avx2.so").write_bytes(b"of an earlier build")
    record = build(tmp_path, PATH=str(tmp_path / "empty"))
    assert not list((tmp_path / "minisora_kernels").glob("*.so"))
    assert "no C++ compiler was found" in record["cpu"]["not_built"]


def test_a_compiler_that_fails_is_recorded_with_its_error(tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'error: this compiler is broken' >&2\nexit 1\n")
    compiler.chmod(0o755)
    record = build(tmp_path, CXX=str(compiler))
    assert "error: this compiler is broken" in record["cpu"]["not_built"]


def fake_compiler(tmp_path: Path, cases: str) -> str:
    """Stands for a compiler: writes empty files, except in the ``cases`` of a shell that say what fails."""
    compiler = tmp_path / "c++"
    compiler.write_text(
        f'#!/bin/sh\ncase "$*" in\n{cases}\nesac\nwhile [ $# -gt 0 ]; do [ "$1" = -o ] && : > "$2"; shift; done\n'
    )
    compiler.chmod(0o755)
    return str(compiler)


def test_a_variant_whose_flags_the_compiler_does_not_know_is_left_out(tmp_path):
    compiler = fake_compiler(tmp_path, "*-mamx-tile*) echo 'error: unrecognized option -mamx-tile' >&2; exit 1 ;;")
    package = tmp_path / "minisora_kernels"
    package.mkdir()
    (package / "_cpu_amx.so").write_bytes(b"of an earlier build")
    record = build(tmp_path, CXX=compiler)["cpu"]
    assert record["libraries"] == ["cpu_avx2", "cpu_avx512", "cpu_avx512_bf16"]
    assert set(record["left_out"]) == {"cpu_amx"}
    assert record["left_out"]["cpu_amx"].endswith("failed: error: unrecognized option -mamx-tile")
    assert sorted(file.name for file in package.glob("*.so")) == [f"_{name}.so" for name in record["libraries"]]


@pytest.mark.parametrize("command", ["*-mamx-tile*-c\\ csrc/cpu/adaln.cpp*", "*-shared*cpu_amx/*"])
def test_any_other_failure_in_one_variant_fails_the_build(tmp_path, command):
    """A kernel that does not compile, or a library that does not link."""
    compiler = fake_compiler(tmp_path, f"{command}) echo 'error: no space left on device' >&2; exit 1 ;;")
    record = build(tmp_path, CXX=compiler)["cpu"]
    assert set(record) == {"not_built"} and record["not_built"].endswith("failed: error: no space left on device")
    assert not list((tmp_path / "minisora_kernels").glob("*.so"))


def test_the_kernels_can_be_declined(tmp_path):
    record = build(tmp_path, MINISORA_CPU="0", MINISORA_CUDA="0")
    assert record["cpu"]["not_built"] == "MINISORA_CPU=0"
    assert record["cuda"]["not_built"] == "MINISORA_CUDA=0"


def test_torch_is_a_build_requirement_only_where_there_is_none(tmp_path, monkeypatch):
    assert build_backend.get_requires_for_build_editable() == []
    assert build_backend.get_requires_for_build_wheel() == []
    monkeypatch.setattr(build_backend, "get_path", lambda name: str(tmp_path))
    assert build_backend.get_requires_for_build_editable() == ["torch>=2.10"]


def test_it_was_built_against_the_torch_that_runs():
    record = backends.build_record()
    if not record:
        pytest.skip("the package was not installed: there is no build record")
    assert record["torch"]["version"] == torch.__version__
    assert Path(torch.__file__).parent.parent == Path(sysconfig.get_path("purelib"))


def test_the_kernels_are_there_where_they_can_be():
    """Keeps a broken build from passing as a machine without a compiler."""
    capable = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    if not (capable and shutil.which("c++") and platform.machine() == "x86_64" and backends.FORCED is None):
        pytest.skip("no compiler, no AVX2, or a backend is forced")
    assert backends.unavailable("cpu") is None


def test_what_was_left_out_the_compiler_does_not_know():
    """Keeps the tests from passing on the library of a lesser instruction set."""
    left_out = backends.build_record().get("cpu", {}).get("left_out", {})
    with mock.patch("setuptools.setup"):
        variants = runpy.run_path(str(ROOT / "setup.py"))["VARIANTS"]
    compiler = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    if shutil.which(compiler[0]) is None:
        pytest.skip("no compiler")
    for variant in left_out:
        empty = subprocess.run([*compiler, *variants[variant], "-fsyntax-only", "-x", "c++", os.devnull])
        assert empty.returncode != 0, f"{variant} was left out, but {compiler} knows its flags"
