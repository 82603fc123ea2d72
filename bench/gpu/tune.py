"""Measures sizes of kernels on a GPU: ``python -m bench.gpu.tune --out _tiles.py`` writes its table anew.

What ``minisora_kernels/triton/_tiles.py`` names as candidates is timed in turns, on the shapes of the benches. What
this architecture has now is replaced where another takes less time by more than :data:`GAIN`, in the median of the
ratios of a turn. Kernels never read what is written until it is put in the place of that file.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from bench.harness.clock import Clock
from bench.harness.session import tuple_of
from bench.harness.shapes import on_device
from bench.ops import bench_of
from minisora_kernels import use_backend
from minisora_kernels.commands import command

TURNS, GAIN = 15, 0.03
# Whose shape is timed, by table: op, shape, and whether forward and backward.
TIMED = {
    "AHEAD": ("gate_residual_adaln", "XL/2 16x256x256 b2", True),
    "PRODUCT": ("patch_embed", "3x16x256x256 patch 1x16x16", False),
    "ATTENTION_FORWARD": ("attention", "cross 512 text 16x72 b2", False),
    "ATTENTION_BACKWARD": ("attention", "cross 512 text 16x72 b2", True),
    "WINDOW_FORWARD": ("window_attention", "W.A.L.T 5x8x8 b2 16x72 bias", False),
    "WINDOW_BACKWARD": ("window_attention", "W.A.L.T 5x8x8 b2 16x72 bias", True),
}


class Found(NamedTuple):
    """The sizes that serve from now on, and the median of their time over that of those now, with those of others."""

    sizes: Any
    ratios: dict[str, float]


def call_of(table: str, device: torch.device) -> Callable[[], None]:
    """What is timed for a table, in bfloat16."""
    op, name, both = TIMED[table]
    bench = bench_of(op)
    (shape,) = (shape for shape in bench.SHAPES if shape.name == name)
    problem = bench.problem(on_device(shape, device), torch.bfloat16, device)

    def call() -> None:
        outputs = tuple_of(problem.call(problem.inputs))
        if both:
            torch.autograd.grad(outputs, [problem.inputs[name] for name in problem.gradient_names], outputs)

    return call


def tune(table: str, target: int, call: Callable[[], None], clock: Callable[[Callable[[], None]], float]) -> Found:
    """Times the candidates of a table in turns. What does not compile or fit is left out."""
    from minisora_kernels.triton import _launch, _tiles

    entries = getattr(_tiles, table)
    now = entries.get(target, entries[0])
    times: dict[Any, list[float]] = {now: [], **{sizes: [] for sizes in _tiles.CANDIDATES[table]}}
    for _ in range(TURNS):
        for sizes in [*times]:
            with patch.dict(entries, {target: sizes}):
                _launch.forget_plans()
                try:
                    call()
                    times[sizes].append(clock(call))
                except Exception as error:  # whatever the compiler or the driver raises for sizes that do not fit
                    if sizes == now:
                        raise
                    print(f"{table} {sizes}: {str(error).splitlines()[0] if str(error) else repr(error)}")
                    del times[sizes]
    _launch.forget_plans()
    ratios = {
        sizes: statistics.median(one / other for one, other in zip(taken, times[now], strict=True))
        for sizes, taken in times.items()
    }
    best = min(ratios, key=lambda sizes: ratios[sizes])
    return Found(best if ratios[best] < 1 - GAIN else now, {str(sizes): ratio for sizes, ratio in ratios.items()})


def written(text: str, target: int, found: Mapping[str, Found]) -> str:
    """The text of _tiles.py with what was found for an architecture."""
    from minisora_kernels.triton import _tiles

    for table, (sizes, _) in found.items():
        entries = {**getattr(_tiles, table), target: sizes}
        lines = "".join(f"    {number}: {each},\n" for number, each in sorted(entries.items()))
        block = rf"^{table} = {{\n.*?^}}$"
        text, count = re.subn(block, f"{table} = {{\n{lines}}}", text, flags=re.MULTILINE | re.DOTALL)
        if count != 1:
            raise ValueError(f"_tiles.py has {count} tables {table}, it must have one")
    return text


@command(failed=2)
def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="where the new table goes")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("torch finds no CUDA device; candidates are timed on a GPU alone")
    from minisora_kernels.triton import _launch, _tiles

    device = torch.device("cuda")
    clock, target = Clock(device), _launch.architecture()
    with use_backend("triton"):
        found = {table: tune(table, target, call_of(table, device), clock) for table in TIMED}
    for table, (sizes, ratios) in found.items():
        print(f"{table}: {sizes}")
        for name, ratio in sorted(ratios.items(), key=lambda pair: pair[1]):
            print(f"  {ratio:.3f} {name}")
    options.out.write_text(written(Path(_tiles.__file__).read_text(), target, found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
