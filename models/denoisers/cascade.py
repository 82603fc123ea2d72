"""Stages C and B of StableCascade (Wuerstchen; Pernias et al. 2023, arXiv 2306.00637), for images and for video.

A stage is a U-Net whose levels are strings of block letters, repeated; x is ``[B, T, H, W, C]``, r the noise level in
[0, 1], ``LN`` has no parameters, and c are the conditioning tokens ``[B, L, condition_width]`` of a class or a caption:

    C  x + W2 dropout(GRN(GELU(W1 [LN(depthwise3x3(x)), skip])))       GRN per frame, hidden width 4 C, exact GELU
    T  x (1 + a) + b                                                   [a, b] = Linear(embed(r)), no norm
    A  x + attention(q = LN(x), kv = [LN(x), Linear(SiLU(c))])         over the tokens of a frame
    F  x + W2 dropout(GRN(GELU(W1 LN(x))))
    V  x + attention(LN(x))                                            over the frames at each site; not the paper's

    down   z_i = level_i(resample(z_{i-1}))
    up     z   = level_i(z, skip = z_i) ``repeats`` times, Linear between two, then resample; the deepest has no skip
    output = unpatchify(Linear(LN(z)))

Stage C makes small latents (16 x 24 x 24 of a 1024 x 1024 picture) and keeps their resolution; stage B makes the
latents of an autoencoder under the condition of those of stage C, and halves the resolution from level to level.

Video: frames share all blocks but V, whose rotary embedding tells their order. Its output projection starts at 0, and
so does the depthwise convolution over time that C may have: with the weights of an image model a video model makes the
frames that the image model makes (``inflate.py``).

A caption gives a token for each of its states or, with ``captions``, its first state, the pooled caption, gives
``condition_tokens``; so does the embedding of a picture. In this order, tokens, pooled caption, picture, they are c.

What differs from StableCascade's code: its further inputs of T ("sca", "crp"), constants unless a caller sets them, are
left to T's bias, or with ``further_times`` told 0; there is no dropout inside the attention; the convolutions that
change the resolution are written as Linear on 2 x 2 sites. Where there are conditioning tokens, the attention of A is
torch's, not a kernel of this project: its keys come from two places.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn

from minisora_kernels import unpatchify

from ..objectives.common import TIMESTEPS, expand
from ..objectives.logsnr import LogSNR
from ..parallel import draws, sequence
from ..protocols import Denoiser, SmallClips, System
from .cascade_config import SIZES, CascadeConfig, CascadeSettings, with_time
from .cascade_layers import Condition, Level, Resample, embed_r, mapper, norm, resize_sites, sites
from .layers import drop_labels, embed_patches
from .text import Text, drop_captions, with_null

CONDITIONS = (
    "class_embedding",
    "text_mapper",
    "pooled_mapper",
    "image_mapper",
    "null_text",
    "latent_mapper",
    "pixel_mapper",
)


class Cascade(Denoiser):
    """Stage C, or stage B with ``downsample``, ``latent_channels`` and ``pixel_channels``.

    Attributes:
        config: what it was built from.
        out_channels: ``channels``.
        null_class: the label of "no class"; None without classes.
        checkpointing: recompute each group of blocks in backward instead of keeping its activations. False at first.
    """

    def __init__(self, config: CascadeConfig) -> None:
        super().__init__()
        self.config = config
        self.out_channels = config.channels
        self.null_class = config.num_classes or None

        widths, last, factor = config.widths, len(config.widths) - 1, 2 if config.downsample else 1
        convolution: Any = nn.Conv3d if len(config.patch) == 3 else nn.Conv2d
        self.embedding = convolution(config.channels, widths[0], config.patch, config.patch)
        if config.num_classes:
            tokens = config.condition_tokens * config.condition_width
            self.class_embedding = nn.Embedding(config.num_classes + 1, tokens)
        if config.text_width:
            tokens = config.condition_tokens * config.condition_width
            if config.captions != "pooled":
                self.text_mapper = nn.Linear(config.text_width, config.condition_width)
            if config.captions != "tokens":
                self.pooled_mapper = nn.Linear(config.text_width, tokens)
            if config.image_width:
                self.image_mapper = nn.Linear(config.image_width, tokens)
            if config.null_tokens:
                null = torch.empty(config.null_tokens, config.text_width)
                self.null_text = nn.Parameter(null, requires_grad=False)
        if config.latent_channels:
            self.latent_mapper = mapper(config.latent_channels, widths[0])
        if config.pixel_channels:
            self.pixel_mapper = mapper(config.pixel_channels, widths[0])

        self.down = nn.ModuleList(Level(config, i, config.down[i], 1, 0) for i in range(last + 1))
        self.up = nn.ModuleList(
            Level(config, i, config.up[last - i], config.repeats[last - i], widths[i] if i < last else 0)
            for i in range(last, -1, -1)
        )
        self.down_resample = nn.ModuleList(Resample(widths[i], widths[i + 1], factor, up=False) for i in range(last))
        self.up_resample = nn.ModuleList(
            Resample(widths[i], widths[i - 1], factor, up=True) for i in range(last, 0, -1)
        )
        self.output = nn.Linear(widths[0], math.prod(config.patch) * self.out_channels)
        self._initialize()

    def _initialize(self) -> None:
        """Xavier, small at both ends of the residual branches; the model starts as zero, T and V as the identity."""
        for name, parameter in self.named_parameters():
            zero = ("bias", "grn_weight", "temporal", ".V.proj.weight", "output.weight")
            if name.endswith(zero) or ".T.mapper" in name:
                nn.init.zeros_(parameter)
            elif name.startswith(CONDITIONS):
                nn.init.normal_(parameter, std=0.02)
            else:
                nn.init.xavier_uniform_(parameter, gain=0.02 if name.startswith("embedding") else 1.0)
            if name.endswith("channelwise.contract.weight"):
                with torch.no_grad():
                    parameter.mul_(sum(self.config.down) ** -0.5)

    @property
    def small_clips(self) -> SmallClips | None:
        config = self.config
        if not config.latent_channels:
            return None
        shape = (config.latent_channels, config.grid[0], None, None)
        return SmallClips(shape, of_input=False, required=False, option="latent_channels")

    def small_clip_arguments(
        self, low: Tensor, level: int, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        return {"low": low if len(self.config.patch) == 3 else low.squeeze(2)}

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor | Text | None = None,
        *,
        low: Tensor | None = None,
        pixels: Tensor | None = None,
        image: Tensor | None = None,
    ) -> Tensor:
        """What the objective asks for: noise or velocity.

        Args:
            x: ``[B, C, T, H, W]``, or ``[B, C, H, W]`` in image mode.
            t: noise levels in [0, 1000], ``[B]``: 1000 r.
            y: classes ``[B]``, int64, ``null_class`` for none, or captions; None if and only if the model has neither
                classes nor text.
            low: what stage C made, ``[B, latent_channels, T, h, w]`` or ``[B, latent_channels, h, w]``, of any h and w;
                None and zeros mean none. Samples of the null class or of the null caption go without.
            pixels: a picture or clip of any size, as ``low``.
            image: embeddings of pictures beside captions, ``[B, pictures, image_width]``; None means one of zeros.
                Samples of the null caption go without.

        Returns:
            x's shape with ``out_channels`` channels.

        Raises:
            ValueError: an argument whose shape does not fit the config, or one that is missing or not wanted.
        """
        self._check(x, t, y, low, pixels, image)
        if y is not None:
            present = y.tokens.any(1) if isinstance(y, Text) else y.ne(cast(int, self.null_class))
            low = None if low is None else low * expand(present, low)
            image = None if image is None else image * expand(present, image)
        config, dtype = self.config, next(self.output.parameters()).dtype
        count, *others = config.grid
        x = sequence.own(x, 2, count)
        z = norm(embed_patches(x, self.embedding).unflatten(1, (-1, *others))).to(dtype)
        if config.latent_channels:
            z = z + self._latents(low, z)
        if config.pixel_channels:
            z = z + self._pixels(pixels, z)
        condition = None if y is None else self._condition(y, image)
        r = embed_r(t / TIMESTEPS).to(dtype)

        outputs: list[Tensor] = []
        for i, level in enumerate(self.down):
            if i:
                z = self.down_resample[i - 1](z).to(dtype)
            z = level(z, r, condition, None, self.checkpointing)
            outputs.append(z)
        skip = None
        for i, level in enumerate(self.up):
            if i:
                skip = outputs[-1 - i]
                z = resize_sites(self.up_resample[i - 1](z).to(dtype), skip.shape[2:4])
            z = level(z, r, condition, skip, self.checkpointing)
        grid = z.shape[1:4][-len(config.patch) :]
        x = unpatchify(self.output(norm(z)).flatten(1, 3), grid, config.patch, self.out_channels)
        return sequence.joined(x, 2, count)

    def divisible(self, images: int = 0, size: tuple[int, ...] | None = None) -> dict[str, int]:
        places = min(math.prod(grid[1:]) for grid in self.config.grids)
        return {"frames of tokens": self.config.grid[0], "places of a frame": places}

    def units(self) -> list[list[nn.Module]]:
        return [[level] for level in (*self.down, *self.up)]

    def _condition(self, y: Tensor | Text, image: Tensor | None) -> Condition:
        """Conditioning tokens ``[B, L, condition_width]`` and, for captions, which of them count ``[B, L]``."""
        config, share = self.config, self.config.class_dropout if self.training else 0.0
        if not isinstance(y, Text):
            y = drop_labels(y, config.num_classes, share)
            return norm(self.class_embedding(y).unflatten(-1, (config.condition_tokens, -1))), None
        y = with_null(y, share, self.null_text) if config.null_tokens else drop_captions(y, share)
        mask, states = y.tokens, y.states.to(next(self.output.parameters()).dtype)
        tokens, masks = [], []
        if config.captions != "pooled":
            first = int(config.captions == "both")
            tokens.append(self.text_mapper(states[:, first:]))
            masks.append(mask[:, first:])
        if config.captions != "tokens":
            tokens.append(self.pooled_mapper(states[:, 0]).unflatten(-1, (config.condition_tokens, -1)))
            masks.append(mask[:, :1].expand(-1, config.condition_tokens))
        if config.image_width:
            image = states.new_zeros(len(states), 1, config.image_width) if image is None else image
            tokens.append(
                self.image_mapper(image.to(states.dtype)).unflatten(-1, (config.condition_tokens, -1)).flatten(1, 2)
            )
            masks.append(mask.new_ones(tokens[-1].shape[:2]))
        return norm(torch.cat(tokens, 1)), torch.cat(masks, 1)

    def _latents(self, latents: Tensor | None, z: Tensor) -> Tensor:
        """What they add to the tokens ``z [B, T, H', W', C]``: resized, then mapped."""
        if latents is None:
            return norm(self.latent_mapper(z.new_zeros(1, 1, 1, 1, self.config.latent_channels)))
        if self.training and self.config.latent_dropout > 0:
            kept = draws.rand(len(latents), device=latents.device) >= self.config.latent_dropout
            latents = latents * expand(kept, latents)
        latents = sequence.own(sites(latents), 1)
        return norm(self.latent_mapper(resize_sites(latents.to(z.dtype), z.shape[2:4])))

    def _pixels(self, pixels: Tensor | None, z: Tensor) -> Tensor:
        """The same of a picture: mapped, then resized."""
        if pixels is None:
            return norm(self.pixel_mapper(z.new_zeros(1, 1, 1, 1, self.config.pixel_channels)))
        return resize_sites(norm(self.pixel_mapper(sequence.own(sites(pixels), 1).to(z.dtype))), z.shape[2:4])

    def _check(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor | Text | None,
        low: Tensor | None,
        pixels: Tensor | None,
        image: Tensor | None,
    ) -> None:
        config, batch = self.config, len(x)
        expected = (config.channels, *config.input_size)
        if tuple(x.shape[1:]) != expected:
            raise ValueError(f"x has shape {tuple(x.shape)}; it must be [B, {', '.join(map(str, expected))}]")
        if tuple(t.shape) != (batch,):
            raise ValueError(f"t has shape {tuple(t.shape)}; it must be [{batch}]")
        if isinstance(y, Text):
            if not config.text_width:
                raise ValueError("y is a Text, but the model has text_width = 0")
            wanted = (batch, y.mask.shape[-1], config.text_width)
            if tuple(y.states.shape) != wanted or tuple(y.mask.shape) != wanted[:2] or y.mask.dtype != torch.bool:
                raise ValueError(
                    f"y is a Text of shapes {tuple(y.states.shape)} and {tuple(y.mask.shape)} of {y.mask.dtype}; they "
                    f"must be [{batch}, L, {config.text_width}] and [{batch}, L] of torch.bool"
                )
            if 0 < config.null_tokens < y.shape[1]:
                raise ValueError(
                    f"y has {y.shape[1]} tokens; the null caption has {config.null_tokens}, the most there are"
                )
        elif y is None:
            if config.num_classes or config.text_width:
                raise ValueError(
                    f"y is None; a model with {config.num_classes} classes and text_width {config.text_width} needs one"
                )
        elif not config.num_classes:
            raise ValueError("y holds classes, but the model has num_classes = 0")
        elif tuple(y.shape) != (batch,):
            raise ValueError(f"y is of shape {tuple(y.shape)}; it must be [{batch}]")
        if image is not None and (not isinstance(y, Text) or not config.image_width):
            raise ValueError(f"image was given; it goes with captions, and image_width is {config.image_width}")
        if image is not None and (image.dim() != 3 or image.shape[::2] != (batch, config.image_width)):
            raise ValueError(
                f"image has shape {tuple(image.shape)}; it must be [{batch}, pictures, {config.image_width}]"
            )
        for name, option, clips in (("low", "latent_channels", low), ("pixels", "pixel_channels", pixels)):
            if clips is None:
                continue
            channels = getattr(config, option)
            if not channels:
                raise ValueError(f"{name} was given to a model whose {option} is 0")
            frames = config.grid[:1] if len(config.patch) == 3 else ()
            if tuple(clips.shape[:-2]) != (batch, channels, *frames):
                shape = ", ".join(map(str, (batch, channels, *frames, "h", "w")))
                raise ValueError(f"{name} has shape {tuple(clips.shape)}; it must be [{shape}]")


def systems() -> dict[str, System]:
    """The stages as published, for images, and with attention over time, for video."""
    result = {}
    for name, shape in SIZES.items():
        image = CascadeSettings(**shape)
        objective = LogSNR(sample_shift=2.0) if name.startswith("c-") else LogSNR(noise="pyramid")
        result[f"cascade-{name}"] = System(image, objective)
        result[f"cascade-{name}/video"] = System(with_time(image), objective)
    return result
