"""A source distribution and the wheel made of it: they build, and install where nothing else of this project is.

Where nvcc is, the wheel has CUDA kernels too, of one architecture, and installs where there may be no CUDA.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

import minisora_kernels
from bench.nvcc import NVCC
from minisora_kernels import backends

ROOT = Path(__file__).parent.parent.parent
pytestmark = [
    pytest.mark.slow,  # it compiles the kernels
    pytest.mark.skipif(not (ROOT / ".git").exists(), reason="the files of the project are those that git knows"),
    pytest.mark.skipif(
        backends.unavailable("cpu") is not None, reason="there is no compiler, or no kernel for this CPU"
    ),
]

USE = """
import torch
import minisora_kernels as mk
x = torch.randn(2, 6, 8, requires_grad=True)
shift, scale = torch.randn(2, 1, 8), torch.randn(2, 1, 8)
y = mk.adaln(x, shift, scale, backend="cpu")
torch.testing.assert_close(y, mk.adaln(x, shift, scale, backend="reference"))
y.sum().backward()
print(mk.__file__, mk.__version__)
"""


def run(*command: object, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """The source distribution, of the files that git knows."""
    folder = tmp_path_factory.mktemp("source")
    tree = folder / "tree"
    names = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines()
    for name in names:
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_bytes((ROOT / name).read_bytes())
    build = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", build, folder, cwd=tree)
    (path,) = folder.glob("*.tar.gz")
    return path


def test_the_source_has_what_a_build_needs(source):
    with tarfile.open(source) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    for folder, suffixes in (
        ("csrc", ("*.cpp", "*.h", "*.cu")),
        ("minisora_kernels", ("*.py",)),
        ("models", ("*.py",)),
    ):
        files = {str(path.relative_to(ROOT)) for suffix in suffixes for path in (ROOT / folder).rglob(suffix)}
        assert files and files <= names, files - names
    assert {"LICENSE", "setup.py", "build_backend/backend.py", "minisora_kernels/py.typed"} <= names
    assert any(name.startswith("minisora_kernels/verify/records/") for name in names)


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> Path:
    """Made of the source, for this CPU, and where nvcc is for one architecture of GPUs."""
    folder = tmp_path_factory.mktemp("wheel")
    command = (sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", folder, source)
    run(*command, cwd=folder, MINISORA_CPU="native", MINISORA_CUDA="", TORCH_CUDA_ARCH_LIST="8.0")
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> Path:
    """Of a clean environment that has the wheel."""
    clean = tmp_path_factory.mktemp("clean")
    run(sys.executable, "-m", "venv", clean, cwd=clean)
    python = clean / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=clean, PYTHONPATH="")
    # What it requires comes from here. Of a folder that is named so, Python reads no .pth file: the editable install of
    # this project is not seen.
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=clean).strip()
    (Path(site) / "required.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def test_the_wheel_is_for_every_python_and_says_what_is_in_it(wheel):
    version = minisora_kernels.__version__
    tag = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.name == f"minisora_kernels-{version}-py3-none-{tag}.whl"
    with zipfile.ZipFile(wheel) as archive:
        libraries = [name for name in archive.namelist() if name.endswith(".so")]
        record = json.loads(archive.read("minisora_kernels/build_record.json"))
    cuda = [] if NVCC is None else ["minisora_kernels/_cuda.so"]
    assert libraries == [f"minisora_kernels/_{name}.so" for name in record["cpu"]["libraries"]] + cuda
    assert len(record["cpu"]["libraries"]) == 1
    assert record["cuda"].get("architectures") == (None if NVCC is None else "8.0")


def test_it_installs_in_a_clean_environment_and_its_kernels_serve(python, tmp_path):
    path, version = run(python, "-c", USE, cwd=tmp_path, PYTHONPATH="").split()
    assert Path(path).is_relative_to(python.parents[1]) and version == minisora_kernels.__version__
    assert "adaln" in run(python, "-m", "minisora_kernels", cwd=tmp_path, PYTHONPATH="")
    assert "dit-xl/2" in run(python, "-m", "minisora_models.train", "--model", "list", cwd=tmp_path, PYTHONPATH="")


# Loads the CUDA library beside a library that stands in for what a torch with CUDA has, if this torch has none.
LOAD = """
import ctypes, pathlib, sys
import torch
import minisora_kernels as mk
if torch.version.cuda is None:
    ctypes.CDLL(sys.argv[1])
    torch.ops.load_library(str(pathlib.Path(mk.__file__).parent / "_cuda.so"))
print(torch._C._dispatch_has_kernel_for_dispatch_key("minisora::window_attention_fwd", "CUDA"))
"""
STREAM_AND_HANDLE = """
extern "C" int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }
extern "C" int torch_get_current_cuda_blas_handle(void**) { return 1; }
"""


@pytest.mark.skipif(NVCC is None, reason="nvcc was not found")
def test_its_cuda_library_needs_torch_alone(wheel, python, tmp_path):
    """Not CUDA's own libraries; of torch only what is promised to stay, and its functions for a stream and a handle."""
    with zipfile.ZipFile(wheel) as archive:
        library = archive.extract("minisora_kernels/_cuda.so", tmp_path)
    needed = [line.split()[0] for line in run("ldd", library, cwd=tmp_path).splitlines()]
    assert {"libtorch_cpu.so", "libtorch_cuda.so"} <= set(needed)
    assert not [name for name in needed if name.startswith(("libcuda", "libcudart", "libpython"))]
    symbols = run("nm", "--dynamic", "--undefined-only", "--demangle", library, cwd=tmp_path)
    assert not [line for line in symbols.splitlines() if " c10::" in line or " at::" in line or " torch::" in line]
    stand_in = tmp_path / "libtorch_cuda.so"
    (tmp_path / "torch_cuda.cpp").write_text(STREAM_AND_HANDLE)
    compiler = os.environ.get("CXX") or shutil.which("c++") or "g++"
    command = (compiler, "-shared", "-fPIC", "-Wl,-soname,libtorch_cuda.so", "torch_cuda.cpp", "-o", stand_in)
    run(*command, cwd=tmp_path)
    assert run(python, "-c", LOAD, stand_in, cwd=tmp_path, PYTHONPATH="").strip() == "True"


@pytest.mark.skipif(NVCC is None, reason="nvcc was not found")
@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a device that loads the kernels")
def test_without_a_device_it_says_what_would_load_its_cuda_kernels(python, tmp_path):
    said = run(python, "-m", "minisora_kernels", cwd=tmp_path, PYTHONPATH="")
    (line,) = [line for line in said.splitlines() if line.startswith("      cuda: torch")]
    missing = "finds no CUDA device" if torch.version.cuda else f"{torch.__version__} has no CUDA"
    minor = ".".join(torch.__version__.split(".")[:2])
    assert line == (
        f"      cuda: torch {missing}; the package has kernels for compute capabilities 8.0: torch {minor} with CUDA "
        "loads them, on such a GPU"
    )
    row = next(line for line in said.splitlines() if line.startswith("window_attention "))
    assert "not here" in row
