"""Every Triton kernel's op once, forward and backward, on odd shapes: ``python -m bench.gpu.sanitized``.

What bench/gpu/steps.py runs under compute-sanitizer: short, without pytest. Whether values are right is for the tests;
here they must be finite, and every raw op must have run. On a GPU; with ``TRITON_INTERPRET=1`` on the CPU.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch

from bench.harness import shapes
from bench.harness.counters import raw_ops
from bench.harness.session import DTYPES, tuple_of
from bench.ops import bench_of
from minisora_kernels import backends, use_backend
from minisora_kernels.commands import command
from minisora_kernels.counters import Counter

WINDOWS = shapes.Windows("packed", (5, 2, 3), (5, 1, 1), 3, 24)
# By op: sizes that no tile, vector or warp divides.
ODD: dict[str, list[Any]] = {
    "adaln": [shapes.Tokens("rows", 2, 21, 100, 3), shapes.Tokens("a row a token", 1, 11, 37, 11)],
    "gate_residual": [shapes.Tokens("rows", 2, 21, 100, 3), shapes.Tokens("a row a token", 1, 11, 37, 11)],
    "gate_residual_adaln": [shapes.Tokens("rows", 2, 21, 100, 3), shapes.Tokens("a row a token", 1, 11, 37, 11)],
    "gelu_mlp": [shapes.Tokens("odd", 2, 21, 67)],
    "grn": [shapes.Responses("gelu", 3, 5, 100, "gelu"), shapes.Responses("plain", 2, 9, 37, None)],
    "guided_step": [shapes.Latents("euler", (3, 5, 7), False, 2), shapes.Latents("ddpm", (3, 5, 7), True, 2)],
    "patch_embed": [
        shapes.Patches("latents", 3, (3, 6, 10), (1, 2, 2), width=40, batch=2),
        shapes.Patches("pixels", 3, (2, 48, 32), (1, 16, 16), width=40),
    ],
    "unpatchify": [shapes.Patches("odd", 5, (3, 6, 10), (1, 2, 2), batch=2)],
    "window_attention": [
        WINDOWS,
        shapes.Windows("norm and rope", (19, 2, 2), (19, 1, 1), 3, 24, norm_and_rope=True),
        shapes.Windows("edge windows, bias", (5, 5, 5), (2, 3, 4), 2, 24, bias=True),
        shapes.Windows("long", (3, 5, 5), (3, 5, 5), 2, 24, norm_and_rope=True),
        shapes.Windows("long, bias", (3, 6, 5), (3, 5, 5), 2, 24, bias=True),
    ],
}


def run(op: str, shape: Any, dtype: str, device: torch.device) -> None:
    """Forward, and backward for every input, constants too where the op has a gradient for them.

    Raises:
        FloatingPointError: a result that is not finite.
    """
    problem = bench_of(op).problem(shape, DTYPES[dtype], device)
    names = list(problem.inputs) if problem.wanted else []
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
    parser.add_argument("--only", choices=ODD, help="one op alone")
    options = parser.parse_args(arguments)
    if not backends.INTERPRETED and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device; without one this runs with TRITON_INTERPRET=1")
    device = torch.device("cpu" if backends.INTERPRETED else "cuda")
    chosen = [options.only] if options.only else list(ODD)
    with use_backend("triton"), Counter() as counter:
        for op in chosen:
            for shape in ODD[op]:
                for dtype in DTYPES:
                    run(op, shape, dtype, device)
            print(f"{op}: {len(ODD[op])} shapes", flush=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
    wanted = [name for name in raw_ops() if any(name.removesuffix(end) in chosen for end in ("_fwd", "_bwd"))]
    missing = sorted(set(wanted) - counter.kernels)
    print(f"did not run: {', '.join(missing)}" if missing else f"{len(wanted)} raw ops ran")
    return bool(missing)


if __name__ == "__main__":
    sys.exit(main())
