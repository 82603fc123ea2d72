"""DiT: the diffusion transformer with adaLN-Zero (Peebles & Xie 2022, arXiv 2212.09748), for images and for video.

    c      = t_embed(t) + y_embed(y)                                       [B, D], or [B, T', D] with per-frame t
    x      = patch_embed(video) + pos                                      [B, N, D], N = T' * H' * W' tokens
    x      = x + gate_msa * attention(adaln(x, shift_msa, scale_msa))      depth times, modulation = Linear(SiLU(c))
    x      = x + gate_mlp * mlp(adaln(x, shift_mlp, scale_mlp))
    output = unpatchify(Linear(adaln(x, shift, scale)))

In the place of a class a model may be told one vector of a caption, CLIP's pooled output: y_embed is then a Linear.

All modulations depend on c only, so each residual sum is fused with the norm that reads it, in whatever block that is.

Video: 3-D patches; attention over all tokens ("joint", as OpenDiT's VDiT) or over space in even and time in odd blocks
("factorized", as Latte, arXiv 2401.03048).

Weights of Meta's DiT load with ``strict=True`` into ``DiTConfig(input_size=(32, 32), patch=(2, 2), channels=4,
num_classes=1000, learn_sigma=True, **SIZES["XL"])``. The parameters:

    pos_embed                               [1, N, D], frozen
    temp_embed                              [1, T', D], frozen; only with late_frames
    x_embedder.proj.{weight,bias}           [D, C, ph, pw] for images, [D, C, pt, ph, pw] for video
    t_embedder.mlp.{0,2}.{weight,bias}      256 -> D -> D
    y_embedder.embedding_table.weight       [num_classes + 1, D], the last row is the null class
    y_embedder.output_projection.*          E -> D, with text in the place of classes
    y_embedder.null                         [E], the null caption
    blocks.i.attn.{qkv,proj}.{weight,bias}  qkv rows in the order (q|k|v, heads, head_dim)
    blocks.i.attn.{q_norm,k_norm}.weight    [head_dim], only with qk_norm; Meta's DiT has none
    blocks.i.mlp.{fc1,fc2}.{weight,bias}
    blocks.i.adaLN_modulation.1.*           D -> 6D: shift, scale, gate of the attention, then of the MLP
    final_layer.adaLN_modulation.1.*        D -> 2D: shift, scale
    final_layer.linear.*                    D -> prod(patch) * out_channels, channels last
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from minisora_kernels import (
    adaln,
    gate_residual_adaln,
    recompute_adaln,
    unpatchify,
)

from ..objectives.ddpm import DDPM
from ..objectives.flow import FlowMatching
from ..parallel import sequence
from ..protocols import BaseSettings, Denoiser, System
from ..runtime.recompute import recomputed
from .layers import (
    MLP,
    Attention,
    FinalLayer,
    Grid,
    LabelEmbedder,
    Modulation,
    PatchEmbedder,
    PooledTextEmbedder,
    TimestepEmbedder,
    concatenated_positions,
    frame_positions,
    grid_positions,
    modulation,
    modulations_of,
)
from .text import Text

SIZES: dict[str, dict[str, Any]] = {
    "S": {"width": 384, "depth": 12, "heads": 6},
    "B": {"width": 768, "depth": 12, "heads": 12},
    "L": {"width": 1024, "depth": 24, "heads": 16},
    "XL": {"width": 1152, "depth": 28, "heads": 16},
}


@dataclass(frozen=True)
class DiTSettings(BaseSettings):
    """What a DiT is, whatever it is trained on."""

    name: ClassVar[str] = "dit"
    pooled_text: ClassVar[bool] = True
    needs_ddpm: ClassVar[tuple[str, ...]] = ("learn_sigma",)

    width: int = 192
    """D, a multiple of 4 and of heads."""
    depth: int = 6
    """Number of blocks."""
    heads: int = 3
    """Number of attention heads."""
    patch: tuple[int, ...] = (1, 4, 4)
    """Frames, rows and columns per token. Two numbers make an image model, which needs data.frames = 1."""
    mlp_ratio: float = 4.0
    """Hidden width of the MLP over the width."""
    attention: Literal["joint", "factorized"] = "joint"
    """Attention over all tokens, or over space and over time in turns."""
    class_dropout: float = 0.1
    """Share of labels or captions that training replaces by the null one; guidance needs it."""
    learn_sigma: bool = False
    """Also learn the variance, in as many extra channels; objective 'ddpm' only."""
    qk_norm: Literal["rms", "layer"] | None = None
    """Norm of queries and keys over head_dim, with a learned weight."""
    positions: Literal["sum", "concatenation"] = "sum"
    """Positions of video: those of frame and place added, or a quarter of the channels for the frame and the rest for
    the place."""
    fixed_null: bool = False
    """Do not train the null caption: published weights have in its place what CLIP makes of no words."""
    late_frames: bool = False
    """Add the positions of frames after the first block, as Latte's published weights expect, and not before it;
    attention 'factorized' only."""

    @property
    def is_image(self) -> bool:
        return len(self.patch) == 2


@dataclass(frozen=True, kw_only=True)
class DiTConfig(DiTSettings):
    """What a DiT is built from; survives ``dataclasses.asdict``, JSON and ``DiTConfig(**values)``.

    Args:
        input_size: cells of the input, pixels or latents: ``(T, H, W)`` for video, ``(H, W)`` for images; each a
            multiple of ``patch``.
        channels: of the input.
        num_classes: 0 for a model without classes.
        text_width: E, the width of the vector of a caption, or 0 for a model without text.

    Raises:
        ValueError: a value that does not fit, by name.
    """

    input_size: tuple[int, ...]
    channels: int
    num_classes: int = 0
    text_width: int = 0

    def __post_init__(self) -> None:
        for name in ("input_size", "patch"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if len(self.input_size) not in (2, 3) or any(n < 1 for n in self.input_size):
            raise ValueError(f"input_size is {self.input_size}; it must be (T, H, W) or (H, W), positive")
        if len(self.patch) != len(self.input_size) or any(p < 1 for p in self.patch):
            raise ValueError(f"patch is {self.patch}; it must have one positive number per axis of {self.input_size}")
        if any(n % p for n, p in zip(self.input_size, self.patch, strict=True)):
            raise ValueError(f"patch is {self.patch}; it must divide input_size {self.input_size}")
        for name in ("channels", "width", "depth", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive")
        if self.width % self.heads or self.width % 4:
            raise ValueError(f"width is {self.width}; it must be a multiple of 4 and of heads = {self.heads}")
        if int(self.width * self.mlp_ratio) < 1:
            raise ValueError(f"mlp_ratio is {self.mlp_ratio}; the MLP must have at least one hidden unit")
        if self.attention not in ("joint", "factorized"):
            raise ValueError(f"attention is {self.attention!r}; it may be 'joint' or 'factorized'")
        if self.attention == "factorized" and len(self.input_size) == 2:
            raise ValueError("attention is 'factorized'; an image has no time axis, so it must be 'joint'")
        if self.late_frames and self.attention != "factorized":
            raise ValueError(f"late_frames is True; attention must be 'factorized', it is {self.attention!r}")
        if self.positions not in ("sum", "concatenation"):
            raise ValueError(f"positions is {self.positions!r}; it may be 'sum' or 'concatenation'")
        if self.positions == "concatenation" and (len(self.input_size) == 2 or self.late_frames or self.width % 16):
            raise ValueError(
                "positions is 'concatenation'; that is for video without late_frames, and for a width that is a "
                f"multiple of 16: it is {self.width}"
            )
        for name in ("num_classes", "text_width"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0 (none) or positive")
        if self.text_width and self.num_classes:
            raise ValueError(f"text_width is {self.text_width} and num_classes {self.num_classes}; one must be 0")
        if self.fixed_null and not self.text_width:
            raise ValueError("fixed_null is True; it goes with text")
        if not 0 <= self.class_dropout <= 1:
            raise ValueError(f"class_dropout is {self.class_dropout}; it must be in [0, 1]")
        if self.qk_norm not in (None, "rms", "layer"):
            raise ValueError(f"qk_norm is {self.qk_norm!r}; it may be None, 'rms' or 'layer'")

    @property
    def grid(self) -> Grid:
        """Tokens per axis ``(T', H', W')``; T' is 1 for images."""
        t, h, w = (1,) * (3 - len(self.patch)) + tuple(n // p for n, p in zip(self.input_size, self.patch, strict=True))
        return t, h, w


class Block(nn.Module):
    """One adaLN-Zero block.

    ``y`` comes in normalised for this block's attention and leaves normalised for whatever reads x next: the next block
    or the final layer. That is why the model, not the block, computes the modulations.
    """

    def __init__(self, config: DiTConfig, whole: tuple[bool, bool, bool]) -> None:
        super().__init__()
        self.attn = Attention(config.width, config.heads, config.grid, whole, config.qk_norm)
        self.mlp = MLP(config.width, int(config.width * config.mlp_ratio))
        self.adaLN_modulation = modulation(config.width, 6)

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        own: Modulation,
        next_shift: Tensor,
        next_scale: Tensor,
        recompute_norms: bool = True,
        grid: Grid | None = None,
    ) -> tuple[Tensor, Tensor]:
        with recompute_adaln(y, x, own.shift_msa, own.scale_msa) if recompute_norms else nullcontext():
            branch = self.attn(y, grid)
        x, y = gate_residual_adaln(x, branch, own.gate_msa, own.shift_mlp, own.scale_mlp)
        with recompute_adaln(y, x, own.shift_mlp, own.scale_mlp) if recompute_norms else nullcontext():
            branch = self.mlp(y)
        return gate_residual_adaln(x, branch, own.gate_mlp, next_shift, next_scale)


class DiT(Denoiser):
    """The diffusion transformer.

    Attributes:
        config: what it was built from.
        out_channels: ``channels``, twice that with ``learn_sigma``.
        null_class: the label of "no class"; None if unconditional.
        checkpointing: recompute each block in backward instead of keeping its activations; otherwise only what adaln
            made is recomputed. False at first.
        any_size: take inputs of other sizes than ``config.input_size`` too, with the positions of their own grid and
            windows that follow it. False at first.
    """

    takes_any_size = True
    computes_ahead = True

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        self.out_channels = config.channels * (2 if config.learn_sigma else 1)
        self.null_class = config.num_classes or None
        self._positions: dict[Grid, Tensor] = {}

        self.x_embedder = PatchEmbedder(config.channels, config.width, config.patch)
        self.t_embedder = TimestepEmbedder(config.width)
        self.y_embedder: nn.Module | None = None
        if config.num_classes:
            self.y_embedder = LabelEmbedder(config.num_classes, config.width, config.class_dropout)
        elif config.text_width:
            self.y_embedder = PooledTextEmbedder(
                config.text_width, config.width, config.class_dropout, fixed=config.fixed_null
            )
        self.pos_embed = nn.Parameter(self._positions_of(config.grid), requires_grad=False)
        if config.late_frames:
            self.temp_embed = nn.Parameter(frame_positions(config.grid[0], config.width), requires_grad=False)
        axes = [(True,) * 3] if config.attention == "joint" else [(False, True, True), (True, False, False)]
        self.blocks = nn.ModuleList(Block(config, axes[i % len(axes)]) for i in range(config.depth))
        self.final_layer = FinalLayer(config.width, config.patch, self.out_channels)
        self._initialize()

    def _initialize(self) -> None:
        """Xavier, except that every block starts as the identity and the model as zero."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias") or "adaLN_modulation" in name or name == "final_layer.linear.weight":
                nn.init.zeros_(parameter)
            elif name.startswith(("t_embedder.", "y_embedder.")):
                nn.init.normal_(parameter, std=0.02)
            elif parameter.requires_grad and parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter.flatten(1))

    def forward(
        self, x: Tensor, t: Tensor | None = None, y: Tensor | Text | None = None, *, modulations: Tensor | None = None
    ) -> Tensor:
        """What the objective asks for: velocity, noise, or noise and variance.

        Args:
            x: ``[B, C, T, H, W]``, or ``[B, C, H, W]`` in image mode, of ``config.input_size`` or, with ``any_size``,
                of any multiples of the patch.
            t: timesteps in [0, 1000]: ``[B]``, or ``[B, T']`` with one per frame of tokens.
            y: classes ``[B]``, int64, ``null_class`` for none, or captions of one vector ``[B, 1, E]``; None if and
                only if the model is unconditional.
            modulations: in place of t and y, what :meth:`modulations` made of them, for x's grid if per frame.

        Returns:
            x's shape with ``out_channels`` channels.

        Raises:
            ValueError: an argument whose shape does not fit the config, or one that is missing or not wanted.
        """
        grid = self._grid(x)
        rows: Sequence[Tensor]
        if modulations is None:
            rows = self._modulations(t, y, x.shape[0], grid[0])
        elif t is not None or y is not None:
            raise ValueError("modulations take the place of t and y, which were given too")
        else:
            rows = self._split(modulations, x.shape[0], grid[0])

        # Under autocast the embedding comes out in half precision; the residual stream keeps the parameters' dtype.
        rows = [sequence.own(row, 1) if row.dim() == 3 else row for row in rows]
        positions = sequence.own(self._positions_at(grid), 1, grid[0])
        x = self.x_embedder(sequence.own(x, 2, grid[0]), positions).to(self.pos_embed.dtype)
        vectors, last = modulations_of(rows, self.config.width)
        y = adaln(x, vectors[0].shift_msa, vectors[0].scale_msa)
        for block, own, (shift, scale, *_) in zip(self.blocks, vectors, [*vectors[1:], last], strict=True):
            if self.checkpointing and torch.is_grad_enabled():
                # A block draws no random numbers, so there is no generator state to restore.
                arguments = (x, y, own, shift, scale, False, grid)
                x, y = recomputed(block, *arguments, checkpointing=self.checkpointing)
            else:
                x, y = block(x, y, own, shift, scale, grid=grid)
            if self.config.late_frames and block is self.blocks[0]:
                frames = sequence.own(self._frames_at(grid[0]), 1)
                x = (x.unflatten(1, (frames.shape[1], -1)) + frames[:, :, None]).flatten(1, 2)
                y = adaln(x, shift, scale)

        patches = (sequence.part(grid[0]), *grid[1:])[-len(self.config.patch) :]
        x = unpatchify(self.final_layer.linear(y), patches, self.config.patch, self.out_channels)
        return sequence.joined(x, 2, grid[0])

    def units(self) -> list[list[nn.Module]]:
        # The modulations of all blocks are computed before the first block.
        blocks: Any = self.blocks
        return [*([block.adaLN_modulation] for block in blocks), *([block.attn, block.mlp] for block in blocks)]

    def divisible(self, images: int = 0, size: tuple[int, ...] | None = None) -> dict[str, int]:
        config = self.config
        frames, height, width = config.grid if size is None else self._grid_of(size)
        by_heads = {"heads": config.heads} if config.attention == "joint" else {"places of a frame": height * width}
        return {"frames of tokens": frames, **by_heads}

    def _grid(self, x: Tensor) -> Grid:
        """Tokens per axis of x."""
        config = self.config
        if tuple(x.shape[1:]) == (config.channels, *config.input_size):
            return config.grid
        sizes = tuple(x.shape[2:])
        fits = len(sizes) == len(config.patch) and x.shape[1] == config.channels
        if not (self.any_size and fits and all(n > 0 and n % p == 0 for n, p in zip(sizes, config.patch, strict=True))):
            expected = ", ".join(map(str, (config.channels, *config.input_size)))
            other = f", or other multiples of the patch {config.patch}" if self.any_size else ""
            raise ValueError(f"x has shape {tuple(x.shape)}; it must be [B, {expected}]{other}")
        return self._grid_of(sizes)

    def _grid_of(self, sizes: tuple[int, ...]) -> Grid:
        patch = self.config.patch
        t, h, w = (1,) * (3 - len(patch)) + tuple(int(n) // p for n, p in zip(sizes[-len(patch) :], patch, strict=True))
        return t, h, w

    def _positions_of(self, grid: Grid) -> Tensor:
        if self.config.positions == "concatenation":
            return concatenated_positions(grid, self.config.width)
        video = len(self.config.patch) == 3 and not self.config.late_frames
        return grid_positions(grid, self.config.width, video=video)

    def _frames_at(self, frames: int) -> Tensor:
        """``[1, T', D]``, like ``temp_embed``."""
        if frames == self.config.grid[0]:
            return self.temp_embed
        return frame_positions(frames, self.config.width).to(self.temp_embed)

    def _positions_at(self, grid: Grid) -> Tensor:
        """``[1, N, D]``, like ``pos_embed``; made once for each grid that is not the config's."""
        if grid == self.config.grid:
            return self.pos_embed
        found = self._positions.get(grid)
        if found is None or found.device != self.pos_embed.device or found.dtype != self.pos_embed.dtype:
            found = self._positions[grid] = self._positions_of(grid).to(self.pos_embed)
        return found

    def modulations(self, t: Tensor, y: Tensor | Text | None = None) -> Tensor:
        """Shifts, scales and gates of all blocks and of the final layer: all that forward makes of t and y.

        They do not depend on x. A sampler, which knows its timesteps, has those of many steps from one product per
        block and gives forward the rows of each step.

        Args:
            t, y: as for :meth:`forward`.

        Returns:
            ``[B, (6 depth + 2) D]``, or ``[B, T', (6 depth + 2) D]`` with per-frame t.

        Raises:
            ValueError: as for :meth:`forward`.
        """
        frames = t.shape[1] if self.any_size and t.dim() == 2 else self.config.grid[0]
        return torch.cat(self._modulations(t, y, len(t), frames), dim=-1)

    def _modulations(self, t: Tensor | None, y: Tensor | Text | None, batch: int, frames: int) -> list[Tensor]:
        """``[..., 6 D]`` of each block and ``[..., 2 D]`` of the final layer."""
        t = self._check(t, y, batch, frames)
        c = self.t_embedder(t, self.pos_embed.dtype)
        if self.y_embedder is not None:
            label = self.y_embedder(y)
            c = c + (label if t.dim() == 1 else label[:, None])
        return [layer.adaLN_modulation(c) for layer in (*self.blocks, self.final_layer)]

    def _split(self, modulations: Tensor, batch: int, frames: int) -> tuple[Tensor, ...]:
        widths = [6 * self.config.width] * self.config.depth + [2 * self.config.width]
        if tuple(modulations.shape) not in ((batch, sum(widths)), (batch, frames, sum(widths))):
            raise ValueError(
                f"modulations have shape {tuple(modulations.shape)}; it must be [{batch}, {sum(widths)}] or, per "
                f"frame, [{batch}, {frames}, {sum(widths)}]"
            )
        return modulations.split(widths, dim=-1)

    def _check(self, t: Tensor | None, y: Tensor | Text | None, batch: int, frames: int) -> Tensor:
        if t is None or tuple(t.shape) not in ((batch,), (batch, frames)):
            got = "is None" if t is None else f"has shape {tuple(t.shape)}"
            raise ValueError(f"t {got}; it may be [{batch}] or, per frame, [{batch}, {frames}]")
        if self.y_embedder is None:
            if y is not None:
                raise ValueError("y was given to an unconditional model (num_classes = 0 and text_width = 0)")
        elif self.config.text_width:
            if not isinstance(y, Text) or tuple(y.shape) != (batch, 1, self.config.text_width):
                got = f"a Text of shape {tuple(y.shape)}" if isinstance(y, Text) else f"a {type(y).__name__}"
                raise ValueError(f"y is {got}; it must be a Text of shape ({batch}, 1, {self.config.text_width})")
        elif not isinstance(y, Tensor) or tuple(y.shape) != (batch,):
            got = "None" if y is None else f"of shape {tuple(y.shape)}"
            raise ValueError(f"y is {got}; a model with {self.null_class} classes needs [{batch}]")
        return t


def systems() -> dict[str, System]:
    """The published DiT and SiT, and DiTs for video: OpenDiT's ("vdit") and Latte."""
    result = {}
    for size, shape in SIZES.items():
        for patch in (2, 4, 8):
            image = DiTSettings(patch=(patch, patch), **shape)
            learned = dataclasses.replace(image, learn_sigma=True)
            result[f"dit-{size.lower()}/{patch}"] = System(learned, DDPM())
            result[f"sit-{size.lower()}/{patch}"] = System(image, FlowMatching())
        for patches in ((1, 2, 2), (2, 2, 2)):
            name = f"{size.lower()}/{'x'.join(map(str, patches))}"
            video = DiTSettings(patch=patches, learn_sigma=True, **shape)
            result[f"vdit-{name}"] = System(video, DDPM())
            result[f"latte-{name}"] = System(dataclasses.replace(video, attention="factorized"), DDPM())
    return result
