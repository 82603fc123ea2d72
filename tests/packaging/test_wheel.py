"""A source distribution and the wheel made of it: they build, and install where nothing else of this project is."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import minisora_kernels
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


def test_its_wheel_installs_in_a_clean_environment_and_its_kernels_serve(source, tmp_path):
    command = (
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-build-isolation",
        "--no-deps",
        "--wheel-dir",
        tmp_path,
        source,
    )
    run(*command, cwd=tmp_path, MINISORA_CPU="native", MINISORA_CUDA="0")
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        libraries = [name for name in archive.namelist() if name.endswith(".so")]
    assert len(libraries) == 1 and libraries[0].startswith("minisora_kernels/_cpu_"), libraries
    clean = tmp_path / "clean"
    run(sys.executable, "-m", "venv", clean, cwd=tmp_path)
    python = clean / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    # What it requires comes from here. Of a folder that is named so, Python reads no .pth file: the editable install of
    # this project is not seen.
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip()
    (Path(site) / "required.pth").write_text(sysconfig.get_path("purelib") + "\n")
    path, version = run(python, "-c", USE, cwd=tmp_path, PYTHONPATH="").split()
    assert Path(path).is_relative_to(clean) and version == minisora_kernels.__version__
    assert "adaln" in run(python, "-m", "minisora_kernels", cwd=tmp_path, PYTHONPATH="")
    assert "dit-xl/2" in run(python, "-m", "minisora_models.train", "--model", "list", cwd=tmp_path, PYTHONPATH="")
