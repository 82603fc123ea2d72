"""The tile path of csrc/cpu/pairs.h without AMX: window_attention.cpp and patch_embed.cpp, unmodified, compiled for
AVX-512 with the tiles of amx_emulation.h, are as accurate as minisora_kernels/testing.py asks.

It says nothing about the compiler's AMX code, about speed, or about the system's permission to use tiles.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import pytest
import test_patch_embed
import torch
from test_window_attention import RAGGED, leaves

from minisora_kernels import backends, patch_embed, rope_3d, window_attention
from minisora_kernels.testing import assert_as_accurate

ROOT = Path(__file__).parents[2]
CXX = shlex.split(os.environ.get("CXX", "")) or [shutil.which("c++") or shutil.which("g++") or "c++"]
MISSING = backends.unavailable("cpu") or (shutil.which(CXX[0]) is None and "no C++ compiler was found")
MISSING = MISSING or (not torch.cpu._is_avx512_bf16_supported() and "this CPU has no avx512_bf16") or ""
pytestmark = [pytest.mark.skipif(bool(MISSING), reason=MISSING), pytest.mark.slow]  # compiles the kernels five times

# library: its ops, and what is changed in a copy of the sources: file, text, new text
LIBRARIES = {
    "tiles": (("window_attention", "patch_embed"), ("pairs.h", "", "")),
    "unpadded": (("window_attention",), ("attention.h", "empty = whole(size, terms) - size", "empty = 0")),
    "swapped": (("patch_embed",), ("pairs.h", "_tile_dpbf16ps(1, 4, 7)", "_tile_dpbf16ps(1, 4, 6)")),
    "unconfigured": (("patch_embed",), ("pairs.h", "_tile_loadconfig(config)", "_tile_release()")),
}


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    """name: the raw ops, and the library itself."""
    folder, torch_folder = tmp_path_factory.mktemp("amx"), Path(torch.__file__).parent
    with mock.patch("setuptools.setup"):
        flags = runpy.run_path(str(ROOT / "setup.py"))["VARIANTS"]["cpu_avx512_bf16"]
    common = [*CXX, "-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-fopenmp-simd", "-w", *flags, "-include"]
    common += [str(Path(__file__).parent / "amx_emulation.h"), f"-I{torch_folder / 'include'}"]
    common.append(f"-I{ROOT / 'csrc' / 'cpu'}")  # of ../check.h, which is not copied
    compilations = []
    for name, (ops, (file, old, new)) in LIBRARIES.items():
        sources = shutil.copytree(ROOT / "csrc" / "cpu", folder / name)
        text = (sources / file).read_text()
        assert not old or text.count(old) == 1, f"{file} has changed: where is {old!r}?"
        (sources / file).write_text(text.replace(old, new) if old else text)
        for op in ops:
            object_file = ["-c", str(sources / f"{op}.cpp"), "-o", str(sources / f"{op}.o")]
            compilations.append([*common, f"-Dminisora=minisora_{name}", *object_file])

    def call(command: list[str]) -> None:
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(call, compilations))
    built, schemas = {}, []
    for name, (ops, _) in LIBRARIES.items():
        path = folder / name / "library.so"
        link = [*CXX, "-shared", *(str(folder / name / f"{op}.o") for op in ops), f"-L{torch_folder / 'lib'}"]
        call([*link, "-ltorch_cpu", "-lc10", "-o", str(path)])
        schemas.append(torch.library.Library(f"minisora_{name}", "DEF"))
        names = [f"{op}_{way}" for op in ops for way in ("fwd", "bwd")]
        for raw in names:
            schemas[-1].define(str(getattr(torch.ops.minisora, raw).default._schema).removeprefix("minisora::"))
        torch.ops.load_library(str(path))
        built[name] = {raw: getattr(getattr(torch.ops, f"minisora_{name}"), raw) for raw in names}, ctypes.CDLL(path)
    yield built
    for library in schemas:
        library._destroy()


@pytest.fixture
def load(libraries, monkeypatch, threads):
    """load(name): backend ``cpu`` is that library; two threads, so that one meets windows of different sizes."""

    def load(name: str):
        torch.set_num_threads(2)
        for raw, function in libraries[name][0].items():
            monkeypatch.setattr(torch.ops.minisora, raw, function)
        return libraries[name][1]

    return load


def check(call, tensors):
    """The output of call(backend, **tensors) and every gradient, by the rule; and what the kernel gave."""
    results = []
    for backend, dtype in (("cpu", torch.bfloat16), ("reference", torch.bfloat16), ("reference", torch.float64)):
        given = {name: tensor.detach().bfloat16().to(dtype).requires_grad_() for name, tensor in tensors.items()}
        out = call(backend, **given)
        gradient = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(dtype)
        results.append([out.detach(), *torch.autograd.grad(out, list(given.values()), gradient)])
    for name, *values in zip(("output", *tensors), *results, strict=True):
        assert_as_accurate(name, *values)
    return results[0]


def check_attention(grid, window, head_dim, full):
    rope = rope_3d(grid, head_dim) if full else None
    options = {"grid": grid, "window": window, "qk_norm": "rms" if full else None}
    if rope is not None:
        options["rope"] = rope._replace(cos=rope.cos.double(), sin=rope.sin.double())
    tensors = leaves(torch.bfloat16, 2, grid, window, 2, head_dim, weights=int(full), biased=full)
    return check(lambda backend, **given: window_attention(**given, **options, backend=backend), tensors)


def check_patches(channels, size, patch, width, names=("x", "weight", "bias")):
    torch.manual_seed(0)
    tensors = test_patch_embed.tensors((2, channels, size, patch, width))
    tensors = {name: t for name, t in zip(test_patch_embed.NAMES, tensors, strict=True) if name in names}
    return check(lambda backend, **given: patch_embed(**given, backend=backend), tensors)


@pytest.mark.parametrize("full", (False, True), ids=("plain", "norm-rope-bias"))
@pytest.mark.parametrize("head_dim", (8, 64, 72, 80))
@pytest.mark.parametrize("length", (1, 5, 16, 32, 64, 65, 257, "ragged"))
def test_windows(length, head_dim, full, load, nan_filled):
    """In a line the last window is a third as long as the first."""
    library = load("tiles")
    before = library.tile_products()
    grid, window = RAGGED[1:] if length == "ragged" else ((1, 1, length + length // 3), (1, 1, length))
    check_attention(grid, window, head_dim, full)
    assert library.tile_products() > before


@pytest.mark.parametrize("names", (("bias", "pos"), ("bias",), ()), ids=str)
@pytest.mark.parametrize("width", (32, 96, 1152))
@pytest.mark.parametrize(
    ("channels", "size", "patch"),
    [(4, (3, 10, 14), (1, 2, 2)), (4, (4, 6, 14), (2, 2, 2)), (3, (2, 5, 7), (1, 1, 1))],
    ids=("1x2x2", "2x2x2", "1x1x1"),
)
def test_patches(channels, size, patch, width, names, load, nan_filled):
    """The backward has tiles where there is no pos."""
    library = load("tiles")
    before = library.tile_products()
    check_patches(channels, size, patch, width, ("x", "weight", *names))
    assert library.tile_products() > before


def test_same_bits_for_any_number_of_threads(load, threads):
    load("tiles")
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(check_attention((2, 9, 11), (2, 4, 9), 24, True))
        results[-1] += check_patches(4, (4, 18, 22), (1, 2, 2), 416)
    for other in results[1:]:
        assert all(torch.equal(mine, first) for mine, first in zip(other, results[0], strict=True))


@pytest.mark.parametrize("name", ("unpadded", "swapped", "unconfigured"))
def test_these_tests_can_fail(name, load):
    load(name)
    error, match = (RuntimeError, "without a configuration") if name == "unconfigured" else (AssertionError, " error ")
    with pytest.raises(error, match=match):
        check_attention(*RAGGED[1:], 64, False) if name == "unpadded" else check_patches(4, (3, 10, 14), (1, 2, 2), 96)
