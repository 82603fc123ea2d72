"""``python -m minisora_kernels``: what runs here. Op x backend with reasons, versions, and the record of the build."""

from __future__ import annotations

import importlib
import platform
from pathlib import Path

import torch

from . import __version__, backends


def ops() -> list[str]:
    """The ops, found by file name: ``ops/<op>.py``."""
    return sorted(path.stem for path in (Path(__file__).parent / "ops").glob("*.py") if path.stem != "__init__")


def table() -> list[tuple[str, list[str]]]:
    """Per op, for each backend: ``yes``, ``no kernel``, or ``here: no``."""
    rows = []
    for op in ops():
        has = importlib.import_module(f"minisora_kernels.ops.{op}").BACKENDS
        cells = []
        for name in backends.BACKENDS:
            if name not in has:
                cells.append("no kernel")
            else:
                cells.append("yes" if backends.unavailable(name) is None else "not here")
        rows.append((op, cells))
    return rows


def main() -> None:
    capability = backends.cpu_capability()
    print(f"minisora_kernels {__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    print(f"CPU: {capability}, {torch.get_num_threads()} threads\n")
    width = max(len(op) for op in ops())
    print(" ".join([" " * width, *(f"{name:>10}" for name in backends.BACKENDS)]))
    for op, cells in table():
        print(" ".join([f"{op:{width}}", *(f"{cell:>10}" for cell in cells)]))
    print()
    for name in backends.BACKENDS:
        print(f"{name:>10}: {backends.unavailable(name) or 'available'}")
    print()
    for op in ops():
        note = getattr(importlib.import_module(f"minisora_kernels.ops.{op}"), "ROUTES", None)
        if note:
            print(f"{op}: {note}")
    print("\norder of the automatic choice:")
    for device, order in backends.PREFERENCE.items():
        print(f"{device:>10}: {', then '.join(order)}")
    record = backends.build_record()
    print(f"\nbuild record: {'' if record else 'none; the package was not installed with pip'}")
    for part, facts in record.items():
        print(f"{part:>10}: {', '.join(f'{key} = {value}' for key, value in facts.items())}")


if __name__ == "__main__":
    main()
