"""Small inputs for every op: each case is run on every backend, dtype and check of test_ops.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import torch
from conftest import DEVICE

from minisora_kernels import backends
from minisora_kernels.verify import cases as build
from minisora_kernels.verify.cases import Case, random_tensors


def _adaln_family(draw: int) -> Iterator[Case]:
    random = random_tensors(100 * draw)
    # name, B, N, D, rows of gate, rows of shift and scale, affine, norm, dtypes
    table: list[tuple] = [
        ("per-sample", 2, 17, 96, 1, 1, False, "layer", {}),
        ("one-token", 3, 1, 8, 1, 1, False, "layer", {}),
        ("per-frame", 2, 4 * 33, 40, 4, 4, False, "layer", {}),
        ("per-token", 2, 19, 24, 19, 19, False, "rms", {}),
        ("mixed-rows", 2, 12, 16, 1, 4, False, "layer", {}),
        ("lcm-rows", 1, 12, 16, 6, 4, True, "layer", {}),
        ("odd-width", 3, 257, 7, 1, 1, True, "layer", {}),
        ("width-one", 2, 5, 1, 1, 1, False, "rms", {}),
        ("long", 1, 1590, 72, 1, 1, True, "layer", {}),
        ("a-clip", 1, 16384, 8, 1, 1, True, "layer", {}),
        ("a-clip-of-mixed-rows", 1, 8192, 8, 1, 8192, False, "layer", {}),
        ("rows-over-chunks", 2, 3 * 100, 33, 3, 3, True, "rms", {}),
        ("model-width", 2, 70, 1152, 1, 1, False, "layer", {}),
        ("fp32-modulation", 2, 65, 48, 1, 1, True, "layer", dict.fromkeys(("shift", "scale", "gate"), torch.float32)),
        ("fp32-stream", 2, 65, 48, 1, 1, False, "layer", {"x": torch.float32}),
        ("empty-batch", 0, 5, 16, 1, 1, True, "layer", {}),
        ("no-tokens", 2, 0, 16, 1, 1, True, "layer", {}),
    ]
    for row in table:
        yield from build.modulated(random, *row)


def _window_attention(draw: int) -> Iterator[Case]:
    random = random_tensors(1 + 100 * draw)
    # name, B, grid, window, heads, head_dim, norm, weights, rope, bias
    table: list[tuple] = [
        ("temporal", 2, (5, 2, 3), (5, 1, 1), 2, 8, None, None, None, False),
        ("temporal-16-72", 1, (16, 1, 2), (16, 1, 1), 2, 72, "rms", 1, "interleaved", False),
        ("spatial", 3, (2, 3, 4), (1, 3, 4), 2, 16, "layer", 2, "half", False),
        ("joint", 2, (2, 3, 5), (2, 3, 5), 1, 40, "rms", None, "interleaved", False),
        ("ragged", 2, (5, 7, 6), (2, 3, 4), 2, 8, "rms", 1, "half", True),
        ("identity", 2, (2, 2, 3), (1, 1, 1), 2, 8, None, None, None, False),
        ("bias", 2, (1, 6, 6), (1, 3, 3), 3, 24, None, None, None, True),
        ("long", 1, (1, 1, 257), (1, 1, 257), 1, 64, None, None, "interleaved", False),
        ("long-bias", 1, (2, 9, 10), (2, 9, 10), 2, 16, "layer", 2, None, True),
        ("empty-batch", 0, (2, 2, 2), (2, 1, 1), 2, 8, None, None, None, False),
    ]
    for row in table:
        yield build.window_attention(random, *row)


def _patch_embed(draw: int) -> Iterator[Case]:
    random = random_tensors(2 + 100 * draw)
    # name, B, C, size, patch, D, bias, pos
    table: list[tuple] = [
        ("latents", 2, 4, (3, 6, 10), (1, 2, 2), 24, True, True),
        ("tubelets", 3, 4, (4, 6, 6), (2, 2, 2), 40, True, True),
        ("pixels", 1, 3, (1, 16, 32), (1, 16, 16), 9, True, False),
        ("one-channel", 2, 1, (5, 3, 7), (1, 1, 1), 1, False, False),
        ("image", 2, 4, (6, 4), (2, 2), 33, True, True),
        ("frames", 2, 3, (2, 6, 4), (2, 2), 16, False, True),
        ("empty-batch", 0, 4, (2, 4, 4), (2, 2, 2), 8, True, True),
    ]
    for row in table:
        yield build.patch_embed(random, *row)


def _unpatchify(draw: int) -> Iterator[Case]:
    random = random_tensors(3 + 100 * draw)
    # name, B, grid, patch, C
    for row in [
        ("video", 2, (3, 2, 5), (2, 2, 2), 4),
        ("latents", 3, (2, 3, 3), (1, 2, 2), 8),
        ("one-channel", 1, (5, 1, 7), (1, 4, 4), 1),
        ("image", 2, (3, 4), (2, 2), 3),
        ("empty-batch", 0, (1, 2, 2), (1, 2, 2), 4),
    ]:
        yield build.unpatchify(random, *row)


def _guided_step(draw: int) -> Iterator[Case]:
    random = random_tensors(5 + 100 * draw)
    half = torch.bfloat16
    # name, latents, guided channels, variance learned, guidance, z, a row a sample, dtypes
    table: list[tuple] = [
        ("euler", (2, 4, 3, 6, 10), None, False, True, False, False, {}),
        ("heun", (3, 3, 2, 4, 4), None, False, True, True, False, {}),
        ("ddpm", (1, 4, 5, 7, 3), None, False, False, True, True, {}),
        ("ddpm-learned", (3, 4, 3, 6, 5), 3, True, True, True, True, {}),
        ("ddim-learned", (2, 3, 6, 4), 2, True, True, False, False, {}),
        ("learned-unguided", (2, 3, 6, 4), None, True, False, True, False, {}),
        ("no-cells", (2, 3), 1, True, True, True, True, {}),
        ("a-clip", (2, 4, 16, 16, 17), 3, True, True, True, True, {}),
        ("bf16-prediction", (2, 4, 3, 8, 8), None, True, True, True, True, {"cond": half, "null": half}),
        ("bf16-state", (2, 4, 3, 8, 8), None, True, True, True, True, {"x": half, "z": half}),
        ("empty-batch", (0, 4, 2, 3), None, False, True, True, True, {}),
        ("no-pixels", (2, 4, 0, 3), None, False, True, True, True, {}),
    ]
    for row in table:
        yield build.guided_step(random, *row)


def _gelu_mlp(draw: int) -> Iterator[Case]:
    random = random_tensors(4 + 100 * draw)
    # name, shape of x, hidden, D_out, biases
    for row in [
        ("tokens", (2, 17, 32), 128, 32, True),
        ("odd-widths", (2, 17, 24), 90, 7, True),
        ("no-bias", (3, 5, 8), 33, 7, False),
        ("flat", (31, 16), 64, 16, True),
        ("vector", (12,), 20, 12, True),
        ("empty-batch", (0, 4, 8), 32, 8, True),
    ]:
        yield build.gelu_mlp(random, *row)


def _grn(draw: int) -> Iterator[Case]:
    random = random_tensors(6 + 100 * draw)
    single = dict.fromkeys(("weight", "bias"), torch.float32)
    # name, B, N, C, groups, activation, dtypes
    table: list[tuple] = [
        ("frames", 2, 3 * 20, 24, 3, None, {}),
        ("gelu", 2, 3 * 20, 24, 3, "gelu", {}),
        ("odd", 3, 35, 7, 1, None, {}),
        ("odd-gelu", 3, 35, 77, 5, "gelu", {}),
        ("width-one", 2, 5, 1, 1, "gelu", {}),
        ("one-site", 1, 4, 40, 4, "gelu", {}),
        ("sites-over-chunks", 2, 2 * 150, 33, 2, "gelu", {}),
        ("wide", 1, 2 * 9, 2048, 2, None, {}),
        ("fp32-weights", 2, 65, 48, 1, "gelu", single),
        ("fp32-stream", 2, 30, 48, 2, None, {"x": torch.float32, "bias": torch.float32}),
        ("many-frames", 1, 120, 8, 40, "gelu", {}),
        ("a-clip", 1, 16 * 576, 64, 16, "gelu", {}),
        ("empty-batch", 0, 6, 16, 2, "gelu", {}),
        ("no-tokens", 2, 0, 16, 1, None, {}),
    ]
    for row in table:
        yield build.grn(random, *row)


FAMILIES = (_adaln_family, _window_attention, _patch_embed, _unpatchify, _guided_step, _gelu_mlp, _grn)
FAMILIES += tuple(file.cases for file in build.files_of_ops())


@cache
def drawn(draw: int) -> dict[str, Case]:
    """Every case by its name, with other numbers for every ``draw``."""
    return {str(case): replace(case, device=DEVICE) for family in FAMILIES for case in family(draw)}


CASES = list(drawn(0).values())
# Triton's interpreter takes milliseconds for a program: the longest are for the chunks and threads of a CPU.
# tests/ops/test_triton.py has the widths of models on few tokens.
if backends.INTERPRETED:
    CASES = [case for case in CASES if max(tensor.numel() for tensor in case.tensors.values()) <= 50_000]
