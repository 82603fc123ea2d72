"""``patch_embed``: bias and positions given; the video is data and gets no gradient, as in training.

The reference is a gather and one Linear. ``Conv3d`` is what code bases write; its output, whose tokens are strided, is
made contiguous within its time, for everything downstream pays for that otherwise.
"""

from __future__ import annotations

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

import minisora_kernels as mk
from bench.harness import Problem, Random, cases
from bench.shapes import PATCH_EMBED, Patches


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


@cases(PATCH_EMBED)
def test_patch_embed(bench, shape: Patches, dtype: str, direction: str):
    bench("patch_embed", problem, shape, dtype, direction)
