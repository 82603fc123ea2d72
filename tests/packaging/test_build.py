"""The build is optional and says why it did not happen; it compiles what changed, for the torch that is there."""

from __future__ import annotations

import json
import os
import platform
import pty
import re
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

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "build_backend"))

import backend as build_backend  # noqa: E402


def build(tmp_path: Path, **environment: str) -> dict:
    """The record of a build that compiles nothing; of the CPU's kernels alone, for there may be an nvcc."""
    kept = {key: value for key, value in os.environ.items() if key not in ("CXX", "MINISORA_CPU")}
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path)],
        cwd=ROOT,
        env={**kept, "MINISORA_CUDA": "0", **environment},
        capture_output=True,
        text=True,
        start_new_session=True,
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
    """A kernel that does not compile, or a library that does not link: no library is left, not even an earlier one."""
    (tmp_path / "minisora_kernels").mkdir()
    (tmp_path / "minisora_kernels" / "_cpu_avx2.so").write_bytes(b"of an earlier build")
    compiler = fake_compiler(tmp_path, f"{command}) echo 'error: no space left on device' >&2; exit 1 ;;")
    record = build(tmp_path, CXX=compiler)["cpu"]
    assert set(record) == {"not_built"} and record["not_built"].endswith("failed: error: no space left on device")
    assert not list((tmp_path / "minisora_kernels").glob("*.so"))


@pytest.fixture
def checkout(tmp_path):
    """A copy of setup.py with two small sources; one header is for both, one for ``two`` alone."""
    if not (platform.machine() == "x86_64" and shutil.which("c++")):
        pytest.skip("no compiler, or another machine")
    shutil.copy(ROOT / "setup.py", tmp_path)
    (tmp_path / "minisora_kernels").mkdir()
    folder = tmp_path / "csrc" / "cpu"
    folder.mkdir(parents=True)
    (folder / "both.h").write_text("#pragma once\ninline int both() { return 1; }\n")
    (folder / "alone.h").write_text("#pragma once\ninline int alone() { return 2; }\n")
    (folder / "one.cpp").write_text('#include "both.h"\nint one() { return both(); }\n')
    (folder / "two.cpp").write_text('#include "both.h"\n#include "alone.h"\nint two() { return both() + alone(); }\n')
    return tmp_path


def rebuild(checkout: Path, variants: str) -> tuple[list[str], dict]:
    """What was compiled, as ``variant: file``, and the record."""
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=checkout,
        env={key: value for key, value in os.environ.items() if key != "CXX"} | {"MINISORA_CPU": variants},
        capture_output=True,
        text=True,
        start_new_session=True,  # no terminal to show progress on
    )
    assert done.returncode == 0, done.stderr
    compiled = re.findall(r"^\[\d+/\d+\] (\w+: csrc/cpu/\w+\.cpp)$", done.stdout, re.MULTILINE)
    return sorted(compiled), json.loads((checkout / "minisora_kernels" / "build_record.json").read_text())["cpu"]


def append(checkout: Path, name: str, line: str) -> None:
    with (checkout / "csrc" / "cpu" / name).open("a") as file:
        file.write(line + "\n")


def libraries_of(checkout: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (checkout / "minisora_kernels").glob("*.so*")}


def test_only_what_changed_is_compiled_for_the_variants_asked_for(checkout):
    two = "cpu_avx2,cpu_avx512"
    both = [f"{variant}: csrc/cpu/{name}.cpp" for variant in two.split(",") for name in ("one", "two")]
    assert rebuild(checkout, two)[0] == both
    first = libraries_of(checkout)
    assert set(first) == {"_cpu_avx2.so", "_cpu_avx512.so"}
    assert rebuild(checkout, two)[0] == [] and libraries_of(checkout) == first
    append(checkout, "alone.h", "inline int more() { return 3; }")
    assert rebuild(checkout, two)[0] == both[1::2]
    append(checkout, "both.h", "inline int most() { return 4; }")
    assert rebuild(checkout, two)[0] == both
    append(checkout, "one.cpp", '__attribute__((visibility("default"))) int three() { return most(); }')
    compiled, record = rebuild(checkout, "cpu_avx2")
    assert compiled == both[:1] and record["libraries"] == ["cpu_avx2"]
    assert "only cpu_avx2 was asked for" in record["left_out"]["cpu_avx512"]
    assert set(libraries_of(checkout)) == {"_cpu_avx2.so"}, "the other library is older than the sources"
    assert libraries_of(checkout)["_cpu_avx2.so"] != first["_cpu_avx2.so"]
    assert rebuild(checkout, two)[0] == both[2:3]


def test_other_flags_and_a_new_source_are_compiled(checkout):
    rebuild(checkout, "cpu_avx2")
    text = (checkout / "setup.py").read_text()
    (checkout / "setup.py").write_text(text.replace('"-O3"', '"-O2"', 1))
    assert rebuild(checkout, "cpu_avx2")[0] == [f"cpu_avx2: csrc/cpu/{name}.cpp" for name in ("one", "two")]
    (checkout / "csrc" / "cpu" / "three.cpp").write_text("int three() { return 3; }\n")
    before = libraries_of(checkout)
    assert rebuild(checkout, "cpu_avx2")[0] == ["cpu_avx2: csrc/cpu/three.cpp"]
    assert libraries_of(checkout) != before


def test_a_kernel_that_does_not_compile_is_named_and_compiled_again_when_mended(checkout):
    rebuild(checkout, "cpu_avx2")
    source = checkout / "csrc" / "cpu" / "two.cpp"
    good = source.read_text()
    source.write_text(good + "int four() { return missing; }\n")
    compiled, record = rebuild(checkout, "cpu_avx2")
    assert "csrc/cpu/two.cpp" in record["not_built"] and "'missing' was not declared" in unquoted(record["not_built"])
    assert libraries_of(checkout) == {}
    source.write_text(good)
    compiled, record = rebuild(checkout, "cpu_avx2")
    assert compiled == ["cpu_avx2: csrc/cpu/two.cpp"] and record["libraries"] == ["cpu_avx2"]
    assert set(libraries_of(checkout)) == {"_cpu_avx2.so"}


def unquoted(text: str) -> str:
    return text.replace("\u2018", "'").replace("\u2019", "'")


def test_progress_shows_on_the_terminal_though_pip_keeps_the_output(checkout):
    process, terminal = pty.fork()
    if process == 0:  # as a child of pip: the terminal is there, stdout and stderr are not on it
        os.chdir(checkout)
        output = os.open("output.txt", os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ["MINISORA_CPU"] = "cpu_avx2"
        os.execv(sys.executable, [sys.executable, "setup.py", "build_ext", "--inplace"])
    shown = b""
    while True:
        try:
            part = os.read(terminal, 4096)
        except OSError:  # how Linux ends a terminal that nobody has open
            break
        if not part:
            break
        shown += part
    assert os.waitpid(process, 0)[1] == 0, (checkout / "output.txt").read_text()
    for number in ("1/3", "2/3", "3/3"):
        assert f"[{number}] cpu_avx2".encode() in shown


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_beside_a_torch_without_cuda_a_wheel_has_cuda_kernels_and_a_checkout_those_that_are_asked_for(tmp_path):
    home = tmp_path / "cuda"
    cuda = {"MINISORA_CPU": "0", "CUDA_HOME": str(home)}
    record = build(tmp_path, MINISORA_CUDA="", **cuda)["cuda"]
    assert record == {"not_built": f"nvcc was not found: CUDA_HOME is {str(home)!r}, which has no bin/nvcc"}
    (home / "bin").mkdir(parents=True)
    os.rename(fake_compiler(tmp_path, "-) ;;"), home / "bin" / "nvcc")
    record = build(tmp_path, MINISORA_CUDA="", TORCH_CUDA_ARCH_LIST="9.0", **cuda)["cuda"]
    assert record["architectures"] == "9.0" and (tmp_path / "minisora_kernels" / "_cuda.so").exists()
    shutil.copy(ROOT / "setup.py", tmp_path)
    (tmp_path / "csrc" / "cuda").mkdir(parents=True)
    (tmp_path / "csrc" / "cuda" / "one.cu").write_text("")
    for asked, built in (("", False), ("1", True)):
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        environment = os.environ | cuda | {"MINISORA_CUDA": asked}
        subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=True)
        record = json.loads((tmp_path / "minisora_kernels" / "build_record.json").read_text())["cuda"]
        assert ("architectures" in record) == built and (tmp_path / "minisora_kernels" / "_cuda.so").exists() == built
        assert built or record == {"not_built": "this torch is a CPU build"}


AVX512 = "fma f16c avx2 avx512f avx512bw avx512vl avx512dq"


@pytest.fixture(scope="module")
def setup():
    """The names in setup.py."""
    with mock.patch("setuptools.setup"):
        return runpy.run_path(str(ROOT / "setup.py"))


@pytest.mark.parametrize(
    ("flags", "variable", "known", "variant"),
    [
        ("sse4_2 avx", None, 4, None),
        ("avx2", None, 4, None),
        ("fma f16c avx2", None, 4, "cpu_avx2"),
        ("fma f16c avx2 avx512f", None, 4, "cpu_avx2"),
        (AVX512, None, 4, "cpu_avx512"),
        (f"{AVX512} amx_tile", None, 4, "cpu_avx512"),
        (f"{AVX512} avx512_bf16", None, 4, "cpu_avx512_bf16"),
        (f"{AVX512} avx512_bf16 amx_tile amx_bf16", None, 4, "cpu_amx"),
        (f"{AVX512} avx512_bf16 amx_tile amx_bf16", None, 3, "cpu_avx512_bf16"),
        (f"{AVX512} avx512_bf16 amx_tile amx_bf16", "avx512", 4, "cpu_avx512"),
        (f"{AVX512} avx512_bf16 amx_tile amx_bf16", "avx2", 4, "cpu_avx2"),
        (AVX512, "default", 4, None),
    ],
)
def test_the_native_variant_is_the_most_that_cpu_and_compiler_know(setup, monkeypatch, flags, variable, known, variant):
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    if variable is not None:
        monkeypatch.setenv("ATEN_CPU_CAPABILITY", variable)
    cpuinfo = f"processor\t: 0\nflags\t\t: {flags}\nbugs\t\t: spectre_v1\n"
    assert setup["native"](list(setup["VARIANTS"])[:known], cpuinfo) == variant


def test_the_native_variant_is_the_one_that_is_loaded_here(setup, monkeypatch):
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists() or platform.machine() != "x86_64":
        pytest.skip("no /proc/cpuinfo of an x86-64 machine")
    monkeypatch.setattr(backends, "build_record", dict)
    loaded = backends.VARIANTS.get(backends.cpu_capability())
    assert setup["native"](list(setup["VARIANTS"]), cpuinfo.read_text()) == loaded


def test_an_unknown_choice_of_variants_is_refused(tmp_path):
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path)]
    environment = os.environ | {"MINISORA_CPU": "avx3", "CXX": fake_compiler(tmp_path, "-) ;;")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert "ValueError: MINISORA_CPU is 'avx3'; it may be 0, 1, native, or some of cpu_avx2,cpu_avx512," in done.stderr


def test_the_kernels_can_be_declined(tmp_path):
    record = build(tmp_path, MINISORA_CPU="0")
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


def test_what_was_left_out_the_compiler_does_not_know(setup):
    """Keeps the tests from passing on the library of a lesser instruction set."""
    left_out = backends.build_record().get("cpu", {}).get("left_out", {})
    left_out = {variant for variant, reason in left_out.items() if not reason.startswith("MINISORA_CPU=")}
    variants = setup["VARIANTS"]
    compiler = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    if shutil.which(compiler[0]) is None:
        pytest.skip("no compiler")
    for variant in left_out:
        empty = subprocess.run([*compiler, *variants[variant], "-fsyntax-only", "-x", "c++", os.devnull])
        assert empty.returncode != 0, f"{variant} was left out, but {compiler} knows its flags"
