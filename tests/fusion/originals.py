"""Blocks and final layers of DiT, SiT, Latte and STDiT, as their authors' code writes the formulas."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def modulate_frames(norm, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """STDiT: in the norm's dtype, and back."""
    dtype = x.dtype
    return (norm(x.float()) * (scale + 1) + shift).to(dtype)


class TimestepEmbedder(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(16, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Tensor) -> Tensor:
        freqs = torch.exp(-math.log(10000) * torch.arange(8, device=t.device, dtype=t.dtype) / 8)
        angles = t[:, None] * freqs[None]
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))


class Attention(nn.Module):
    """As timm has it: packed qkv, SDPA or, in Latte's mode ``math``, written out."""

    def __init__(self, dim: int, heads: int, written_out: bool = False) -> None:
        super().__init__()
        self.heads, self.written_out = heads, written_out
        self.scale = (dim // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        if self.written_out:
            attn = (q @ k.transpose(-2, -1)) * self.scale
            x = self.attn_drop(attn.softmax(dim=-1)) @ v
        else:
            x = F.scaled_dot_product_attention(q, k, v)
        return self.proj_drop(self.proj(x.transpose(1, 2).reshape(b, n, c)))


class Mlp(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1, self.act, self.drop = nn.Linear(dim, 4 * dim), nn.GELU(approximate="tanh"), nn.Dropout(0.0)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class DiTBlock(nn.Module):
    def __init__(self, dim: int, heads: int, written_out: bool = False) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn, self.mlp = Attention(dim, heads, written_out), Mlp(dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_msa.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_msa, scale_msa))
        return x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class FinalLayer(nn.Module):
    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(dim, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class DiT(nn.Module):
    """Images ``[B, C, H, W]``; SiT has the same network and other targets."""

    def __init__(self, dim: int = 32, heads: int = 4, depth: int = 2, patch: int = 2, channels: int = 4) -> None:
        super().__init__()
        self.patch, self.channels = patch, channels
        self.x_embedder = nn.Conv2d(channels, dim, kernel_size=patch, stride=patch)
        self.t_embedder, self.y_embedder = TimestepEmbedder(dim), nn.Embedding(11, dim)
        self.blocks = nn.ModuleList([DiTBlock(dim, heads) for _ in range(depth)])
        self.final_layer = FinalLayer(dim, patch * patch * channels)

    def unpatchify(self, x: Tensor) -> Tensor:
        h = w = int(x.shape[1] ** 0.5)
        x = x.reshape(x.shape[0], h, w, self.patch, self.patch, self.channels)
        x = torch.einsum("nhwpqc->nchpwq", x)
        return x.reshape(x.shape[0], self.channels, h * self.patch, w * self.patch)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x = self.x_embedder(x).flatten(2).transpose(1, 2)
        c = self.t_embedder(t) + self.y_embedder(y)
        for block in self.blocks:
            x = block(x, c)
        return self.unpatchify(self.final_layer(x, c))


class Latte(nn.Module):
    """Clips ``[B, F, C, H, W]``: blocks over the tokens of a frame and over the frames of a place, in turns."""

    def __init__(self, dim: int = 32, heads: int = 4, depth: int = 2, written_out: bool = False) -> None:
        super().__init__()
        self.x_embedder = nn.Conv2d(4, dim, kernel_size=2, stride=2)
        self.t_embedder = TimestepEmbedder(dim)
        self.blocks = nn.ModuleList([DiTBlock(dim, heads, written_out) for _ in range(depth)])
        self.final_layer = FinalLayer(dim, 16)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        batch, frames = x.shape[:2]
        x = self.x_embedder(x.flatten(0, 1)).flatten(2).transpose(1, 2)
        space, dim = x.shape[1:]
        c = self.t_embedder(t)
        c_space, c_time = c.repeat_interleave(frames, 0), c.repeat_interleave(space, 0)
        for spatial, temporal in zip(self.blocks[::2], self.blocks[1::2], strict=True):
            x = spatial(x, c_space)
            x = x.view(batch, frames, space, dim).permute(0, 2, 1, 3).reshape(batch * space, frames, dim)
            x = temporal(x, c_time)
            x = x.view(batch, space, frames, dim).permute(0, 2, 1, 3).reshape(batch * frames, space, dim)
        return self.final_layer(x, c_space)


class STDiTBlock(nn.Module):
    """Open-Sora's: one table of rows per block, attention over a frame or over time, then text."""

    def __init__(self, dim: int, heads: int, temporal: bool) -> None:
        super().__init__()
        self.temporal, self.heads = temporal, heads
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn, self.mlp = Attention(dim, heads), Mlp(dim)
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.scale_shift_table = nn.Parameter(torch.randn(6, dim) / dim**0.5)

    def cross(self, x: Tensor, text: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(text).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, text: Tensor, t: Tensor, frames: int) -> Tensor:
        b, n, c = x.shape
        table = self.scale_shift_table[None] + t.reshape(b, 6, -1)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = table.chunk(6, dim=1)
        h = modulate_frames(self.norm1, x, shift_msa, scale_msa)
        h = h.view(b, frames, n // frames, c)
        if self.temporal:
            h = self.attn(h.transpose(1, 2).reshape(-1, frames, c)).view(b, n // frames, frames, c).transpose(1, 2)
        else:
            h = self.attn(h.reshape(b * frames, -1, c))
        x = x + gate_msa * h.reshape(b, n, c)
        x = x + self.cross(x, text)
        return x + gate_mlp * self.mlp(modulate_frames(self.norm2, x, shift_mlp, scale_mlp))


class STDiT(nn.Module):
    def __init__(self, dim: int = 32, heads: int = 4, depth: int = 2) -> None:
        super().__init__()
        self.x_embedder = nn.Conv3d(4, dim, kernel_size=(1, 2, 2), stride=(1, 2, 2))
        self.t_embedder = TimestepEmbedder(dim)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList([STDiTBlock(dim, heads, bool(i % 2)) for i in range(depth)])
        self.norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.table, self.linear = nn.Parameter(torch.randn(2, dim) / dim**0.5), nn.Linear(dim, 16)

    def forward(self, x: Tensor, text: Tensor, t: Tensor) -> Tensor:
        frames = x.shape[2]
        x = self.x_embedder(x).flatten(2).transpose(1, 2)
        t = self.t_embedder(t)
        rows = self.t_block(t)
        for block in self.blocks:
            x = block(x, text, rows, frames)
        shift, scale = (self.table[None] + t[:, None]).chunk(2, dim=1)
        return self.linear(modulate_frames(self.norm, x, shift, scale))
