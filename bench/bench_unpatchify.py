"""``unpatchify``: tokens back to a video."""

from __future__ import annotations

from math import prod

import torch

import minisora_kernels as mk
from bench.harness import Problem, Random, cases
from bench.shapes import UNPATCHIFY, Patches


def problem(shape: Patches, dtype: torch.dtype, device: torch.device) -> Problem:
    tokens = Random(dtype, device)(shape.batch, prod(shape.grid), prod(shape.patch) * shape.channels)
    return Problem(
        {"tokens": tokens},
        lambda t: mk.unpatchify(t["tokens"], shape.grid, shape.patch, shape.channels),
        unread=["tokens"],
    )


@cases(UNPATCHIFY)
def test_unpatchify(bench, shape: Patches, dtype: str, direction: str):
    bench("unpatchify", problem, shape, dtype, direction)
