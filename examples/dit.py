"""Training of a DiT as its authors' code writes it: the model stays as it is, and the ops are put in by one line.

python examples/dit.py
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import minisora_kernels as mk


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(approximate="tanh"), nn.Linear(4 * dim, dim))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))


class DiT(nn.Module):
    def __init__(self, dim: int = 64, heads: int = 4, depth: int = 2) -> None:
        super().__init__()
        self.patches = nn.Conv2d(4, dim, kernel_size=2, stride=2)
        self.time = nn.Linear(1, dim)
        self.blocks = nn.ModuleList([Block(dim, heads) for _ in range(depth)])
        self.out = nn.Linear(dim, 16)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.patches(x).flatten(2).transpose(1, 2)
        c = self.time(t[:, None])
        for block in self.blocks:
            h = block(h, c)
        return F.pixel_shuffle(self.out(h).transpose(1, 2).unflatten(2, (x.shape[2] // 2, -1)), 2)


def main() -> None:
    torch.manual_seed(0)
    model = DiT()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    fused = mk.fuse(model)
    clean = torch.randn(8, 4, 16, 16)
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
    print(f"loss: {losses[0]:.3f} to {losses[-1]:.3f}")
    fused.undo()


if __name__ == "__main__":
    main()
