"""unpatchify in Triton's interpreter: frames and channels of more than one tile, and gradients of any strides."""

from __future__ import annotations

import importlib

import pytest
import torch
from conftest import on_triton

from minisora_kernels import unpatchify

pytestmark = on_triton


@pytest.mark.parametrize(
    ("grid", "patch", "channels"),
    [((2, 3, 5), (2, 3, 2), 3), ((1, 2, 4), (1, 4, 4), 5), ((3, 2, 3), (1, 2, 1), 9), ((1, 1, 1), (1, 1, 1), 1)],
)
def test_tiles_of_a_few_elements_copy_the_same_bits(grid, patch, channels, monkeypatch, nan_filled):
    launcher = importlib.import_module("minisora_kernels.triton.unpatchify")
    monkeypatch.setattr(launcher, "MAX_CHANNELS", 4)
    monkeypatch.setattr(launcher, "ELEMENTS", 64)
    results = []
    for backend in ("reference", "triton"):
        tokens = torch.arange(2 * torch.Size(grid + patch).numel() * channels).float()
        tokens = tokens.view(2, torch.Size(grid).numel(), -1).requires_grad_()
        video = unpatchify(tokens, grid, patch, channels, backend=backend)
        video.backward(torch.arange(video.numel()).view(video.shape).float())
        results.append((video, tokens.grad))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


def test_a_gradient_of_any_strides():
    grid, patch, channels = (2, 3, 5), (1, 2, 2), 3
    gradients = [
        torch.randn(10, 6, 2, 3, 2).permute(4, 3, 2, 1, 0),
        torch.randn(2, 3, 4, 9, 20)[:, :, ::2, 1:7, ::2],
        torch.randn(1, 3, 1, 6, 1).expand(2, -1, 2, -1, 10),
    ]
    for gradient in gradients:
        ours = torch.ops.minisora_triton.unpatchify_bwd(gradient, *patch, False)
        tokens = torch.zeros(2, 30, 12, requires_grad=True)
        unpatchify(tokens, grid, patch, channels, backend="reference").backward(gradient)
        assert torch.equal(ours, tokens.grad)
