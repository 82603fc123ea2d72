"""How often a Triton kernel reads and writes every element of the large tensors, by construction.

Keys are raw ops; ``read`` and ``written`` say how often an element of a tensor passes, on average. What is small beside
them (rows of modulation, weights, rotary tables) is left out, and stays in the caches. tests/ops/test_triton_traffic.py
counts the accesses of every element in the interpreter and holds the table against them. The rows of an op are in its
bench, as ``TRAFFIC``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.ops import bench_of
from minisora_kernels.__main__ import ops

Passes = float | Callable[[dict[str, Any]], float]


class Traffic(NamedTuple):
    """Per tensor a number, or what computes it from the arguments and results of the op by name."""

    read: dict[str, Passes]
    written: dict[str, Passes]


@cache
def table() -> dict[str, Traffic]:
    """Of every raw op, as the benches have it."""
    return {name: row for op in ops() for name, row in bench_of(op).TRAFFIC.items()}


# The names of results that have none in their schema.
RETURNS = {
    "gate_residual_fwd": "y",
    "guided_step_fwd": "y",
    "patch_embed_fwd": "y",
    "unpatchify_fwd": "video",
    "unpatchify_bwd": "dtokens",
}


def named(name: str, arguments: Sequence[Any], result: Any) -> dict[str, Any]:
    """What goes into and comes out of raw op ``name``, by the names of its schema."""
    schema = getattr(torch.ops.minisora_triton, name).default._schema
    results = result if isinstance(result, (tuple, list)) else (result,)
    names = [argument.name for argument in schema.arguments] + [r.name or RETURNS[name] for r in schema.returns]
    return dict(zip(names, [*arguments, *results], strict=True))


def passes(way: dict[str, Passes], values: dict[str, Any]) -> dict[str, float]:
    return {key: times(values) if callable(times) else times for key, times in way.items()}


def bytes_moved(name: str, values: dict[str, Any], scratch: int) -> dict[str, int]:
    """``must``: bytes if every tensor passed once. ``does``: as often as the table says, and ``scratch`` twice."""
    traffic = [passes(way, values) for way in table()[name]]
    must, does = 0, 0.0
    for key, tensor in values.items():
        if isinstance(tensor, Tensor):
            times = [way[key] for way in traffic if key in way]
            must += tensor.nbytes
            does += tensor.nbytes * (sum(times) if times else 1)
    return {"must": must, "does": round(does) + 2 * scratch}
