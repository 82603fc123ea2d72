"""Every Triton kernel's op once, forward and backward, on odd shapes: ``python -m bench.gpu.sanitized``.

What bench/gpu/steps.py runs under compute-sanitizer: short, without pytest. Whether values are right is for the tests;
here they must be finite, and every raw op must have run. On a GPU; with ``TRITON_INTERPRET=1`` on the CPU.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch

from bench.harness.counters import raw_ops
from bench.harness.session import DTYPES, tuple_of
from bench.ops import bench_of
from minisora_kernels import backends, use_backend
from minisora_kernels.__main__ import ops
from minisora_kernels.commands import command
from minisora_kernels.counters import Counter


def run(op: str, shape: Any, dtype: str, device: torch.device) -> None:
    """Forward, and backward for every input, constants too where the op has a gradient for them.

    Raises:
        FloatingPointError: a result that is not finite.
    """
    problem = bench_of(op).problem(shape, DTYPES[dtype], device)
    names = list(problem.inputs) if problem.gradient_names else []
    for name in names:
        problem.inputs[name].requires_grad_()
    results = tuple_of(problem.call(problem.inputs))
    if names:
        upstream = [torch.randn_like(value) for value in results]
        results += torch.autograd.grad(results, [problem.inputs[name] for name in names], upstream)
    for place, value in enumerate(results):
        if not value.isfinite().all():
            raise FloatingPointError(f"{op} {shape.name} {dtype}: result {place} is not finite")


@command(failed=2)
def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=ops(), help="one op alone")
    options = parser.parse_args(arguments)
    if not backends.INTERPRETED and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device; without one this runs with TRITON_INTERPRET=1")
    device = torch.device("cpu" if backends.INTERPRETED else "cuda")
    chosen = [options.only] if options.only else ops()
    with use_backend("triton"), Counter() as counter:
        for op in chosen:
            for shape in bench_of(op).ODD:
                for dtype in DTYPES:
                    run(op, shape, dtype, device)
            print(f"{op}: {len(bench_of(op).ODD)} shapes", flush=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
    wanted = [name for name in raw_ops() if any(name.removesuffix(end) in chosen for end in ("_fwd", "_bwd"))]
    missing = sorted(set(wanted) - counter.kernels)
    print(f"did not run: {', '.join(missing)}" if missing else f"{len(wanted)} raw ops ran")
    return bool(missing)


if __name__ == "__main__":
    sys.exit(main())
