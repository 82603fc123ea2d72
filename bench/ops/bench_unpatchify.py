"""``unpatchify``: tokens back to a video."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from math import prod

import torch

import minisora_kernels as mk
from bench.gpu.launches import Launch, meta
from bench.gpu.traffic import Traffic
from bench.harness.session import Problem, Random, cases
from bench.harness.shapes import Patches, Triple, latents, video_patches

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


def _tokens(channels: int, patch: Triple, dtype: torch.dtype, channels_first: bool = False) -> Problem:
    grid = (4, 8, 8)
    tensors = {"tokens": meta(dtype, 2, prod(grid), prod(patch) * channels)}
    return Problem(tensors, lambda t: mk.unpatchify(t["tokens"], grid, patch, channels, channels_first=channels_first))


def launches() -> Iterator[Launch]:
    for channels in (1, 3, 4, 8, 16, 32, 96):
        yield Launch(f"C {channels}", partial(_tokens, channels, (1, 2, 2)))
    for patch in ((1, 1, 1), (2, 2, 2), (1, 16, 16)):
        yield Launch(f"patch {patch}", partial(_tokens, 3, patch))
    for channels in (3, 16):
        yield Launch(f"channels first {channels}", partial(_tokens, channels, (1, 2, 2), channels_first=True))


# Small and odd: what the sanitizer runs.
ODD = (Patches("odd", 5, (3, 6, 10), (1, 2, 2), batch=2),)
# Small: what a call of them costs the host.
HOST = (Patches("", 4, (2, 8, 8), (1, 2, 2), width=64),)
LAUNCHES = tuple(launches())


@cases(SHAPES)
def test_unpatchify(bench, shape: Patches, dtype: str, direction: str):
    bench("unpatchify", problem, shape, dtype, direction)
