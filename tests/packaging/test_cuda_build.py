"""csrc/cuda without a GPU: nvcc compiled it for every architecture without spilling, and its kernels, run on the CPU by
an emulation of threads and of PTX (cuda_on_cpu.py), give what the reference gives.

The emulation says nothing about nvcc's code or about speed.
"""

from __future__ import annotations

import json
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path
from unittest import mock

import cuda_on_cpu
import oldest_torch
import pytest
import torch

from bench import nvcc
from minisora_kernels import backends, checks

ROOT = Path(__file__).parents[2]
# Headers of the oldest torch that pyproject.toml allows; tests/packaging/oldest_torch.py fetches them for
# make check-gpu-code.
OLDEST = os.environ.get("MINISORA_OLDEST_HEADERS")
CXX = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
ARCHITECTURES = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
BUILT = ";".join(ARCHITECTURES) + "+PTX"

# What the kernels must not do besides what the emulation checks.
SANITIZERS = "address,alignment,bounds,shift,signed-integer-overflow,integer-divide-by-zero,float-cast-overflow"


def translated(folder: Path, include: Path | str) -> list[str]:
    """A command that compiles csrc/cuda, translated for a CPU into ``folder``, but for what it makes of it."""
    assert CXX is not None
    cuda_on_cpu.write(ROOT / "csrc" / "cuda", folder)
    flags = ["-std=c++20", "-O0", "-fPIC", "-w", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-DUSE_CUDA"]
    (source,) = folder.glob("*.cu")
    flags += [f"-I{include}", f"-I{ROOT / 'csrc' / 'cuda'}"]  # of ../check.h, which is not copied
    return [CXX, *flags, "-include", str(folder / "emulation.h"), "-x", "c++", str(source)]


@pytest.mark.slow
@pytest.mark.skipif(CXX is None, reason="no C++ compiler was found")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the emulation switches stacks of x86-64")
def test_emulated_kernels_are_right_under_sanitizers(tmp_path: Path):
    """Everything in emulated_windows.py, in a process that has AddressSanitizer from its start on."""
    torch_folder = Path(torch.__file__).parent
    command = translated(tmp_path, torch_folder / "include")
    with (tmp_path / "window_attention.cu").open("a") as file:  # the record's shared memory is what the kernels ask for
        for d, tile, (parts, keeps) in product((64, 72, 96, 128), (16, 32, 64), ((3, "false"), (4, "true"))):
            bytes_ = nvcc.shared(d, tile, parts == 4)
            file.write(f"static_assert(minisora::Layout<{d}, {tile}, {parts}>::bytes({keeps}) == {bytes_});\n")
    library = tmp_path / "emulated.so"
    command += ["-shared", "-o", str(library), f"-fsanitize={SANITIZERS}", "-fno-sanitize-recover=all"]
    done = subprocess.run(
        [*command, f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    # AddressSanitizer passes exceptions on if the C++ library, which libubsan needs, is there before it.
    names = [[str(CXX), f"-print-file-name={name}"] for name in ("libasan.so", "libubsan.so")]
    found = [subprocess.run(name, capture_output=True, text=True, check=True).stdout.strip() for name in names]
    environment = os.environ | {"LD_PRELOAD": ":".join(found), "ASAN_OPTIONS": "detect_leaks=0"}
    environment |= {"MINISORA_EMULATED": str(library), "OMP_NUM_THREADS": "1"}
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--capture=sys"]
    tests.append(str(ROOT / "tests" / "packaging" / "emulated_windows.py"))
    done = subprocess.run(tests, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-8000:]


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        (BUILT, (8, 0), True),
        (BUILT, (8, 7), True),  # code for 8.6, of the same generation
        (BUILT, (10, 3), True),
        (BUILT, (12, 1), True),
        (BUILT, (13, 0), True),  # from PTX
        (BUILT, (7, 5), False),
        (BUILT, (11, 0), False),  # PTX is for 12.0 and newer
        ("8.6 9.0", (8, 0), False),  # older than the code, and spaces as torch takes them
        ("9.0", (10, 0), False),
        ("8.0+PTX", (10, 0), True),
        ("9.0a", (9, 0), True),
        ("10.0a+PTX", (12, 0), False),
        ("", (9, 0), False),
    ],
)
def test_what_runs_on_a_gpu_is_known(architectures: str, capability: tuple[int, int], runs: bool):
    assert checks.covered(architectures, capability) is runs


def test_a_gpu_without_code_is_refused_with_what_to_do(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: ((9, 0), (7, 5))[index])
    monkeypatch.setattr(backends, "build_record", lambda: {"cuda": {"architectures": BUILT}})
    checks._uncovered.cache_clear()
    try:
        assert checks.architecture_refusal(0) is None and checks.architecture_refusal(None) is None
        refused = checks.architecture_refusal(1)
        assert refused is not None and BUILT in refused and "TORCH_CUDA_ARCH_LIST=7.5" in refused
    finally:
        checks._uncovered.cache_clear()


def test_the_record_has_every_kernel_and_none_spills():
    record = json.loads(nvcc.RECORD.read_text())
    assert record["sources"] == nvcc.digest(), "csrc/cuda has changed: run `python -m bench.nvcc --save` where nvcc is"
    assert list(record["kernels"]) == nvcc.architectures() == [f"sm_{each.replace('.', '')}" for each in ARCHITECTURES]
    for sm, kernels in record["kernels"].items():
        dtypes = ("bfloat16", "float16") if sm == nvcc.WHOLLY else ("bfloat16",)
        shapes = product(dtypes, ("forward", "backward"), (64, 72, 96, 128), (16, 32, 64))
        names = {f"window_attention {t} {way}: head_dim {d}, tile {tile}" for t, way, d, tile in shapes}
        assert set(kernels) == names | {"window_attention sums"}
        assert not list(nvcc.worse(kernels, kernels)), sm
        assert all(kernel["registers"] <= 255 and kernel["shared"] <= 99 << 10 for kernel in kernels.values()), sm


@pytest.mark.slow
@pytest.mark.skipif(nvcc.NVCC is None, reason="nvcc was not found")
def test_nvcc_builds_without_warnings_what_the_record_says(tmp_path: Path):
    environment = os.environ | {"MINISORA_CPU": "0", "MINISORA_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "9.0+PTX"}
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path / "lib"), "--build-temp"]
    done = subprocess.run([*command, str(tmp_path / "temp")], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    package = tmp_path / "lib" / "minisora_kernels"
    record = json.loads((package / "build_record.json").read_text())["cuda"]
    assert record.get("architectures") == "9.0+PTX", record
    warnings = [line for line in done.stderr.splitlines() if "warning" in line and "csrc/cuda" in line]
    assert not warnings, "\n".join(warnings)

    cuobjdump = shutil.which("cuobjdump") or _triton_cuobjdump()
    if cuobjdump is None:
        pytest.skip("built; cuobjdump was not found, so the registers were not read")
    command = [cuobjdump, "-res-usage", str(package / "_cuda.so")]
    usage = subprocess.run(command, capture_output=True, text=True, check=True)
    listed = subprocess.run([cuobjdump, "-lptx", command[-1]], capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r"sm_\d+", listed)) == {"sm_90"}  # cuobjdump calls PTX after the least GPU that takes it
    found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", usage.stdout + usage.stderr)
    recorded = json.loads(nvcc.RECORD.read_text())["kernels"]["sm_90"]
    assert {nvcc.name_of(mangled)[0] for mangled, _, _ in found} == set(recorded)
    for mangled, registers, stack in found:
        name = nvcc.name_of(mangled)[0]
        assert stack == "0" and int(registers) <= 1.1 * recorded[name]["registers"], name


@pytest.fixture(scope="module")
def variables() -> dict:
    """What setup.py defines."""
    with mock.patch("setuptools.setup"):
        return runpy.run_path(str(ROOT / "setup.py"))


@pytest.mark.skipif(OLDEST is None, reason="MINISORA_OLDEST_HEADERS is not set: run make check-gpu-code")
class TestOldestTorch:
    """csrc against the headers of the oldest torch, as setup.py compiles it, but for one variant or architecture."""

    def test_it_is_the_torch_of_pyproject_and_of_the_stable_abi(self, variables):
        version = oldest_torch.version_of_pyproject()
        assert f"torch-{version}" in str(OLDEST)
        major, minor = map(int, version.split(".")[:2])
        assert variables["STABLE_ABI"] == f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}000000000000"
        assert (ROOT / "build_backend" / "backend.py").read_text().count(f'"torch>={major}.{minor}"') == 1

    @pytest.mark.skipif(CXX is None, reason="no C++ compiler was found")
    @pytest.mark.parametrize("source", sorted((ROOT / "csrc/cpu").glob("*.cpp")), ids=lambda path: path.stem)
    def test_the_cpu_kernels_compile(self, variables, source: Path):
        flags = [*variables["VARIANTS"]["cpu_amx"], "-fopenmp-simd", "-w", f"-I{OLDEST}"]
        self.compile([CXX, "-std=c++20", "-fsyntax-only", *flags, str(source)])

    @pytest.mark.skipif(CXX is None, reason="no C++ compiler was found")
    def test_the_cuda_kernels_compile(self, tmp_path: Path):
        self.compile([*translated(tmp_path, str(OLDEST)), "-fsyntax-only"])

    def compile(self, command: list[str]) -> None:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def _triton_cuobjdump() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(path) if path.exists() else None
