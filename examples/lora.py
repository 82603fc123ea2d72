"""A training loop with LoRA on attention: a layer of one's own, as peft's are, put in before the ops.

    python examples/lora.py

A Linear with an adapter is called as it is: the pass reads what runs, never a weight by its name. So the adapter may
come before the ops or after them, from peft too.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from dit import DiT
from torch import Tensor, nn

import minisora_kernels as mk


class LoRA(nn.Module):
    """``base(x) + b(a(x)) * alpha / rank``; the base is frozen."""

    def __init__(self, base: nn.Linear, rank: int = 4, alpha: float = 8.0) -> None:
        super().__init__()
        self.base, self.scaling = base.requires_grad_(False), alpha / rank
        self.a = nn.Linear(base.in_features, rank, bias=False)
        self.b = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.b.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.b(self.a(x)) * self.scaling


def main() -> None:
    torch.manual_seed(0)
    model = DiT().requires_grad_(False)
    for block in model.blocks:
        block.attn.qkv, block.attn.proj = LoRA(block.attn.qkv), LoRA(block.attn.proj)
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    clean = torch.randn(8, 4, 16, 16)
    with mk.fuse(model) as fused:
        losses = []
        for _ in range(8):
            t, noise = torch.rand(8), torch.randn(8, 4, 16, 16)
            mixed = torch.lerp(clean, noise, t[:, None, None, None])
            loss = F.mse_loss(model(mixed, t), noise - clean)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    print(fused.report())
    print(f"{sum(each.numel() for each in trained)} parameters trained, loss: {losses[0]:.3f} to {losses[-1]:.3f}")


if __name__ == "__main__":
    main()
