"""What the backward computes again, and what it finds kept."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from minisora_kernels import use_backend
from minisora_kernels.counters import Counter
from models.denoisers.dit import DiT, DiTConfig
from models.plan import Alive
from models.runtime.recompute import Checkpointing
from models.training.config import TrainConfig

# Windows of 256 tokens, for which plain PyTorch has one op.
CONFIG = DiTConfig(input_size=(4, 16, 16), patch=(1, 2, 2), width=64, depth=3, heads=4, channels=4, num_classes=3)


def step(model: nn.Module, checkpointing: Checkpointing, backend: str) -> tuple[int, int, list[torch.Tensor]]:
    """FLOPs of products in a step, the bytes that it keeps for its backward, and the gradients."""
    model.checkpointing = checkpointing
    model.zero_grad()
    torch.manual_seed(1)
    x, t, y = torch.randn(2, 4, 4, 16, 16), torch.rand(2) * 1000, torch.tensor([0, 1])
    with use_backend(backend), Counter() as counter, Alive() as alive:
        loss = model(x, t, y).square().mean()
        kept = alive.now
        loss.backward()
    return counter.flops, kept, [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_what_is_kept_is_not_computed_again(backend: str):
    torch.manual_seed(0)
    model = DiT(CONFIG)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    found = {kind: step(model, kind, backend) for kind in (False, "products", "attention", True)}
    flops, kept, gradients = zip(*found.values(), strict=True)
    assert flops[0] == flops[1] < flops[2] < flops[3]
    assert kept[0] > kept[1] > kept[2] > kept[3]
    for others in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients[0], others, strict=True))


def test_keeping_needs_checkpointing():
    with pytest.raises(ValueError, match="checkpointing_keeps is 'products'; without checkpointing it must be"):
        TrainConfig(checkpointing_keeps="products")
