"""The build is optional and says why it did not happen; it uses the torch that is there."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

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


def test_a_variant_that_cannot_be_built_is_left_out_with_its_error(tmp_path):
    """One fails to compile, another to link; what stands for the compiler writes empty files."""
    compiler = tmp_path / "c++"
    compiler.write_text(
        "#!/bin/sh\n"
        'case "$*" in\n'
        "*-mamx-tile*) echo 'error: unrecognized option -mamx-tile' >&2; exit 1 ;;\n"
        "*-shared*cpu_avx512/*) echo 'error: cannot link' >&2; exit 1 ;;\n"
        "esac\n"
        'while [ $# -gt 0 ]; do [ "$1" = -o ] && : > "$2"; shift; done\n'
    )
    compiler.chmod(0o755)
    package = tmp_path / "minisora_kernels"
    package.mkdir()
    (package / "_cpu_amx.so").write_bytes(b"of an earlier build")
    record = build(tmp_path, CXX=str(compiler))["cpu"]
    assert record["libraries"] == ["cpu_avx2", "cpu_avx512_bf16"]
    assert set(record["left_out"]) == {"cpu_avx512", "cpu_amx"}
    assert record["left_out"]["cpu_amx"].endswith("failed: error: unrecognized option -mamx-tile")
    assert record["left_out"]["cpu_avx512"].endswith("failed: error: cannot link")
    assert sorted(file.name for file in package.glob("*.so")) == ["_cpu_avx2.so", "_cpu_avx512_bf16.so"]


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
    if not (capable and shutil.which("c++") and platform.machine() == "x86_64" and backends._forced is None):
        pytest.skip("no compiler, no AVX2, or a backend is forced")
    assert backends.unavailable("cpu") is None
