"""``patch_embed``: bias and positions given; the video is data and gets no gradient, as in training.

The reference is a gather and one Linear. ``Conv3d`` is what code bases write; its output, whose tokens are strided, is
made contiguous within its time, for everything downstream pays for that otherwise.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import minisora_kernels as mk
from bench.gpu.traffic import Traffic
from bench.harness.session import Problem, Random, cases
from bench.harness.shapes import Patches, latents, video_patches

SHAPES = (
    *(
        video_patches(4, latents(16, side, side), patch, quick=(side, patch) == (256, (1, 2, 2)))
        for side in (256, 512)
        for patch in ((1, 2, 2), (2, 2, 2))
    ),
    video_patches(3, (16, 64, 64), (2, 4, 4)),
    video_patches(3, (16, 256, 256), (1, 16, 16)),
)


def _video(values: dict[str, Any]) -> int:
    """Once per block of columns."""
    from minisora_kernels.triton import patch_embed

    return -(-values["weight"].shape[0] // patch_embed.COLUMNS)


def _dy(values: dict[str, Any]) -> int:
    """Once per block of elements of a patch for dweight and dbias, and for dx; once for dpos."""
    from minisora_kernels.triton import patch_embed

    def blocks(most: int) -> int:
        return -(-values["weight"][0].numel() // patch_embed.elements_of(values["weight"], most))

    passes = blocks(patch_embed.WEIGHT_ELEMENTS) + (values["pos"] is not None)
    return passes + values["need_x"] * blocks(patch_embed.VIDEO_ELEMENTS)


TRAFFIC = {
    # What is read more than once comes mostly from the caches.
    "patch_embed_fwd": Traffic({"x": _video}, {"y": 1}),
    "patch_embed_bwd": Traffic({"x": _video, "dy": _dy}, {"dx": lambda values: int(values["need_x"])}),
}


def problem(shape: Patches, dtype: torch.dtype, device: torch.device) -> Problem:
    random = Random(dtype, device)
    elements = shape.channels * prod(shape.patch)
    inputs = {
        "x": random(shape.batch, shape.channels, *shape.size),
        "weight": random(shape.width, shape.channels, *shape.patch, scale=elements**-0.5),
        "bias": random(shape.width),
        "pos": random(prod(shape.grid), shape.width),
    }

    def conv3d(t: dict[str, Tensor]) -> Tensor:
        y = F.conv3d(t["x"], t["weight"], t["bias"], stride=shape.patch)
        return (y.flatten(2).transpose(1, 2) + t["pos"]).contiguous()

    return Problem(inputs, lambda t: mk.patch_embed(**t), ["x"], ("Conv3d", conv3d), unread=["bias", "pos"])


@cases(SHAPES)
def test_patch_embed(bench, shape: Patches, dtype: str, direction: str):
    bench("patch_embed", problem, shape, dtype, direction)
