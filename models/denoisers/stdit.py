"""STDiT: video with space, time and text in every block (Zheng et al., Open-Sora 1.0, March 2024; arXiv 2412.20404).

    t0    = Linear(SiLU(t_embed(t)))                                [B, 6 D], or [B, T', 6 D] with per-frame t
    x     = patch_embed(video) + pos_space                          [B, N, D], N = T' * H' * W' tokens
    shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = t0 + table of the block
    x     = x + gate_msa * space(adaln(x, shift_msa, scale_msa))    depth times; attention inside a frame
    x     = x + gate_msa * time(x [+ pos_time])                     over the frames of a place; pos_time in block 0
    x     = x + cross(x, text)                                      queries from x, keys and values from the text
    x     = x + gate_mlp * mlp(adaln(x, shift_mlp, scale_mlp))
    output = unpatchify(Linear(adaln(x, shift, scale)))             shift, scale = t_embed(t) + a table

The one modulation for all blocks with tables of their own, adaLN-single, and the cross-attention without a norm are
PixArt-alpha's (Chen et al. 2023, arXiv 2310.00426). Attention over time reads x as it is, without a norm, and shares
the gate of the attention over space: Open-Sora's formula, kept. Output projections of time and of cross start at zero.

The text goes through Linear, tanh-GELU, Linear to width D. Without captions, classes make a text of one token, which
has all the attention whatever the queries: only its value is computed. Without either there is no cross-attention.

What is not Open-Sora's: the null caption is one learned token, unless ``null_tokens`` asks for Open-Sora's fixed random
rows, which stand behind the mask of the caption that is dropped; grids need not be square, and positions count tokens,
without scales for resolution and frame rate, which published positions have; ``qk_norm`` may be asked for.

Every residual sum whose reader is normalised is fused with that norm. The cross-attention is torch's
``scaled_dot_product_attention`` with the mask, not a kernel of this project; its sum x + cross is a gated sum with a
gate of ones, so that it too is fused with the norm of the MLP.

The parameters have Open-Sora's names, but for ``y_embedder.null``:

    pos_embed                                      [1, N, D], of the place in the frame, frozen
    pos_embed_temporal                             [1, T', D], frozen
    x_embedder.proj.*, t_embedder.mlp.{0,2}.*      as DiT's
    t_block.1.*                                    D -> 6D
    y_embedder.y_proj.{fc1,fc2}.*, y_embedder.null E -> D -> D; [E]
    y_embedder.y_embedding                         [null_tokens, E], frozen; in the place of null
    y_embedder.embedding_table.weight              [num_classes + 1, D], with classes in the place of text
    blocks.i.scale_shift_table                     [6, D]
    blocks.i.{attn,attn_temp}.{qkv,proj}.*         space, time
    blocks.i.cross_attn.{q_linear,kv_linear,proj}.*     v_linear in the place of the two with classes
    blocks.i.mlp.{fc1,fc2}.*
    final_layer.scale_shift_table, final_layer.linear.*   [2, D]; D -> prod(patch) * out_channels, channels last
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass, fields
from typing import ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minisora_kernels import adaln, gate_residual, gate_residual_adaln, recompute_adaln, unpatchify
from minisora_kernels.modules import mlp

from ..objectives.ddpm import DDPM
from ..parallel import sequence
from ..protocols import BaseSettings, Denoiser, System
from ..runtime.recompute import recomputed
from .dit import SIZES, DiTConfig
from .layers import (
    MLP,
    Attention,
    Grid,
    LabelEmbedder,
    Modulation,
    PatchEmbedder,
    TimestepEmbedder,
    grid_positions,
    sincos,
)
from .text import Text, with_null


@dataclass(frozen=True)
class STDiTSettings(BaseSettings):
    """What an STDiT is, whatever it is trained on."""

    name: ClassVar[str] = "stdit"
    needs_ddpm: ClassVar[tuple[str, ...]] = ("learn_sigma",)

    width: int = 192
    """D, a multiple of 4 and of heads."""
    depth: int = 4
    """Number of blocks, each with attention over space, over time and to the text."""
    heads: int = 3
    patch: tuple[int, int, int] = (1, 4, 4)
    """Frames, rows and columns per token."""
    mlp_ratio: float = 4.0
    """Hidden width of the MLP over the width."""
    class_dropout: float = 0.1
    """Share of captions or labels that training replaces by the null one; guidance needs it."""
    learn_sigma: bool = False
    """Also learn the variance, in as many extra channels; objective 'ddpm' only."""
    qk_norm: Literal["rms", "layer"] | None = None
    """Norm of queries and keys over head_dim, with a learned weight, in space and in time."""
    null_tokens: int = 0
    """Rows of a fixed null caption, of which a dropped caption takes as many as it has tokens; Open-Sora has 120. With
    0 one learned token is the null caption."""


@dataclass(frozen=True, kw_only=True)
class STDiTConfig(STDiTSettings):
    """What an STDiT is built from; survives ``dataclasses.asdict``, JSON and ``STDiTConfig(**values)``.

    Args:
        input_size: cells of the input ``(T, H, W)``, pixels or latents; each a multiple of ``patch``.
        channels: of the input.
        num_classes: classes in the place of captions, or 0.
        text_width: E, the width of the encoder's states, or 0 for a model without text.

    Raises:
        ValueError: a value that does not fit, by name.
    """

    input_size: tuple[int, int, int]
    channels: int
    num_classes: int = 0
    text_width: int = 0

    def __post_init__(self) -> None:
        for name in ("input_size", "patch"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if len(self.input_size) != 3:
            raise ValueError(f"input_size is {self.input_size}; it must be (T, H, W)")
        # The other rules are those of a DiT with attention over space and time.
        own = {item.name: getattr(self, item.name) for item in fields(self)}
        shared = {item.name: own[item.name] for item in fields(DiTConfig) if item.name in own}
        DiTConfig(**shared, attention="factorized")
        if self.text_width < 0:
            raise ValueError(f"text_width is {self.text_width}; it must be 0 (no text) or positive")
        if self.null_tokens < 0 or (self.null_tokens and not self.text_width):
            raise ValueError(f"null_tokens is {self.null_tokens}; it must be 0, or positive for a model with text")
        if self.text_width and self.num_classes:
            raise ValueError(f"text_width is {self.text_width} and num_classes {self.num_classes}; one must be 0")

    @property
    def grid(self) -> Grid:
        """Tokens per axis ``(T', H', W')``."""
        t, h, w = (n // p for n, p in zip(self.input_size, self.patch, strict=True))
        return t, h, w


class TextProjection(nn.Module):
    """Holds the parameters of Linear, tanh-GELU, Linear from the encoder's width to the model's."""

    def __init__(self, text_width: int, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(text_width, width)
        self.fc2 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return mlp(x, self.fc1, self.fc2)


class CaptionEmbedder(nn.Module):
    """Text to tokens ``[B, L, D]``, and the mask of those that count; drops captions in training."""

    def __init__(self, config: STDiTConfig) -> None:
        super().__init__()
        self.dropout = config.class_dropout
        self.y_proj = TextProjection(config.text_width, config.width)
        if config.null_tokens:
            self.y_embedding = nn.Parameter(torch.empty(config.null_tokens, config.text_width), requires_grad=False)
        else:
            self.null = nn.Parameter(torch.empty(config.text_width))

    def forward(self, y: Text) -> tuple[Tensor, Tensor]:
        null = self.y_embedding if hasattr(self, "y_embedding") else self.null
        y = with_null(y, self.dropout if self.training else 0.0, null)
        return self.y_proj(y.states), y.mask


class CrossAttention(nn.Module):
    """Every token of the video attends to those of its text that ``mask [B, L]`` has; plain PyTorch."""

    def __init__(self, config: STDiTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.q_linear = nn.Linear(config.width, config.width)
        self.kv_linear = nn.Linear(config.width, 2 * config.width)
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        q = self.q_linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv_linear(text).unflatten(-1, (2, self.heads, -1)).transpose(1, 3).unbind(2)
        return self.proj(F.scaled_dot_product_attention(q, k, v, mask[:, None, None]).transpose(1, 2).flatten(2))


class ClassAttention(nn.Module):
    """What attention to a single token ``[B, 1, D]`` gives to every token of the video: its value."""

    def __init__(self, config: STDiTConfig) -> None:
        super().__init__()
        self.v_linear = nn.Linear(config.width, config.width)
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor, text: Tensor, mask: None) -> Tensor:
        return self.proj(self.v_linear(text)).expand_as(x)


class Block(nn.Module):
    """Space, time, text, MLP. As in DiT, ``y`` comes in normalised, and leaves normalised for whatever reads x next."""

    def __init__(self, config: STDiTConfig) -> None:
        super().__init__()
        self.attn = Attention(config.width, config.heads, config.grid, (False, True, True), config.qk_norm)
        self.attn_temp = Attention(config.width, config.heads, config.grid, (True, False, False), config.qk_norm)
        self.cross_attn: nn.Module | None = None
        if config.num_classes:
            self.cross_attn = ClassAttention(config)
        elif config.text_width:
            self.cross_attn = CrossAttention(config)
        self.mlp = MLP(config.width, int(config.width * config.mlp_ratio))
        self.scale_shift_table = nn.Parameter(torch.empty(6, config.width))

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        text: tuple[Tensor | None, Tensor | None],
        pos_time: Tensor | None,
        own: Modulation,
        next_shift: Tensor,
        next_scale: Tensor,
        recompute_norms: bool = True,
    ) -> tuple[Tensor, Tensor]:
        with recompute_adaln(y, x, own.shift_msa, own.scale_msa) if recompute_norms else nullcontext():
            branch = self.attn(y)
        x = gate_residual(x, branch, own.gate_msa)
        branch = self.attn_temp(x if pos_time is None else x + pos_time)
        if self.cross_attn is None:
            x, y = gate_residual_adaln(x, branch, own.gate_msa, own.shift_mlp, own.scale_mlp)
        else:
            x = gate_residual(x, branch, own.gate_msa)
            one = x.new_ones(x.shape[-1]).expand(len(x), -1)
            x, y = gate_residual_adaln(x, self.cross_attn(x, *text), one, own.shift_mlp, own.scale_mlp)
        with recompute_adaln(y, x, own.shift_mlp, own.scale_mlp) if recompute_norms else nullcontext():
            branch = self.mlp(y)
        return gate_residual_adaln(x, branch, own.gate_mlp, next_shift, next_scale)


class FinalLayer(nn.Module):
    """The table of the last modulation and the Linear from a token to its patch."""

    def __init__(self, config: STDiTConfig, out_channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(config.width, math.prod(config.patch) * out_channels)
        self.scale_shift_table = nn.Parameter(torch.empty(2, config.width))


class STDiT(Denoiser):
    """The spatial-temporal diffusion transformer.

    Attributes:
        config: what it was built from.
        out_channels: ``channels``, twice that with ``learn_sigma``.
        null_class: the label of "no class"; None for a model without classes.
        checkpointing: recompute each block in backward instead of keeping its activations. False at first.
    """

    def __init__(self, config: STDiTConfig) -> None:
        super().__init__()
        self.config = config
        self.out_channels = config.channels * (2 if config.learn_sigma else 1)
        self.null_class = config.num_classes or None

        self.x_embedder = PatchEmbedder(config.channels, config.width, config.patch)
        self.t_embedder = TimestepEmbedder(config.width)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(config.width, 6 * config.width))
        self.y_embedder: nn.Module | None = None
        if config.num_classes:
            self.y_embedder = LabelEmbedder(config.num_classes, config.width, config.class_dropout)
        elif config.text_width:
            self.y_embedder = CaptionEmbedder(config)
        places = grid_positions(config.grid, config.width, video=False)
        self.pos_embed = nn.Parameter(places, requires_grad=False)
        frames = sincos(torch.arange(config.grid[0]), config.width).float()
        self.pos_embed_temporal = nn.Parameter(frames[None], requires_grad=False)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config, self.out_channels)
        self._initialize()

    def _initialize(self) -> None:
        """Xavier, except that time, text and the model as a whole start as zero."""
        zero = ("attn_temp.proj.weight", "cross_attn.proj.weight", "final_layer.linear.weight")
        for name, parameter in self.named_parameters():
            if name.endswith(("bias", *zero)):
                nn.init.zeros_(parameter)
            elif name.endswith(("scale_shift_table", "null", "y_embedding")):
                nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
            elif name.startswith(("t_embedder.", "t_block.", "y_embedder.")):
                nn.init.normal_(parameter, std=0.02)
            elif parameter.requires_grad and parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter.flatten(1))

    def forward(self, x: Tensor, t: Tensor, y: Tensor | Text | None = None) -> Tensor:
        """What the objective asks for: velocity, noise, or noise and variance.

        Args:
            x: ``[B, C, T, H, W]``.
            t: timesteps in [0, 1000]: ``[B]``, or ``[B, T']`` with one per frame of tokens.
            y: captions, or classes ``[B]``, int64, ``null_class`` for none; None for a model without either.

        Returns:
            x's shape with ``out_channels`` channels.

        Raises:
            ValueError: an argument whose shape does not fit the config, or one that is missing or not wanted.
        """
        self._check(x, t, y)
        dtype = self.pos_embed.dtype
        c = self.t_embedder(t, dtype)
        t0 = self.t_block(c)
        c, t0 = (sequence.own(row, 1) if row.dim() == 3 else row for row in (c, t0))
        text, mask = None, None
        if isinstance(self.y_embedder, CaptionEmbedder):
            text, mask = self.y_embedder(y)
        elif self.y_embedder is not None:
            text = self.y_embedder(y)[:, None]

        # Under autocast the embedding comes out in half precision; the residual stream keeps the parameters' dtype.
        count = self.config.grid[0]
        x = self.x_embedder(sequence.own(x, 2, count), sequence.own(self.pos_embed, 1, count)).to(dtype)
        tables = [cast(Block, block).scale_shift_table for block in self.blocks]
        vectors = [Modulation(*(t0 + table.flatten()).chunk(6, dim=-1)) for table in tables]
        last = [c + row for row in self.final_layer.scale_shift_table]
        frames = sequence.own(self.pos_embed_temporal, 1)
        pos_time: Tensor | None = frames.repeat_interleave(math.prod(self.config.grid[1:]), dim=1)
        y = adaln(x, vectors[0].shift_msa, vectors[0].scale_msa)
        for block, own, (shift, scale, *_) in zip(self.blocks, vectors, [*vectors[1:], last], strict=True):
            arguments = (x, y, (text, mask), pos_time, own, shift, scale)
            if self.checkpointing and torch.is_grad_enabled():
                # A block draws no random numbers, so there is no generator state to restore.
                x, y = recomputed(block, *arguments, False, checkpointing=self.checkpointing)
            else:
                x, y = block(*arguments)
            pos_time = None
        grid = frames.shape[1], *self.config.grid[1:]
        x = unpatchify(self.final_layer.linear(y), grid, self.config.patch, self.out_channels)
        return sequence.joined(x, 2, count)

    def units(self) -> list[list[nn.Module]]:
        # The tables of the blocks are read before the first block.
        return [list(block.children()) for block in self.blocks]

    def divisible(self, images: int = 0, size: tuple[int, ...] | None = None) -> dict[str, int]:
        frames, height, width = self.config.grid
        return {"frames of tokens": frames, "places of a frame": height * width}

    def _check(self, x: Tensor, t: Tensor, y: Tensor | Text | None) -> None:
        config, batch = self.config, len(x)
        expected = (config.channels, *config.input_size)
        if tuple(x.shape[1:]) != expected:
            raise ValueError(f"x has shape {tuple(x.shape)}; it must be [B, {', '.join(map(str, expected))}]")
        if tuple(t.shape) not in ((batch,), (batch, config.grid[0])):
            raise ValueError(
                f"t has shape {tuple(t.shape)}; it may be [{batch}] or, per frame, [{batch}, {config.grid[0]}]"
            )
        if self.y_embedder is None:
            if y is not None:
                raise ValueError("y was given to an unconditional model (num_classes = 0 and text_width = 0)")
        elif config.text_width:
            if not isinstance(y, Text):
                raise ValueError(f"y is a {type(y).__name__}; a model with text_width {config.text_width} needs a Text")
            states, mask = y.states, y.mask
            fits = states.dim() == 3 and states.shape[::2] == (batch, config.text_width) and states.shape[1] > 0
            if not fits or mask.dtype != torch.bool or mask.shape != states.shape[:2]:
                raise ValueError(
                    f"y has states {tuple(states.shape)} and mask {tuple(mask.shape)} of {mask.dtype}; they must be "
                    f"[{batch}, L, {config.text_width}] with L > 0 and [{batch}, L] of torch.bool"
                )
            if 0 < config.null_tokens < states.shape[1]:
                raise ValueError(
                    f"y has {states.shape[1]} tokens; the null caption has {config.null_tokens}, so text.max_length "
                    "must be at most that"
                )
        elif not isinstance(y, Tensor) or tuple(y.shape) != (batch,):
            got = f"of shape {tuple(y.shape)}" if isinstance(y, Tensor) else f"a {type(y).__name__}"
            raise ValueError(f"y is {got}; a model with {self.null_class} classes needs [{batch}]")


def systems() -> dict[str, System]:
    """STDiT in DiT's sizes; only XL was published."""
    return {
        f"stdit-{size.lower()}/1x2x2": System(STDiTSettings(patch=(1, 2, 2), learn_sigma=True, **shape), DDPM())
        for size, shape in SIZES.items()
    }
