"""``unpatchify``: tokens back to a video."""

from __future__ import annotations

from math import prod

import torch

import minisora_kernels as mk
from bench.gpu.traffic import Traffic
from bench.harness.session import Problem, Random, cases
from bench.harness.shapes import Patches, latents, video_patches

SHAPES = tuple(
    video_patches(channels, latents(16, side, side), (1, 2, 2), quick=(channels, side) == (8, 256))
    for channels in (4, 8)  # 8: with a learned variance
    for side in (256, 512)
)

TRAFFIC = {
    "unpatchify_fwd": Traffic({"tokens": 1}, {"video": 1}),
    "unpatchify_bwd": Traffic({"dvideo": 1}, {"dtokens": 1}),
}


def problem(shape: Patches, dtype: torch.dtype, device: torch.device) -> Problem:
    tokens = Random(dtype, device)(shape.batch, prod(shape.grid), prod(shape.patch) * shape.channels)
    return Problem(
        {"tokens": tokens},
        lambda t: mk.unpatchify(t["tokens"], shape.grid, shape.patch, shape.channels),
        unread=["tokens"],
    )


@cases(SHAPES)
def test_unpatchify(bench, shape: Patches, dtype: str, direction: str):
    bench("unpatchify", problem, shape, dtype, direction)
