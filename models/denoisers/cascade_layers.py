"""The blocks and levels of StableCascade's stages; the equations are in ``cascade.py``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minisora_kernels import Rope, grn, rope_3d, window_attention

from ..objectives.common import at_least_float32
from ..parallel import draws, sequence
from ..runtime.recompute import Checkpointing, recomputed
from .cascade_config import CascadeConfig
from .layers import outputs_from

Condition = tuple[Tensor, "Tensor | None"]
R_CHANNELS = 64


def norm(x: Tensor) -> Tensor:
    """LN: over the channels, without parameters."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def embed_r(r: Tensor) -> Tensor:
    """``[B]`` in [0, 1] to ``[B, 64]``, fp32: sin, then cos, of ``10^4 r`` times ``10^4 ** (-i / 31)`` for i < 32.

    DiT's has cos first, and divides i by 32.
    """
    half = R_CHANNELS // 2
    places = torch.arange(half, device=r.device, dtype=torch.float32)
    angles = r.float()[:, None] * 10_000 * torch.exp(places * (-math.log(10_000.0) / (half - 1)))
    return torch.cat((angles.sin(), angles.cos()), dim=-1)


def sites(x: Tensor) -> Tensor:
    """``[B, C, T, H, W]`` or ``[B, C, H, W]`` as ``[B, T, H, W, C]``."""
    return (x if x.dim() == 5 else x.unsqueeze(2)).movedim(1, -1)


def resize_sites(x: Tensor, size: Sequence[int]) -> Tensor:
    """``[B, T, H, W, C]`` to another height and width, bilinear, corner on corner; as it is if that is its size."""
    if tuple(x.shape[2:4]) == tuple(size):
        return x
    frames = at_least_float32(x.flatten(0, 1).movedim(-1, 1))
    frames = F.interpolate(frames, size, mode="bilinear", align_corners=True)
    return frames.movedim(1, -1).unflatten(0, x.shape[:2]).to(x.dtype)


def whole_films(x: Tensor, frames: int) -> Tensor:
    """``[B, t, H, W, C]``, this rank's of the frames, as all frames ``[B, T, sites, C]`` of its sites."""
    return sequence.swap(x.flatten(2, 3), split=2, join=1, count=frames)


def own_frames(x: Tensor, size: Sequence[int]) -> Tensor:
    """Back from :func:`whole_films`, to frames of this height and width."""
    return sequence.swap(x, split=1, join=2, count=math.prod(size)).unflatten(2, tuple(size))


class Channelwise(nn.Module):
    """Linear, GELU, GRN, dropout, Linear: the second half of C, and all of F."""

    def __init__(self, inputs: int, width: int, dropout: float, frames: int) -> None:
        super().__init__()
        self.frames = frames
        self.expand = nn.Linear(inputs, 4 * width)
        self.grn_weight = nn.Parameter(torch.zeros(4 * width))
        self.grn_bias = nn.Parameter(torch.zeros(4 * width))
        self.dropout = nn.Dropout(dropout)
        self.contract = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.expand(x).flatten(1, 3)
        hidden = grn(hidden, self.grn_weight, self.grn_bias, groups=x.shape[1], activation="gelu")
        hidden = hidden.unflatten(1, x.shape[1:4])
        return self.contract(draws.dropout(hidden, self.dropout.p, self.training, self.frames))


class ResBlock(nn.Module):
    """C. With ``skip`` channels it reads the output of the level on the way down."""

    def __init__(self, width: int, skip: int, dropout: float, temporal: bool, frames: int) -> None:
        super().__init__()
        self.frames = frames
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.temporal = nn.Parameter(torch.zeros(3, width)) if temporal else None
        self.channelwise = Channelwise(width + skip, width, dropout, frames)

    def forward(self, x: Tensor, skip: Tensor | None) -> Tensor:
        y = self.depthwise(x.flatten(0, 1).movedim(-1, 1)).movedim(1, -1).unflatten(0, x.shape[:2])
        if self.temporal is not None:
            past, present, future = self.temporal.to(y.dtype)
            y = whole_films(y, self.frames)
            padded = F.pad(y, (0, 0, 0, 0, 1, 1))
            y = y + past * padded[:, :-2] + present * y + future * padded[:, 2:]
            y = own_frames(y, x.shape[2:4])
        y = norm(y)
        if skip is not None:
            y = torch.cat((y, skip.to(y.dtype)), dim=-1)
        return x + self.channelwise(y)


class TimestepBlock(nn.Module):
    """T. Its further inputs have mappers of their own, whose results are added; all are told 0."""

    def __init__(self, width: int, further: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.mapper = nn.Linear(R_CHANNELS, 2 * width)
        self.further = further
        for name in further:
            setattr(self, f"mapper_{name}", nn.Linear(R_CHANNELS, 2 * width))

    def forward(self, x: Tensor, r: Tensor) -> Tensor:
        mapped = self.mapper(r)
        for name in self.further:
            mapped = mapped + getattr(self, f"mapper_{name}")(embed_r(r.new_zeros(1)).to(r.dtype))
        a, b = mapped[:, None, None, None].chunk(2, dim=-1)
        return x * (1 + a) + b


class SpatialAttention(nn.Module):
    """A. Without conditioning tokens it is window attention over a frame."""

    def __init__(self, width: int, heads: int, condition_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.condition = nn.Linear(condition_width, width) if condition_width else None

    def forward(self, x: Tensor, condition: Condition | None) -> Tensor:
        t, h, w, width = x.shape[1:]
        qkv = self.qkv(norm(x).flatten(1, 3)).unflatten(-1, (3, self.heads, -1))
        if condition is None or self.condition is None:
            return x + self.proj(window_attention(qkv, (t, h, w), (1, h, w))).unflatten(1, (t, h, w))
        tokens, mask = condition
        mapped = self.condition(F.silu(tokens))
        more = outputs_from(self.qkv, mapped, width).unflatten(-1, (2, self.heads, -1))
        # All [B T, heads, tokens, head_dim]; every frame has the conditioning tokens of its sample.
        q, k, v = qkv.unflatten(1, (t, h * w)).flatten(0, 1).permute(2, 0, 3, 1, 4)
        more_k, more_v = more.permute(2, 0, 3, 1, 4).repeat_interleave(t, dim=1)
        if mask is not None:
            mask = F.pad(mask, (h * w, 0), value=True).repeat_interleave(t, dim=0)[:, None, None]
        out = F.scaled_dot_product_attention(q, torch.cat((k, more_k), 2), torch.cat((v, more_v), 2), attn_mask=mask)
        return x + self.proj(out.transpose(1, 2).reshape(x.shape))


class FeedForward(nn.Module):
    """F."""

    def __init__(self, width: int, dropout: float, frames: int) -> None:
        super().__init__()
        self.channelwise = Channelwise(width, width, dropout, frames)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.channelwise(norm(x))


class TemporalAttention(nn.Module):
    """V."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """``cos`` and ``sin [T, sites, head_dim / 2]`` are of all frames, and the same at each site."""
        films = whole_films(norm(x), len(cos))
        grid = *films.shape[1:3], 1
        qkv = self.qkv(films.flatten(1, 2)).unflatten(-1, (3, self.heads, -1))
        rope = Rope(cos[:, : grid[1]].flatten(0, 1), sin[:, : grid[1]].flatten(0, 1))
        y = self.proj(window_attention(qkv, grid, (grid[0], 1, 1), rope=rope)).unflatten(1, grid[:2])
        return x + own_frames(y, x.shape[2:4])


class Resample(nn.Module):
    """LN and Linear to the next level's width: of 2 x 2 sites to one on the way down, of one to 2 x 2 on the way up.

    The 2 x 2 sites on the way up share their bias, as those of a transposed convolution do.
    """

    def __init__(self, inputs: int, outputs: int, factor: int, *, up: bool) -> None:
        super().__init__()
        self.factor = factor
        sites, shared = factor**2, up and factor > 1
        if up:
            self.linear = nn.Linear(inputs, sites * outputs, bias=not shared)
        else:
            self.linear = nn.Linear(sites * inputs, outputs)
        self.bias = nn.Parameter(torch.zeros(outputs)) if shared else None

    def forward(self, x: Tensor) -> Tensor:
        x, factor = norm(x), self.factor
        if factor == 1:
            return self.linear(x)
        if self.bias is not None:
            x = self.linear(x).unflatten(-1, (factor, factor, -1)).transpose(3, 4)
            return x.flatten(4, 5).flatten(2, 3) + self.bias
        h, w = (n // factor * factor for n in x.shape[2:4])
        x = x[:, :, :h, :w].unflatten(3, (-1, factor)).unflatten(2, (-1, factor)).transpose(3, 4)
        return self.linear(x.flatten(4))


class Level(nn.Module):
    """The blocks of one level of one of the two ways: ``groups`` of its letters, run ``repeats`` times."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: CascadeConfig, level: int, groups: int, repeats: int, skip: int) -> None:
        super().__init__()
        width, heads, dropout = config.widths[level], config.heads[level], config.dropout[level]
        condition_width = config.condition_width if config.num_classes or config.text_width else 0
        frames = config.grid[0]

        def block(letter: str, skip: int) -> nn.Module:
            if letter == "C":
                return ResBlock(width, skip, dropout, config.temporal_convolution, frames)
            if letter == "T":
                return TimestepBlock(width, config.further_times)
            if letter == "A":
                return SpatialAttention(width, heads, condition_width)
            return FeedForward(width, dropout, frames) if letter == "F" else TemporalAttention(width, heads)

        letters = config.levels[level]
        self.groups = nn.ModuleList(
            nn.ModuleDict({letter: block(letter, 0 if i else skip) for letter in letters}) for i in range(groups)
        )
        self.between = nn.ModuleList(nn.Linear(width, width) for _ in range(repeats - 1))
        self.random = dropout > 0
        if "V" in letters:
            head_dim = width // heads
            rope = rope_3d(config.grids[level], head_dim, split=(head_dim, 0, 0))
            self.register_buffer("cos", rope.cos.unflatten(0, (frames, -1)), persistent=False)
            self.register_buffer("sin", rope.sin.unflatten(0, (frames, -1)), persistent=False)

    def forward(
        self, x: Tensor, r: Tensor, condition: Condition | None, skip: Tensor | None, checkpointing: Checkpointing
    ) -> Tensor:
        for i in range(len(self.between) + 1):
            if i:
                x = self.between[i - 1](x).to(x.dtype)
            for j in range(len(self.groups)):
                arguments = (j, x, r, condition, None if j else skip)
                x = recomputed(self._group, *arguments, checkpointing=checkpointing, random=self.random)
        return x

    def _group(self, index: int, x: Tensor, r: Tensor, condition: Condition | None, skip: Tensor | None) -> Tensor:
        for letter, block in cast(nn.ModuleDict, self.groups[index]).items():
            if letter == "C":
                x = block(x, skip)
            elif letter == "T":
                x = block(x, r)
            elif letter == "A":
                x = block(x, condition)
            elif letter == "V":
                x = block(x, self.cos, self.sin)
            else:
                x = block(x)
        return x


def mapper(inputs: int, width: int) -> nn.Sequential:
    """Of latents or pixels, site by site."""
    return nn.Sequential(nn.Linear(inputs, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
