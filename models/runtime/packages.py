"""Optional packages, imported when they are needed."""

from __future__ import annotations

import importlib
from typing import Any


def package(name: str) -> Any:
    """The package, or a module of it, imported only now.

    Raises:
        ValueError: it is not installed; says how it may be.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        installed = name.split(".")[0]
        raise ValueError(f"package {installed!r} is needed: pip install {installed} ({error})") from error
