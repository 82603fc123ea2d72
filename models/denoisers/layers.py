"""Layers that several denoisers share: embedders, attention, the MLP, modulations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minisora_kernels import patch_embed, window_attention
from minisora_kernels.modules import is_plain, mlp

from ..parallel import draws, sequence
from .text import Text, with_null

Grid = tuple[int, int, int]


def sincos(positions: Tensor, width: int) -> Tensor:
    """``[..., width]``, float64: sin, then cos, of ``position * 10000 ** (-2 i / width)`` for i < width / 2."""
    frequencies = 10_000.0 ** (-torch.arange(width // 2, dtype=torch.float64) / (width // 2))
    angles = positions.double()[..., None] * frequencies
    return torch.cat((angles.sin(), angles.cos()), dim=-1)


def grid_positions(grid: Grid, width: int, *, video: bool) -> Tensor:
    """Fixed position embedding ``[1, N, width]``, fp32: of the place in the frame, plus, for video, of the frame.

    The first half of a place's channels encodes the column and the second the row, as in Meta's DiT.
    """
    t, h, w = grid
    column = sincos(torch.arange(w), width // 2).expand(h, w, -1)
    row = sincos(torch.arange(h), width // 2)[:, None].expand(h, w, -1)
    positions = torch.cat((column, row), dim=-1).expand(t, h, w, width)
    if video:
        positions = positions + sincos(torch.arange(t), width)[:, None, None]
    return positions.reshape(1, t * h * w, width).float()


def concatenated_positions(grid: Grid, width: int) -> Tensor:
    """Fixed position embedding ``[1, N, width]``, fp32: a quarter of it is of the frame, the rest of the place.

    The width is a multiple of 16.
    """
    t, h, w = grid
    frames = sincos(torch.arange(t), width // 4).float().repeat_interleave(h * w, 0)
    places = grid_positions((1, h, w), width - width // 4, video=False)
    return torch.cat((frames[None], places.repeat(1, t, 1)), dim=-1)


def frame_positions(frames: int, width: int) -> Tensor:
    """Fixed position embedding of frames, ``[1, T, width]``, fp32."""
    return sincos(torch.arange(frames), width)[None].float()


def embed_patches(x: Tensor, convolution: nn.Conv2d | nn.Conv3d, pos: Tensor | None = None) -> Tensor:
    """Tokens ``[B, N, D]`` of a convolution whose kernel is its stride, plus positions."""
    if is_plain(convolution):
        return patch_embed(x, convolution.weight, convolution.bias, pos)
    tokens = convolution(x).flatten(2).transpose(1, 2)
    return tokens if pos is None else tokens + pos


def outputs_from(linear: nn.Linear, x: Tensor, first: int) -> Tensor:
    """A Linear's outputs from the ``first`` on; the others are not computed."""
    if is_plain(linear):
        return F.linear(x, linear.weight[first:], linear.bias[first:])
    return linear(x)[..., first:]


class PatchEmbedder(nn.Module):
    """Holds the convolution's parameters; the op reads them in place."""

    def __init__(self, channels: int, width: int, patch: tuple[int, ...]) -> None:
        super().__init__()
        convolution: Any = nn.Conv3d if len(patch) == 3 else nn.Conv2d
        self.proj = convolution(channels, width, patch, patch)

    def forward(self, x: Tensor, pos: Tensor) -> Tensor:
        return embed_patches(x, self.proj, pos)


class TimestepEmbedder(nn.Module):
    """Sinusoid of 256 channels [cos | sin] with periods up to 10^4, in fp32, then Linear, SiLU, Linear."""

    channels = 256

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    @staticmethod
    def sinusoid(t: Tensor) -> Tensor:
        """``[...]`` to ``[..., 256]``, fp32: cos, then sin, of ``t * 10000 ** (-i / 128)`` for i < 128."""
        places = torch.arange(128, device=t.device, dtype=torch.float32)
        angles = t.float()[..., None] * torch.exp(places * (-math.log(10_000.0) / 128))
        return torch.cat((angles.cos(), angles.sin()), dim=-1)

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        return self.mlp(self.sinusoid(t).to(dtype))


def drop_labels(y: Tensor, null_class: int, share: float) -> Tensor:
    """Classes of any shape, each replaced by the null class with probability ``share``."""
    return torch.where(draws.rand(y.shape, device=y.device) < share, null_class, y) if share > 0 else y


class LabelEmbedder(nn.Module):
    """A table of classes; its last row is the null class, which replaces dropped labels in training."""

    def __init__(self, num_classes: int, width: int, dropout: float) -> None:
        super().__init__()
        self.null_class = num_classes
        self.dropout = dropout
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(drop_labels(y, self.null_class, self.dropout if self.training else 0.0))


class PooledTextEmbedder(nn.Module):
    """One vector of a caption to the model's width; its null caption is learned, or a fixed vector with ``fixed``."""

    def __init__(self, text_width: int, width: int, dropout: float, *, fixed: bool) -> None:
        super().__init__()
        self.dropout = dropout
        self.output_projection = nn.Linear(text_width, width)
        self.null = nn.Parameter(torch.empty(text_width), requires_grad=not fixed)

    def forward(self, y: Text) -> Tensor:
        y = with_null(y, self.dropout if self.training else 0.0, self.null)
        return self.output_projection(y.states[:, 0])


class Scale(nn.Module):
    """Holds the weight of a norm, ``[width]``; the op that normalises reads it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))


class Attention(nn.Module):
    """Multi-head self-attention inside windows of the token grid.

    Args:
        width, heads: of the model.
        grid: tokens per axis.
        whole: for each axis of the grid, whether a window goes all along it; otherwise it is one token long.
        qk_norm: the norm of queries and keys.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        grid: Grid,
        whole: tuple[bool, bool, bool],
        qk_norm: Literal["rms", "layer"] | None = None,
    ) -> None:
        super().__init__()
        self.grid, self.whole = grid, whole
        self.heads, self.qk_norm = heads, qk_norm
        head_dim = width // heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        if qk_norm is not None:
            self.q_norm, self.k_norm = (Scale(head_dim) for _ in range(2))

    def forward(self, x: Tensor, grid: Grid | None = None) -> Tensor:
        """Tokens of the ``grid`` to the same; of this rank's frames of it, where ranks divide them."""
        t, h, w = grid or self.grid
        if sequence.ranks() == 1:
            return self.proj(self._attend(self._heads(x), (t, h, w)))
        frames = sequence.part(t)
        if not self.whole[0]:
            return self.proj(self._attend(self._heads(x), (frames, h, w)))
        if self.whole[1] or self.whole[2]:
            qkv = sequence.swap(self._heads(x).unflatten(1, (frames, -1)), split=4, join=1, count=t)
            y = self._attend(qkv.flatten(1, 2), (t, h, w)).unflatten(-1, (qkv.shape[4], -1))
            y = sequence.swap(y.unflatten(1, (t, -1)), split=1, join=3, count=self.heads)
            return self.proj(y.flatten(3).flatten(1, 2))
        # Over time: the norm's output is exchanged rather than q, k and v, for it is a third of them.
        x = sequence.swap(x.unflatten(1, (frames, -1)), split=2, join=1, count=t)
        y = self.proj(self._attend(self._heads(x.flatten(1, 2)), (t, x.shape[2], 1)))
        return sequence.swap(y.unflatten(1, (t, -1)), split=1, join=2, count=h * w).flatten(1, 2)

    def _heads(self, x: Tensor) -> Tensor:
        """Queries, keys and values ``[B, N, 3, heads, head_dim]``."""
        return self.qkv(x).unflatten(-1, (3, self.heads, -1))

    def _attend(self, qkv: Tensor, grid: Grid) -> Tensor:
        window = [n if whole else 1 for n, whole in zip(grid, self.whole, strict=True)]
        q_weight, k_weight = (None, None) if self.qk_norm is None else (self.q_norm.weight, self.k_norm.weight)
        return window_attention(qkv, grid, window, q_weight=q_weight, k_weight=k_weight, qk_norm=self.qk_norm)


class MLP(nn.Module):
    """Linear, tanh-GELU, Linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return mlp(x, self.fc1, self.fc2)


class Modulation(NamedTuple):
    """Shift, scale and gate of the attention, then of the MLP: ``[B, D]``, or ``[B, T', D]`` with one per frame."""

    shift_msa: Tensor
    scale_msa: Tensor
    gate_msa: Tensor
    shift_mlp: Tensor
    scale_mlp: Tensor
    gate_mlp: Tensor


def modulation(width: int, count: int) -> nn.Sequential:
    """``c`` to ``count`` vectors of ``width``; starts at zero."""
    return nn.Sequential(nn.SiLU(), nn.Linear(width, count * width))


def modulations_of(rows: Sequence[Tensor], width: int) -> tuple[list[Modulation], tuple[Tensor, Tensor]]:
    """The modulation of each block, and shift and scale of the final layer, from ``[..., 6 D]`` and ``[..., 2 D]``."""
    shift, scale = rows[-1].chunk(2, dim=-1)
    return [Modulation(*row.split(width, dim=-1)) for row in rows[:-1]], (shift, scale)


class FinalLayer(nn.Module):
    """The last modulation and the Linear from a token to its patch."""

    def __init__(self, width: int, patch: tuple[int, ...], out_channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, math.prod(patch) * out_channels)
        self.adaLN_modulation = modulation(width, 2)
