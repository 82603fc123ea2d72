"""How many programs each kernel has at least: ``python -m bench.gpu.programs`` prints it for the shapes of the benches.

Nothing is compiled and nothing runs: the launchers are called on tensors without memory, and their grids are noted. A
kernel of few programs leaves most of a GPU idle while it lasts.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from math import prod
from typing import Any
from unittest.mock import patch

from bench.aot import benched, launch_all, set_target
from bench.gpu.architectures import ARCHITECTURES
from minisora_kernels.__main__ import ops
from minisora_kernels.commands import command


def fewest(of: Sequence[str] = ()) -> dict[str, tuple[int, str]]:
    """By op and kernel: the fewest programs that a shape of the benches gives it, and that shape; ``of``: these ops."""
    from triton.runtime.jit import JITFunction

    set_target(ARCHITECTURES["sm_90"])
    found: dict[str, tuple[int, str]] = {}
    op = shape = ""

    def note(self: JITFunction, *args: Any, grid: tuple[int, ...], **kwargs: Any) -> None:
        programs, key = prod(grid), f"{op} {self.__name__}"
        if key not in found or programs < found[key][0]:
            found[key] = programs, shape

    def begin(of_op: str, name: str, dtype: str) -> None:
        nonlocal op, shape
        op, shape = of_op, f"{name} {dtype}"

    with patch.object(JITFunction, "run", note):
        launch_all(benched, begin, of)
    return found


@command()
def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", nargs="+", default=ops(), choices=ops(), help="of these ops alone")
    found = fewest(parser.parse_args(arguments).op)
    for kernel, (programs, shape) in sorted(found.items(), key=lambda entry: entry[1]):
        print(f"{programs:8} {kernel}: {shape}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
