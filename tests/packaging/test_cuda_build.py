"""csrc/cuda without a GPU: nvcc compiled it for every architecture without spilling, and run on the CPU it gives what
the reference gives: kernels by an emulation of threads and of PTX (cuda_on_cpu.py), what calls cuBLASLt before a
stand-in for that (cublaslt_on_cpu.cpp).

The emulation says nothing about nvcc's code, about cuBLASLt's, or about speed.
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


# What runs each file of csrc/cuda on the CPU.
EMULATED = {"window_attention": "emulated_windows.py", "gelu_mlp": "emulated_mlp.py"}


def translated(op: str, folder: Path, include: Path | str) -> list[str]:
    """A command that compiles a file of csrc/cuda, translated for a CPU into ``folder``, but for what it makes."""
    assert CXX is not None
    cuda_on_cpu.write(ROOT / "csrc" / "cuda", folder)
    flags = ["-std=c++20", "-O0", "-fPIC", "-w", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-DUSE_CUDA"]
    flags += [f"-I{include}", f"-I{ROOT / 'csrc' / 'cuda'}"]  # of ../check.h, which is not copied
    return [CXX, *flags, "-include", str(folder / "emulation.h"), "-x", "c++", str(folder / f"{op}.cu")]


def run(command: list[str]) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_file_is_emulated():
    assert EMULATED.keys() == {path.stem for path in (ROOT / "csrc" / "cuda").glob("*.cu")}


@pytest.mark.slow
@pytest.mark.skipif(CXX is None, reason="no C++ compiler was found")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the emulation switches stacks of x86-64")
@pytest.mark.parametrize("op", EMULATED)
def test_what_is_emulated_is_right_under_sanitizers(op: str, tmp_path: Path):
    """Everything in the file of ``EMULATED``, in a process that has AddressSanitizer from its start on."""
    torch_folder = Path(torch.__file__).parent
    command = translated(op, tmp_path, torch_folder / "include")
    if op == "window_attention":
        with (tmp_path / f"{op}.cu").open("a") as file:  # the record's shared memory is what the kernels ask for
            for d, tile, (parts, keeps) in product((64, 72, 96, 128), (16, 32, 64), ((3, "false"), (4, "true"))):
                bytes_ = nvcc.shared(d, tile, parts == 4)
                file.write(f"static_assert(minisora::Layout<{d}, {tile}, {parts}>::bytes({keeps}) == {bytes_});\n")
    made = ["-shared", f"-fsanitize={SANITIZERS}", "-fno-sanitize-recover=all"]
    # A library of its own, as cuBLASLt is: its symbols are found when the other one is loaded.
    stand_in, library = tmp_path / "libcublasLt.so", tmp_path / "emulated.so"
    flags = ["-std=c++20", "-O1", "-fPIC", f"-I{torch_folder / 'include'}", *made]
    run([str(CXX), *flags, str(ROOT / "tests" / "packaging" / "cublaslt_on_cpu.cpp"), "-o", str(stand_in)])
    needed = [f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10", "-x", "none", "-Wl,--no-as-needed", str(stand_in)]
    run([*command, "-o", str(library), *made, *needed])
    # AddressSanitizer passes exceptions on if the C++ library, which libubsan needs, is there before it.
    names = [[str(CXX), f"-print-file-name={name}"] for name in ("libasan.so", "libubsan.so")]
    found = [subprocess.run(name, capture_output=True, text=True, check=True).stdout.strip() for name in names]
    environment = os.environ | {"LD_PRELOAD": ":".join(found), "ASAN_OPTIONS": "detect_leaks=0"}
    environment |= {"MINISORA_EMULATED": str(library), "OMP_NUM_THREADS": "1"}
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--capture=sys"]
    tests.append(str(ROOT / "tests" / "packaging" / EMULATED[op]))
    done = subprocess.run(tests, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-8000:]


# The constants of csrc/cuda/cublaslt.h by NVIDIA's names.
CUBLASLT = {
    "kFloat32": "CUDA_R_32F",
    "kFloat16": "CUDA_R_16F",
    "kBFloat16": "CUDA_R_16BF",
    "kSumFloat32": "CUBLAS_COMPUTE_32F",
    "kTransposed": "CUBLAS_OP_T",
    "kTransposeA": "CUBLASLT_MATMUL_DESC_TRANSA",
    "kEpilogue": "CUBLASLT_MATMUL_DESC_EPILOGUE",
    "kBiasPointer": "CUBLASLT_MATMUL_DESC_BIAS_POINTER",
    "kAuxPointer": "CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER",
    "kAuxStep": "CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD",
    "kMostWorkspace": "CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES",
    "kReductions": "CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK",
    **{f"kAlignments[{i}]": f"CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_{name}_BYTES" for i, name in enumerate("ABCD")},
    "kPlain": "CUBLASLT_EPILOGUE_DEFAULT",
    "kBias": "CUBLASLT_EPILOGUE_BIAS",
    "kGelu": "CUBLASLT_EPILOGUE_GELU",
    "kGelu | lt::kBias": "CUBLASLT_EPILOGUE_GELU_BIAS",
    "kGelu | lt::kAux": "CUBLASLT_EPILOGUE_GELU_AUX",
    "kGelu | lt::kAux | lt::kBias": "CUBLASLT_EPILOGUE_GELU_AUX_BIAS",
    "kGeluGradient": "CUBLASLT_EPILOGUE_DGELU",
    "kGeluGradient | lt::kBiasGradient": "CUBLASLT_EPILOGUE_DGELU_BGRAD",
}


@pytest.mark.skipif(CXX is None, reason="no C++ compiler was found")
def test_cublaslt_is_declared_as_its_header_has_it(tmp_path: Path):
    """By the header of a toolkit, of NVIDIA's packages in this environment, or of CPATH."""
    include = [str(Path(nvcc.NVCC).resolve().parents[1] / "include")] if nvcc.NVCC else []
    include += [str(path) for path in Path(torch.__file__).parents[1].glob("nvidia/*/include")]
    command = [str(CXX), "-std=c++20", "-fsyntax-only", *(f"-I{path}" for path in include), "-x", "c++"]
    source = tmp_path / "declared.cpp"
    source.write_text("#include <cublasLt.h>\n")
    if subprocess.run([*command, str(source)], capture_output=True).returncode:
        pytest.skip("cublasLt.h was not found")
    header = ROOT / "csrc" / "cuda" / "cublaslt.h"
    functions = sorted(set(re.findall(r"\b(cublasLt\w+)\(", header.read_text())))
    assert len(functions) == 11
    used = set(re.findall(r"\blt::(k\w+)", (ROOT / "csrc" / "cuda" / "gelu_mlp.cu").read_text()))
    assert used <= set(re.findall(r"k\w+", " ".join(CUBLASLT)))
    lines = ["#include <array>", "#include <cublasLt.h>", "template <class R, class... A>"]
    lines += ["constexpr std::array<size_t, sizeof...(A)> sizes(R (*)(A...)) { return {sizeof(A)...}; }"]
    lines += [f"constexpr auto their_{name} = sizes({name});\n#define {name} our_{name}" for name in functions]
    lines += [f'#include "{header}"', "using namespace minisora;"]
    lines += [f"static_assert(sizes(our_{name}) == their_{name});" for name in functions]
    lines += [f"static_assert((lt::{ours}) == {theirs});" for ours, theirs in CUBLASLT.items()]
    lines += ["static_assert(sizeof(lt::Algorithm) == sizeof(cublasLtMatmulAlgo_t));"]
    lines += ["static_assert(sizeof(lt::Choice) == sizeof(cublasLtMatmulHeuristicResult_t));"]
    for ours, theirs in (("workspace", "workspaceSize"), ("status", "state"), ("waves", "wavesCount")):
        offset = f"offsetof(cublasLtMatmulHeuristicResult_t, {theirs})"
        lines += [f"static_assert(offsetof(lt::Choice, {ours}) == {offset});"]
    source.write_text("\n".join(lines) + "\n")
    run([*command, "-Wno-deprecated-enum-enum-conversion", str(source)])


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
        run([CXX, "-std=c++20", "-fsyntax-only", *flags, str(source)])

    @pytest.mark.skipif(CXX is None, reason="no C++ compiler was found")
    @pytest.mark.parametrize("op", EMULATED)
    def test_the_cuda_kernels_compile(self, op: str, tmp_path: Path):
        run([*translated(op, tmp_path, str(OLDEST)), "-fsyntax-only"])


def _triton_cuobjdump() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(path) if path.exists() else None
