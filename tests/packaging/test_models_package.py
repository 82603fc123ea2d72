"""models/ installed with the kernels, under a name that leaves ``models`` to others."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parent.parent.parent

USER = """
import sys, warnings
import models
assert models.mine == 7, models.__file__
from minisora_models.denoisers.dit import DiT
from minisora_models.registry import SYSTEMS, FAMILIES
import minisora_models.train, minisora_models.sample, minisora_models.precompute, minisora_models.measure
import minisora_models.plan, minisora_models.digits, minisora_models.demo
assert FAMILIES["dit"].model is DiT and DiT.__module__ == "minisora_models.denoisers.dit"
assert not [name for name in sys.modules if name.startswith("models.")]
print(sys.modules["minisora_models"].__file__)
"""
BOTH = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from models.protocols import SmallClips
    assert not caught, caught
    from minisora_models.protocols import SmallClips as Other
assert [str(w.message) for w in caught if "its classes now exist twice" in str(w.message)], caught
assert Other is not SmallClips
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """What a wheel, built without the kernels and without network, puts into site-packages."""
    folder = tmp_path_factory.mktemp("wheel")
    tree = folder / "tree"
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "build_record.json")
    for name in ("minisora_kernels", "models", "build_backend", "csrc"):
        shutil.copytree(ROOT / name, tree / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, tree / name)
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    environment = os.environ | {"MINISORA_CPU": "0", "MINISORA_CUDA": "0"}
    done = subprocess.run(
        [sys.executable, "-c", build, str(folder)], cwd=tree, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def run(script: str, folder: Path, *path: Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))}
    return subprocess.run([sys.executable, "-c", script], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("folder", "package"), [("models", "minisora_models"), ("minisora_kernels", "minisora_kernels")]
)
def test_every_folder_is_a_package_that_is_installed(folder, package):
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent.relative_to(ROOT / folder) for path in (ROOT / folder).rglob("*.py")}
    assert {name for name in listed if name.split(".")[0] == package} == {
        ".".join((package, *parts.parts)) for parts in folders
    }
    assert len(folders) > 3


def test_a_wheel_has_every_file_of_models_and_leaves_the_name_models_to_others(site, tmp_path):
    installed = {path.relative_to(site / "minisora_models") for path in (site / "minisora_models").rglob("*.py")}
    assert installed == {path.relative_to(ROOT / "models") for path in (ROOT / "models").rglob("*.py")}
    assert not (site / "models").exists()
    (tmp_path / "models.py").write_text("mine = 7\n")
    done = run(USER, tmp_path, site)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == site / "minisora_models/__init__.py"


def test_a_command_runs_under_the_installed_name(site, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(site)}
    command = [sys.executable, "-m", "minisora_models.train", "--model", "list"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "dit-xl/2" in done.stdout, done.stderr


def test_both_names_in_one_process_are_two_packages_with_a_warning(site, tmp_path):
    done = run(BOTH, ROOT, site)
    assert done.returncode == 0, done.stderr


def test_a_command_names_the_extra_that_its_packages_are_in(tmp_path):
    """Where one is not installed: a line, and no traceback of an import."""
    hide = "from importlib import util; f = util.find_spec; util.find_spec = lambda name: name != 'tyro' and f(name)"
    (tmp_path / "sitecustomize.py").write_text(hide)
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    command = [sys.executable, "-m", "models.train", "--help"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "error: tyro is not installed, which the commands need: pip install '.[train]'\n"
