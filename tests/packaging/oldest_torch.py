"""Fetches the headers of the oldest torch in pyproject.toml's range: ``python tests/packaging/oldest_torch.py FOLDER``.

Prints where they are; they are fetched once. They come from the wheel for Windows: an eighth of Linux's in size, and
its headers are the same but for what no kernel includes.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
INCLUDE = "torch/include/"


def version_of_pyproject() -> str:
    found = re.search(r'"torch>=(\d+\.\d+)"', (ROOT / "pyproject.toml").read_text())
    assert found, "pyproject.toml names no least torch"
    return f"{found[1]}.0"


def fetch(folder: Path) -> Path:
    """The include folder below ``folder``; it is there whole, or not at all."""
    version = version_of_pyproject()
    home = folder / f"torch-{version}"
    if not home.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
            wheel = ["--platform", "win_amd64", "--python-version", "3.11", "--dest", scratch, f"torch=={version}"]
            subprocess.run([*pip, *wheel], check=True, stdout=sys.stderr)
            (path,) = Path(scratch).glob("*.whl")
            with zipfile.ZipFile(path) as archive:
                names = [name for name in archive.namelist() if name.startswith(INCLUDE)]
                archive.extractall(Path(scratch) / "whole", names)
            (Path(scratch) / "whole").rename(home)
    return home / INCLUDE


if __name__ == "__main__":
    print(fetch(Path(sys.argv[1])))
