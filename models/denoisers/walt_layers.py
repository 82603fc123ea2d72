"""The layers of W.A.L.T; the equations are in ``walt.py``."""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minisora_kernels import (
    adaln,
    gate_residual,
    gate_residual_adaln,
    recompute_adaln,
    window_attention,
)

from ..parallel import sequence
from .layers import MLP, Grid, Modulation, Scale, outputs_from
from .walt_config import WALTConfig


def relative_places(window: Grid) -> Tensor:
    """``[L, L]``, int64: of query i and key j, the row of ``[(2 wt - 1) (2 wh - 1) (2 ww - 1)]`` for their offset."""
    places = torch.cartesian_prod(*(torch.arange(n) for n in window)).reshape(-1, 3)
    sizes = torch.tensor(window)
    t, h, w = (places[:, None] - places + sizes - 1).unbind(-1)
    return (t * (2 * window[1] - 1) + h) * (2 * window[2] - 1) + w


def heads_of_all_tokens(x: Tensor, pieces: int) -> Tensor:
    """``[B, n, c, heads, d]`` of this rank's of ``pieces`` of the tokens, as ``[B, N, c, own heads, d]``."""
    x = x.unflatten(1, (sequence.part(pieces), -1))
    return sequence.swap(x, split=4, join=1, count=pieces).flatten(1, 2)


def tokens_of_all_heads(x: Tensor, heads: int, pieces: int) -> Tensor:
    """``[B, N, own heads, d]`` as ``[B, n, heads d]``."""
    x = x.unflatten(1, (pieces, -1))
    return sequence.swap(x, split=1, join=3, count=heads).flatten(3).flatten(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention in windows, with QK-norm and a learned bias for each relative position."""

    places: Tensor

    def __init__(self, config: WALTConfig, layer: int) -> None:
        super().__init__()
        self.grid, self.window, self.heads = config.grid, config.window(layer), config.heads
        self.spatial = layer % 2 == 0
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.proj = nn.Linear(config.width, config.width)
        self.q_norm, self.k_norm = (Scale(config.width // config.heads) for _ in range(2))
        self.bias_table = nn.Parameter(torch.empty(config.heads, math.prod(2 * n - 1 for n in self.window)))
        self.register_buffer("places", relative_places(self.window), persistent=False)

    def forward(self, x: Tensor, pieces: int) -> Tensor:
        # Ranks that divide the tokens exchange them for heads: windows and padding stay as they are.
        qkv = heads_of_all_tokens(self.qkv(x).unflatten(-1, (3, self.heads, -1)), pieces)
        # The backward of embedding sums in a fixed order, which that of indexing need not.
        bias = F.embedding(self.places, self.bias_table.t()).permute(2, 0, 1)
        bias = sequence.own(bias, 0)
        _, h, w = self.grid
        grid = (qkv.shape[1] // (h * w), h, w) if self.spatial else self.grid
        tokens = math.prod(grid)
        weights = self.q_norm.weight, self.k_norm.weight
        out = window_attention(
            qkv[:, :tokens], grid, self.window, q_weight=weights[0], k_weight=weights[1], qk_norm="layer", bias=bias
        )
        # Images: what attends to itself alone gets its own v.
        alone = qkv[:, tokens:, 2].flatten(2)
        out = torch.cat((out, alone), dim=1) if alone.shape[1] else out
        return self.proj(tokens_of_all_heads(out.unflatten(-1, (qkv.shape[3], -1)), self.heads, pieces))


class CrossAttention(nn.Module):
    """Attention of each token to its own window and to the text; plain PyTorch.

    Keys and values are of the same projection for tokens and text. Edge windows are padded, the padding is masked.
    """

    def __init__(self, config: WALTConfig, layer: int) -> None:
        super().__init__()
        self.grid, self.window, self.heads = config.grid, config.window(layer), config.heads
        width, head_dim = config.width, config.width // config.heads
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.q_norm, self.k_norm = (nn.LayerNorm(head_dim, eps=1e-6, bias=False) for _ in range(2))

    def forward(self, x: Tensor, text: Tensor, mask: Tensor, pieces: int) -> Tensor:
        """``x [B, n, D]``; text ``[B, S, L, D]`` and its mask ``[B, S, L]``, S = 1, or one text a frame."""
        qkv = heads_of_all_tokens(self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)), pieces)
        batch, tokens, _, heads, head_dim = qkv.shape
        q, k, v = self._to_windows(qkv.flatten(2)).unflatten(-1, (3, heads, head_dim)).unbind(-3)
        windows = k.shape[1]
        more = outputs_from(self.qkv, text, x.shape[-1]).unflatten(-1, (2, self.heads, head_dim))
        more = sequence.own(more, -2).repeat_interleave(windows // text.shape[1], dim=1)
        text_k, text_v = more.unbind(-3)
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(torch.cat((k, text_k), dim=2)).to(v.dtype)
        v = torch.cat((v, text_v), dim=2)
        inside = self._to_windows(mask.new_ones(batch, tokens, 1)).squeeze(-1)
        allowed = torch.cat((inside, mask.repeat_interleave(windows // mask.shape[1], dim=1)), dim=2)
        q, k, v = (part.flatten(0, 1).transpose(1, 2) for part in (q, k, v))  # [B windows, heads, L, head_dim]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed.flatten(0, 1)[:, None, None])
        out = self._to_tokens(out.transpose(1, 2).flatten(2).unflatten(0, (batch, windows)), tokens)
        return self.proj(tokens_of_all_heads(out.unflatten(-1, (heads, head_dim)), self.heads, pieces))

    def _to_windows(self, x: Tensor) -> Tensor:
        """``[B, N, D]`` as ``[B, windows, wt wh ww, D]``, padded with zeros."""
        x = x.unflatten(1, (-1, *self.grid[1:]))
        padding = [-n % size for n, size in zip(x.shape[1:4], self.window, strict=True)]
        x = F.pad(x, (0, 0, 0, padding[2], 0, padding[1], 0, padding[0]))
        for axis in (2, 1, 0):
            x = x.unflatten(1 + axis, (-1, self.window[axis]))
        return x.permute(0, 1, 3, 5, 2, 4, 6, 7).flatten(4, 6).flatten(1, 3)

    def _to_tokens(self, x: Tensor, tokens: int) -> Tensor:
        """Back from :meth:`_to_windows`, without the padding."""
        _, h, w = self.grid
        counts = [-1, *(-(-n // size) for n, size in zip((h, w), self.window[1:], strict=True))]
        x = x.unflatten(2, self.window).unflatten(1, counts).permute(0, 1, 4, 2, 5, 3, 6, 7)
        return x.flatten(5, 6).flatten(3, 4).flatten(1, 2)[:, :, :h, :w].flatten(1, 3)[:, :tokens]


class Block(nn.Module):
    """One layer. As DiT's block, it takes ``y`` normalised for its attention and leaves it so for what reads x next."""

    def __init__(self, config: WALTConfig, layer: int) -> None:
        super().__init__()
        self.attn = Attention(config, layer)
        sees_text = config.text_width and (config.cross_attention == "all" or layer % 2 == 0)
        self.cross = CrossAttention(config, layer) if sees_text else None
        self.mlp = MLP(config.width, int(config.width * config.mlp_ratio))

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        text: tuple[Tensor, Tensor] | None,
        own: Modulation,
        next_shift: Tensor,
        next_scale: Tensor,
        pieces: int,
        recompute_norms: bool = True,
    ) -> tuple[Tensor, Tensor]:
        with recompute_adaln(y, x, own.shift_msa, own.scale_msa) if recompute_norms else nullcontext():
            branch = self.attn(y, pieces)
        if self.cross is None:
            x, y = gate_residual_adaln(x, branch, own.gate_msa, own.shift_mlp, own.scale_mlp)
        else:
            assert text is not None
            x = gate_residual(x, branch, own.gate_msa)
            x = x + self.cross(x, *text, pieces)
            y = adaln(x, own.shift_mlp, own.scale_mlp)
        with recompute_adaln(y, x, own.shift_mlp, own.scale_mlp) if recompute_norms else nullcontext():
            branch = self.mlp(y)
        return gate_residual_adaln(x, branch, own.gate_mlp, next_shift, next_scale)


class Upsampler(nn.Module):
    """Frames at half the size to full size: a 3 x 3 convolution to 4 C channels, then depth to space."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, 4 * channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        frames = F.pixel_shuffle(self.proj(x.transpose(1, 2).flatten(0, 1)), 2)
        return frames.unflatten(0, (len(x), -1)).transpose(1, 2)
