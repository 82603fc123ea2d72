"""``patch_embed``: bias and positions given; the video is data and gets no gradient, as in training.

The reference is a gather and one Linear. ``Conv3d`` is what code bases write; its output, whose tokens are strided, is
made contiguous within its time, for everything downstream pays for that otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import minisora_kernels as mk
from bench.gpu.launches import TF32, Launch, meta
from bench.gpu.traffic import Traffic
from bench.harness.session import Problem, Random, cases
from bench.harness.shapes import Patches, Triple, latents, video_patches

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
    """Once per group of columns."""
    from minisora_kernels.triton import patch_embed

    weight = values["weight"]
    return -(-weight.shape[0] // patch_embed.columns_of(weight))


def _video_again(values: dict[str, Any]) -> int:
    """Once per block of columns."""
    from minisora_kernels.triton import patch_embed

    return -(-values["dweight"].shape[0] // patch_embed.COLUMNS)


def _dy(values: dict[str, Any]) -> int:
    """Once per block of elements of a patch for dweight and dbias; once for dpos."""
    from minisora_kernels.triton import patch_embed

    weight = values["dweight"]
    most = patch_embed.elements_of(weight, patch_embed.WEIGHT_ELEMENTS)
    return -(-weight[0].numel() // most) + (values["dpos"].numel() > 0)


def _dy_to_video(values: dict[str, Any]) -> int:
    """Once per block of elements of a patch."""
    from minisora_kernels.triton import patch_embed

    weight = values["weight"]
    return -(-weight[0].numel() // patch_embed.elements_of(weight, patch_embed.VIDEO_ELEMENTS))


TRAFFIC = {
    # What is read more than once comes mostly from the caches.
    "patch_embed_fwd": Traffic({"x": _video}, {"y": 1}),
    "patch_embed_bwd": Traffic({"x": _video_again, "dy": _dy}, {}),
    "patch_embed_video": Traffic({"dy": _dy_to_video}, {"dx": 1}),
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


def _patches(
    channels: int, patch: Triple, width: int, biased: bool, placed: bool, dtype: torch.dtype, batch: int = 2
) -> Problem:
    count = (2, 8, 8)
    size = [n * p for n, p in zip(count, patch, strict=True)]
    tensors = {"x": meta(dtype, batch, channels, *size), "weight": meta(dtype, width, channels, *patch)}
    if biased:
        tensors["bias"] = meta(dtype, width)
    if placed:
        tensors["pos"] = meta(dtype, prod(count), width)
    return Problem(tensors, lambda t: mk.patch_embed(**t))


def launches() -> Iterator[Launch]:
    # elements of a patch: 1, 16, 32, 64, 128 (on either side of a short one), 768; odd ones
    for channels, patch in (
        (1, (1, 1, 1)),
        (4, (1, 2, 2)),
        (4, (2, 2, 2)),
        (16, (1, 2, 2)),
        (16, (2, 2, 2)),
        (3, (1, 16, 16)),
        (3, (1, 14, 14)),
    ):
        yield Launch(f"C {channels} {patch}", partial(_patches, channels, patch, 1152, True, True))
    for biased, placed in ((True, False), (False, True), (False, False)):
        name = f"{'bias' if biased else 'no bias'}, {'pos' if placed else 'no pos'}"
        yield Launch(name, partial(_patches, 4, (1, 2, 2), 1152, biased, placed))
        yield Launch(f"{name}, pixels", partial(_patches, 3, (1, 16, 16), 1152, biased, placed))
    for patch in ((1, 2, 2), (1, 16, 16)):
        yield Launch(f"C 4 {patch} tf32", partial(_patches, 4, patch, 1152, True, True), TF32)
    yield Launch("D 33", partial(_patches, 4, (1, 2, 2), 33, True, True))
    yield Launch("D 3072, pixels", partial(_patches, 3, (1, 16, 16), 3072, True, True))
    yield Launch("D 5120, C 36", partial(_patches, 36, (1, 2, 2), 5120, True, True))
    yield Launch("D 33, pixels", partial(_patches, 3, (1, 16, 16), 33, True, True))


# Small and odd: what the sanitizer runs.
ODD = (
    Patches("latents", 3, (3, 6, 10), (1, 2, 2), width=40, batch=2),
    Patches("pixels", 3, (2, 48, 32), (1, 16, 16), width=40),
)
# Small: what a call of them costs the host.
HOST = (Patches("", 4, (2, 8, 8), (1, 2, 2), width=64),)
LAUNCHES = tuple(launches())


@cases(SHAPES)
def test_patch_embed(bench, shape: Patches, dtype: str, direction: str):
    bench("patch_embed", problem, shape, dtype, direction)
