"""csrc/cuda without a GPU: it compiles for every architecture without spilling, and its kernels, run on the CPU by an
emulation of threads, blocks, barriers and shuffles, give what the reference gives.

The emulation checks indices, shapes, reduction orders and barriers. It says nothing about nvcc's code or about speed.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import oldest_torch
import pytest
import torch
from torch import Tensor

from minisora_kernels import backends, checks
from minisora_kernels.modulation import row_gradient
from minisora_kernels.ops import adaln
from minisora_kernels.testing import assert_as_accurate

ROOT = Path(__file__).parents[2]
# Headers of the oldest torch that pyproject.toml allows; tests/packaging/oldest_torch.py fetches them for
# make check-gpu-code.
OLDEST = os.environ.get("MINISORA_OLDEST_HEADERS")
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
CXX = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
ARCHITECTURES = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
BUILT = ";".join(ARCHITECTURES) + "+PTX"

# Each CUDA thread is a fiber; a warp runs as far ahead of the others as the barriers allow, the first warp first or, if
# CUDA_ON_CPU_REVERSED is set, the last; at most CUDA_ON_CPU_BLOCKS blocks are started. A barrier that not all threads
# reach is an error. Blocks run one after the other, so that `static` serves for shared memory.
EMULATION = r"""
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <setjmp.h>
#include <ucontext.h>
#include <cmath>
#include <cstdlib>
#include <functional>
#include <memory>
#include <stdexcept>
#include <vector>

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
dim3 threadIdx, blockIdx, blockDim, gridDim;

struct Barrier { unsigned arrived = 0, generation = 0; };
struct Fiber { ucontext_t entry; jmp_buf state; dim3 index; bool started, done; };
constexpr size_t kStack = 128 << 10;
jmp_buf scheduler;
std::vector<Fiber> fibers;
std::vector<std::unique_ptr<char[]>> stacks;
std::vector<Barrier> warp_barriers;
std::vector<float> lanes;
Barrier block_barrier;
Fiber* current;
bool progress;
std::function<void()> body;

unsigned flat_thread() { return threadIdx.y * blockDim.x + threadIdx.x; }

void wait(Barrier& barrier, unsigned count) {
  const unsigned generation = barrier.generation;
  progress = true;
  if (++barrier.arrived == count) {
    barrier.arrived = 0;
    ++barrier.generation;
  }
  while (generation == barrier.generation) {
    if (_setjmp(current->state) == 0) _longjmp(scheduler, 1);
  }
}

void __syncthreads() { wait(block_barrier, fibers.size()); }

float __shfl_xor_sync(unsigned, float value, int distance) {
  const unsigned me = flat_thread();
  lanes[me] = value;
  wait(warp_barriers[me / 32], 32);
  const float other = lanes[me ^ distance];
  wait(warp_barriers[me / 32], 32);
  return other;
}

void run_fiber() {
  body();
  current->done = progress = true;
  _longjmp(scheduler, 1);
}

// Contexts only give a fiber its stack: switching with them costs a system call.
__attribute__((noinline)) void resume(Fiber& fiber) {
  current = &fiber;
  threadIdx = fiber.index;
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.state, 1);
  fiber.started = true;
  setcontext(&fiber.entry);
}

void run_block() {
  const unsigned count = blockDim.x * blockDim.y;
  fibers.resize(count);
  while (stacks.size() < count) stacks.emplace_back(new char[kStack]);
  block_barrier = {};
  warp_barriers.assign(count / 32, {});
  lanes.resize(count);
  for (unsigned i = 0; i < count; ++i) {
    fibers[i].index = dim3(i % blockDim.x, i / blockDim.x);
    fibers[i].started = fibers[i].done = false;
    getcontext(&fibers[i].entry);
    fibers[i].entry.uc_stack.ss_sp = stacks[i].get();
    fibers[i].entry.uc_stack.ss_size = kStack;
    makecontext(&fibers[i].entry, run_fiber, 0);
  }
  bool any;
  do {
    any = false;
    for (unsigned first = 0; first < count; first += 32) {
      do {
        progress = false;
        for (unsigned i = first; i < first + 32; ++i) {
          Fiber& fiber = fibers[std::getenv("CUDA_ON_CPU_REVERSED") ? count - 1 - i : i];
          if (!fiber.done) resume(fiber);
        }
        any = any || progress;
      } while (progress);
    }
  } while (any);
  for (const Fiber& fiber : fibers) if (!fiber.done) throw std::runtime_error("not all threads reached a barrier");
}

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return ""; }
struct cudaLaunchConfig_t { dim3 gridDim, blockDim; cudaStream_t stream; };

template <class... Parameters, class... Arguments>
void cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments... arguments) {
  const char* limit = std::getenv("CUDA_ON_CPU_BLOCKS");
  gridDim = config->gridDim;
  if (limit != nullptr) gridDim.x = std::min<unsigned>(gridDim.x, std::atoi(limit));
  blockDim = config->blockDim;
  body = [=] { kernel(arguments...); };
  for (unsigned i = 0; i < gridDim.x; ++i) {
    blockIdx = dim3(i, 0);
    run_block();
  }
}

int no_stream(int, void** stream) { *stream = nullptr; return 0; }
namespace torch::stable::accelerator { struct NoGuard { explicit NoGuard(int) {} }; }

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)
#define DeviceGuard NoGuard
#define aoti_torch_get_current_cuda_stream no_stream
#define is_cuda is_cpu
#define CUDA CPU
#define minisora minisora_emulated
"""


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """The raw ops of csrc/cuda/adaln.cu, for CPU tensors."""
    if CXX is None:
        pytest.skip("no C++ compiler was found")
    folder = tmp_path_factory.mktemp("emulated")
    (folder / "emulation.h").write_text(EMULATION)
    torch_folder = Path(torch.__file__).parent
    command = [
        CXX,
        "-std=c++20",
        "-O1",
        "-shared",
        "-fPIC",
        "-w",
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
        "-DUSE_CUDA",
    ]
    # An access that is not aligned is an error on a GPU; here it ends the process.
    command += ["-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"]
    command += [f"-I{torch_folder / 'include'}", "-include", str(folder / "emulation.h"), "-x", "c++"]
    command += [str(ROOT / "csrc/cuda/adaln.cu"), "-o", str(folder / "emulated.so")]
    command += [f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    library = torch.library.Library("minisora_emulated", "DEF")
    for name in ("adaln_fwd", "adaln_bwd"):
        library.define(str(getattr(torch.ops.minisora, name).default._schema).removeprefix("minisora::"))
    torch.ops.load_library(str(folder / "emulated.so"))
    yield torch.ops.minisora_emulated
    library._destroy()


F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16

# name, B, N, D, rows of shift, rows of scale, affine, norm
SHAPES = [
    ("per-sample", 2, 37, 96, 1, 1, False, "layer"),
    ("one-token", 3, 1, 8, 1, 1, False, "layer"),
    ("per-frame", 2, 8 * 17, 40, 8, 8, True, "layer"),
    ("per-token", 2, 19, 24, 19, 19, True, "rms"),
    ("mixed-rows", 2, 12, 16, 1, 4, True, "layer"),
    ("lcm-rows", 3, 12, 7, 6, 4, True, "layer"),
    ("short-rows", 3, 35, 5, 7, 1, True, "layer"),
    ("odd-width", 3, 67, 7, 1, 1, True, "layer"),
    ("width-one", 2, 5, 1, 1, 1, False, "rms"),
    ("model-width", 1, 18, 1152, 1, 2, True, "layer"),
    ("widest-held", 1, 2, 6144, 1, 1, False, "layer"),
    ("wider", 1, 2, 6152, 1, 2, True, "layer"),
    ("odd-and-wide", 1, 17, 833, 1, 1, True, "layer"),
    ("empty-batch", 0, 5, 16, 1, 1, True, "layer"),
    ("no-tokens", 2, 0, 16, 1, 1, True, "layer"),
]
# x, y, shift, scale, affine
DTYPES = {
    "fp32": (F32, F32, F32, F32, F32),
    "bf16": (BF16, BF16, BF16, BF16, BF16),
    "fp16": (F16, F16, F16, F32, F16),
    "autocast-bf16": (F32, BF16, BF16, F32, F32),
    "autocast-fp16": (F32, F16, F16, F16, BF16),
    "rare": (F16, BF16, F32, BF16, F16),
}


def inputs(shape: tuple, dtypes: tuple, offset: int = 0, padding: int = 0) -> dict[str, Tensor | None]:
    """Random tensors, ``offset`` elements off alignment; shift and scale are chunks of rows of 6 D + ``padding``."""
    _, batch, tokens, width, shift_rows, scale_rows, affine, norm = shape
    x_dtype, y_dtype, shift_dtype, scale_dtype, affine_dtype = dtypes
    generator = torch.Generator().manual_seed(5)

    def random(*size: int, dtype: torch.dtype) -> Tensor:
        count = torch.Size(size).numel()
        return torch.randn(count + offset, generator=generator).to(dtype)[offset:].view(size)

    return {
        "dy": random(batch, tokens, width, dtype=y_dtype),
        "x": random(batch, tokens, width, dtype=x_dtype) * 2 + 0.5,
        "shift": random(batch, shift_rows, 6 * width + padding, dtype=shift_dtype)[..., width : 2 * width],
        "scale": random(batch, scale_rows, 6 * width + padding, dtype=scale_dtype)[..., 3 * width : 4 * width],
        "weight": random(width, dtype=affine_dtype) + 1 if affine else None,
        "bias": random(width, dtype=affine_dtype) if affine and norm == "layer" else None,
    }


def emulate(ops, tensors: dict[str, Tensor | None], norm: str) -> dict[str, Tensor]:
    parameters = [tensors[name] for name in ("shift", "scale", "weight", "bias")]
    dy, x = tensors["dy"], tensors["x"]
    y, mean, rstd = ops.adaln_fwd(x, *parameters, None, norm == "rms", 1e-6, dy.dtype)
    dx, *gradients = ops.adaln_bwd(
        dy, x, *parameters[1:], mean, rstd, None, norm == "rms", True, *row_gradient(tensors["shift"], True),
        *row_gradient(tensors["scale"], True), *(None if p is None else p.dtype for p in parameters[2:]),
    )  # fmt: skip
    return {"y": y, "x": dx} | dict(zip(("shift", "scale", "weight", "bias"), gradients, strict=True))


def reference(tensors: dict[str, Tensor | None], norm: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    leaves = {k: None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for k, t in tensors.items()}
    dy = leaves.pop("dy").detach()
    y = adaln.reference(**leaves, norm=norm).to(dy.dtype)
    y.backward(dy)
    return {"y": y.detach()} | {k: leaf.grad for k, leaf in leaves.items() if leaf is not None}


def check(ops, shape: tuple, dtypes: tuple, **layout: int) -> None:
    tensors, norm = inputs(shape, dtypes, **layout), shape[-1]
    kernel = emulate(ops, tensors, norm)
    exact = reference(tensors, norm, torch.float64)
    for name, value in reference(tensors, norm).items():
        assert_as_accurate(f"{shape[0]} {name}", kernel[name], value, exact[name])


@pytest.mark.parametrize("shape", SHAPES[:5], ids=lambda shape: shape[0])
def test_emulated_kernels_compute_what_is_asked_for(emulated, shape: tuple, nan_filled):
    tensors, norm = inputs(shape, DTYPES["bf16"]), shape[-1]
    dy, x, shift, scale, weight, bias = (tensors[name] for name in ("dy", "x", "shift", "scale", "weight", "bias"))
    whole = emulate(emulated, tensors, norm)
    _, mean, rstd = emulated.adaln_fwd(x, shift, scale, weight, bias, None, norm == "rms", 1e-6, dy.dtype)
    saved = (mean, rstd, None, norm == "rms")
    dx, *others = emulated.adaln_bwd(dy, x, scale, weight, None, *saved, True, None, 0, None, 0, None, None)
    assert torch.equal(dx, whole["x"]) and not any(other.numel() for other in others)
    asked = (*row_gradient(shift, True), *row_gradient(scale, True))
    dx, dshift, dscale, *others = emulated.adaln_bwd(dy, x, None, weight, bias, *saved, False, *asked, None, None)
    assert torch.equal(dshift, whole["shift"]) and torch.equal(dscale, whole["scale"])
    assert not any(other.numel() for other in (dx, *others))
    plain = emulated.adaln_fwd(x, None, None, weight, bias, None, norm == "rms", 1e-6, dy.dtype)[0]
    zeros = torch.zeros_like(shift), torch.zeros_like(scale)
    assert torch.equal(plain, emulated.adaln_fwd(x, *zeros, weight, bias, None, norm == "rms", 1e-6, dy.dtype)[0])


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=list(DTYPES))
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape[0])
def test_emulated_kernels_match_the_reference(emulated, shape: tuple, dtypes: tuple, nan_filled):
    check(emulated, shape, dtypes)


@pytest.mark.parametrize("layout", ({"offset": 1}, {"padding": 1}), ids=str)
@pytest.mark.parametrize("shape", SHAPES[:3], ids=lambda shape: shape[0])
def test_emulated_kernels_take_unaligned_tensors(emulated, shape: tuple, layout: dict[str, int], nan_filled):
    check(emulated, shape, DTYPES["bf16"], **layout)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape[0])
def test_emulated_kernels_give_the_same_bits_in_any_order_and_grid(emulated, shape: tuple, monkeypatch):
    tensors = inputs(shape, DTYPES["autocast-bf16"])
    first = emulate(emulated, tensors, shape[-1])
    monkeypatch.setenv("CUDA_ON_CPU_REVERSED", "1")
    for blocks in ("1", "3"):
        monkeypatch.setenv("CUDA_ON_CPU_BLOCKS", blocks)
        for name, result in emulate(emulated, tensors, shape[-1]).items():
            assert torch.equal(result, first[name]), f"{name} changes with the order of threads or with {blocks} blocks"


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


@pytest.mark.skipif(NVCC is None, reason="nvcc was not found")
def test_nvcc_builds_every_architecture_without_warnings_or_spills(tmp_path: Path):
    environment = {k: v for k, v in os.environ.items() if k != "TORCH_CUDA_ARCH_LIST"}
    environment |= {"MINISORA_CPU": "0", "MINISORA_CUDA": "1"}
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path / "lib"), "--build-temp"]
    done = subprocess.run([*command, str(tmp_path / "temp")], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    package = tmp_path / "lib" / "minisora_kernels"
    record = json.loads((package / "build_record.json").read_text())["cuda"]
    assert record.get("architectures") == BUILT, record
    warnings = [line for line in done.stderr.splitlines() if "warning" in line and "csrc/cuda" in line]
    assert not warnings, "\n".join(warnings)

    cuobjdump = shutil.which("cuobjdump") or _triton_cuobjdump()
    if cuobjdump is None:
        pytest.skip("built; cuobjdump was not found, so the registers were not read")
    command = [cuobjdump, "-res-usage", str(package / "_cuda.so")]
    usage = subprocess.run(command, capture_output=True, text=True, check=True)
    listed = subprocess.run([cuobjdump, "-lptx", command[-1]], capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r"sm_\d+", listed)) == {"sm_120"}  # cuobjdump calls PTX after the least GPU that takes it
    kernels = {}
    for section in (usage.stdout + usage.stderr).split("Fatbin elf code:")[1:]:
        found = re.search(r"arch = sm_(\d+)", section)
        assert found, section
        kernels.setdefault(found[1], []).extend(re.findall(r"Function (\S+):\s+REG:\d+ STACK:(\d+)", section))
    for architecture in ARCHITECTURES:
        ours = kernels.get(architecture.replace(".", ""), [])
        for kernel in ("adaln_forward", "adaln_backward", "sum_partials"):
            assert any(kernel in name for name, _ in ours), f"no {kernel} for {architecture}"
        spilling = [name for name, stack in ours if stack != "0"]
        assert not spilling, f"{architecture}: registers spill to a stack frame in {spilling}"


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

    @pytest.mark.skipif(NVCC is None, reason="nvcc was not found")
    def test_the_cuda_kernels_compile(self, variables, tmp_path: Path):
        flags = [variables["STABLE_ABI"], "-DUSE_CUDA", "--expt-relaxed-constexpr", *variables["gencode"]("9.0")]
        output = ["-o", str(tmp_path / "adaln.o")]
        self.compile([NVCC, "-std=c++20", *flags, f"-I{OLDEST}", "-c", str(ROOT / "csrc/cuda/adaln.cu"), *output])

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
