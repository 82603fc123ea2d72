"""W.A.L.T's tokenizer: a causal 3-D convolutional autoencoder of videos and images.

    encoder    x [B, C, 1 + s k, H, W] -> mean, log_variance [B, c, 1 + k, H / f, W / f]      (s = 4, f = 8, c = 8)
    latents    z = mean + exp(log_variance / 2) * noise in training, mean otherwise
    decoder    z -> x' [B, C, 1 + s k, H, W]
    penalty    KL(N(mean, exp(log_variance)) || N(0, 1)) = (mean^2 + exp(log_variance) - 1 - log_variance) / 2

Nothing depends on a later frame. A convolution of 3 frames reads the frame and the two before it; before the first
frame stand copies of it, so an image is a video of one frame, and a still video looks the same at every frame.
A convolution that halves T keeps the first frame and every second one after it; the layer that doubles T makes two
frames of every one and drops the first of all. Group norm takes its statistics over one frame.

The network follows MAGVIT-v2 without its quantiser: residual blocks of (group norm, SiLU, convolution) twice, a strided
convolution between the levels of the encoder, a convolution and depth to space between those of the decoder. W.A.L.T
gives the width, the multipliers and the factors. Which of its levels halve T, two blocks a level, and group norm in the
decoder in place of MAGVIT-v2's norm that the latents modulate, are choices made here.

Latents are normalised, ``(z - mean) / std`` by channel, with statistics that :func:`measure_latents` takes from data.

Source: W.A.L.T, Gupta et al. 2023 (arXiv 2312.06662); MAGVIT-v2, Yu et al. 2023 (arXiv 2310.05737).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minisora_kernels import unpatchify

from ..objectives.common import at_least_float32
from ..objectives.reconstruction import Reconstruction
from ..protocols import Autoencoder, BaseSettings, System
from ..runtime.recompute import Checkpointing, recomputed
from .discriminator import PatchDiscriminator
from .tiles import Tile, ramp, starts

Size = tuple[int, int, int]


# The last input frames of every convolution, from one part of a video to the next.
Memory = dict[nn.Module, Tensor]


@dataclass(frozen=True)
class TokenizerSettings(BaseSettings):
    """What a tokenizer is, whatever it is trained on."""

    name: ClassVar[str] = "tokenizer"
    autoencoder: ClassVar[bool] = True

    width: int = 128
    """Channels of the first level."""
    multipliers: tuple[int, ...] = (1, 2, 2, 4)
    """Factors of the width, one per level. Height and width halve from each level to the next."""
    temporal_strides: tuple[int, ...] = (1, 2, 2)
    """One number between each level and the next: 2 halves the frames, 1 keeps them."""
    res_blocks: int = 2
    """Number of residual blocks per level."""
    groups: int = 32
    """Number of groups of the group norm; it must divide the width of every level."""
    latent_channels: int = 8
    """Channels of the latents."""
    variational: bool = True
    """Sample the latents from a diagonal normal in training. Otherwise they are plain numbers, and the penalty is 0."""
    discriminator: int = 0
    """Width of the discriminator of an adversarial objective; 0 for none."""


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig(TokenizerSettings):
    """What a tokenizer is built from; survives ``dataclasses.asdict``, JSON and ``TokenizerConfig(**values)``.

    Args:
        input_size: ``(T, H, W)`` of the training clips, in pixels: T is 1 + a multiple of the temporal factor, H and W
            multiples of the spatial one. The network itself takes every such size.
        channels: of the input.
        num_classes: of the data; an autoencoder makes no use of classes.

    Raises:
        ValueError: a value that does not fit, by name.
    """

    input_size: tuple[int, ...]
    channels: int
    num_classes: int = 0

    def __post_init__(self) -> None:
        for name in ("input_size", "multipliers", "temporal_strides"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("width", "res_blocks", "groups", "latent_channels", "channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive")
        for name in ("discriminator", "num_classes"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative")
        if not self.multipliers or any(m < 1 for m in self.multipliers):
            raise ValueError(f"multipliers is {self.multipliers}; it must have one positive number a level")
        levels = len(self.multipliers)
        if len(self.temporal_strides) != levels - 1 or any(s not in (1, 2) for s in self.temporal_strides):
            raise ValueError(f"temporal_strides is {self.temporal_strides}; it must be {levels - 1} times 1 or 2")
        if any(self.width * m % self.groups for m in self.multipliers):
            raise ValueError(f"groups is {self.groups}; it must divide width {self.width} times each multiplier")
        t, s, f = self.input_size[0], *self.factors
        if len(self.input_size) != 3 or t % s != 1 % s or any(n < 1 or n % f for n in self.input_size[1:]) or t < 1:
            raise ValueError(
                f"input_size is {self.input_size}; it must be (T, H, W) with T 1 + a multiple of {s}, and H and W "
                f"multiples of {f}"
            )

    @property
    def factors(self) -> tuple[int, int]:
        """How much smaller the latents are: in time, and in height and width."""
        return math.prod(self.temporal_strides), 2 ** len(self.temporal_strides)

    @property
    def grid(self) -> Size:
        """Cells of the latents ``(T', H', W')`` of a training clip."""
        (t, h, w), (s, f) = self.input_size, self.factors
        return 1 + (t - 1) // s, h // f, w // f


class CausalConv(nn.Conv3d):
    """A convolution of 3 x 3 x 3 whose output frame i sees the input frames up to ``i * stride``.

    Zeros surround a frame; before the first frame stand copies of it.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: Size = (1, 1, 1)) -> None:
        super().__init__(in_channels, out_channels, 3, stride, padding=(0, 1, 1))

    def forward(self, x: Tensor, memory: Memory | None = None) -> Tensor:
        """``x [B, C, T, H, W]``; with ``memory`` it goes on where the last call with that memory ended."""
        past = None if memory is None else memory.get(self)
        if past is None:
            past = x[:, :, :1].expand(-1, -1, 2, -1, -1)
        x = torch.cat((past, x), dim=2)
        if memory is not None:
            # A copy: a view would keep the whole part in memory.
            memory[self] = x[:, :, x.shape[2] - 3 + self.stride[0] :].clone()
        return super().forward(x)


class FrameNorm(nn.GroupNorm):
    """Group norm with the statistics of each frame, then SiLU."""

    def forward(self, x: Tensor) -> Tensor:
        frames = F.silu(super().forward(x.transpose(1, 2).flatten(0, 1)))
        return frames.unflatten(0, (len(x), -1)).transpose(1, 2)


class ResBlock(nn.Module):
    """``x + conv(SiLU(norm(conv(SiLU(norm(x))))))``; x through a 1 x 1 x 1 convolution where the width changes."""

    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = FrameNorm(groups, in_channels)
        self.conv1 = CausalConv(in_channels, out_channels)
        self.norm2 = FrameNorm(groups, out_channels)
        self.conv2 = CausalConv(out_channels, out_channels)
        self.shortcut = nn.Conv3d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, memory: Memory | None = None) -> Tensor:
        branch = self.conv1(self.norm1(x), memory)
        return self.shortcut(x) + self.conv2(self.norm2(branch), memory)


class Upsample(nn.Module):
    """A convolution to ``prod(factor)`` times the channels, and depth to space."""

    def __init__(self, channels: int, factor: Size) -> None:
        super().__init__()
        self.channels, self.factor = channels, factor
        self.conv = CausalConv(channels, math.prod(factor) * channels)

    def forward(self, x: Tensor, memory: Memory | None = None) -> Tensor:
        first = memory is None or self.conv not in memory
        grid = x.shape[2:]
        tokens = self.conv(x, memory).permute(0, 2, 3, 4, 1).flatten(1, 3)
        x = unpatchify(tokens, grid, self.factor, self.channels)
        return x[:, :, self.factor[0] - 1 :] if first else x


class Head(nn.Module):
    """The last norm and convolution of the encoder or of the decoder."""

    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm = FrameNorm(groups, in_channels)
        self.conv = CausalConv(in_channels, out_channels)

    def forward(self, x: Tensor, memory: Memory | None = None) -> Tensor:
        return self.conv(self.norm(x), memory)


class Layers(nn.ModuleList):
    """Layers that hand on the memory; with ``checkpointing`` each is computed again in the backward."""

    def forward(self, x: Tensor, memory: Memory | None = None, checkpointing: Checkpointing = False) -> Tensor:
        for layer in self:
            x = recomputed(layer, x, memory, checkpointing=checkpointing if memory is None else False)
        return x


def encoder(config: TokenizerConfig) -> Layers:
    """``[B, channels, T, H, W]`` to the latents' mean and log-variance, or to the latents if not variational."""
    widths = [config.width * m for m in config.multipliers]
    layers: list[nn.Module] = [CausalConv(config.channels, widths[0])]
    for level, (before, width) in enumerate(zip([widths[0], *widths], widths, strict=False)):
        if level:
            layers.append(CausalConv(before, before, (config.temporal_strides[level - 1], 2, 2)))
        layers += [ResBlock(width if i else before, width, config.groups) for i in range(config.res_blocks)]
    out_channels = config.latent_channels * (2 if config.variational else 1)
    return Layers((*layers, Head(widths[-1], out_channels, config.groups)))


def decoder(config: TokenizerConfig) -> Layers:
    """The encoder's levels in the reverse order: the latents to ``[B, channels, T, H, W]``."""
    widths = [config.width * m for m in config.multipliers]
    layers: list[nn.Module] = [CausalConv(config.latent_channels, widths[-1])]
    for level in reversed(range(len(widths))):
        width, before = widths[level], widths[min(level + 1, len(widths) - 1)]
        layers += [ResBlock(width if i else before, width, config.groups) for i in range(config.res_blocks)]
        if level:
            layers.append(Upsample(width, (config.temporal_strides[level - 1], 2, 2)))
    return Layers((*layers, Head(widths[0], config.channels, config.groups)))


class CausalTokenizer(Autoencoder):
    """The autoencoder.

    Attributes:
        config: what it was built from.
        out_channels: ``channels``.
        null_class: None.
        checkpointing: recompute each layer in backward instead of keeping its activations. False at first.
        discriminator: of an adversarial objective, or None.
        latent_mean, latent_std: buffers ``[c]``, what latents are normalised with; 0 and 1 until measured.
    """

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.out_channels = config.channels
        self.encoder, self.decoder = encoder(config), decoder(config)
        self.discriminator = PatchDiscriminator(config.channels, config.discriminator) if config.discriminator else None
        if config.variational:
            # A narrow posterior, e^-3 wide: under noise as wide as its prior a decoder learns to ignore the latents.
            with torch.no_grad():
                head = cast(Head, self.encoder[-1]).conv
                head.weight[config.latent_channels :].zero_()
                cast(Tensor, head.bias)[config.latent_channels :].fill_(-6)
        self.register_buffer("latent_mean", torch.zeros(config.latent_channels))
        self.register_buffer("latent_std", torch.ones(config.latent_channels))

    def noise_shape(self, x: Tensor) -> tuple[int, ...] | None:
        """Of the noise that :meth:`forward` takes with clips ``x``; None if the tokenizer is not variational."""
        (s, f), (b, _, t, h, w) = self.config.factors, x.shape
        return (b, self.config.latent_channels, 1 + (t - 1) // s, h // f, w // f) if self.config.variational else None

    def forward(self, x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The reconstruction and the penalty.

        Args:
            x: clips ``[B, C, 1 + s k, H, W]``.
            noise: standard normal, of :meth:`noise_shape`, to sample the latents; None takes their mean.

        Returns:
            The reconstruction, of x's shape, and the mean KL divergence of a latent in nats, a scalar.

        Raises:
            ValueError: clips of another shape, or noise for a tokenizer that is not variational.
        """
        mean, log_variance = self.posterior(x)
        if log_variance is None:
            if noise is not None:
                raise ValueError("noise was given to a tokenizer that is not variational")
            return self.decoder(mean, None, self.checkpointing), mean.new_zeros(())
        z = mean if noise is None else mean + (log_variance / 2).exp() * noise
        mean, log_variance = at_least_float32(mean), at_least_float32(log_variance)  # its terms cancel
        kl = (mean.square() + log_variance.exp() - 1 - log_variance) / 2
        return self.decoder(z, None, self.checkpointing), kl.mean()

    def posterior(self, x: Tensor, memory: Memory | None = None) -> tuple[Tensor, Tensor | None]:
        """Mean and log-variance of the latents, not normalised; without the latter if not variational.

        Raises:
            ValueError: clips of another shape.
        """
        s, f = self.config.factors
        first = memory is None or not memory
        fits = x.dim() == 5 and x.shape[1] == self.config.channels and (x.shape[2] - first) % s == 0
        if not fits or x.shape[2] < 1 or any(n < 1 or n % f for n in x.shape[3:]):
            raise ValueError(
                f"x has shape {tuple(x.shape)}; it must be [B, {self.config.channels}, 1 + {s} k, {f} h, {f} w]"
            )
        z = self.encoder(x, memory, self.checkpointing)
        if not self.config.variational:
            return z, None
        mean, log_variance = z.chunk(2, dim=1)
        return mean, log_variance.clamp(-30, 20)

    def encode(self, x: Tensor, *, frames: int | None = None) -> Tensor:
        """Normalised latents of clips: the means of their posteriors.

        Args:
            x: ``[B, C, 1 + s k, H, W]`` in [-1, 1]; an image is a clip of one frame.
            frames: latent frames that are made at a time, to save memory; None for all. The result is the same but for
                the rounding of convolutions of another size.

        Returns:
            ``[B, c, 1 + k, H / f, W / f]``.

        Raises:
            ValueError: clips of another shape, or frames that are not positive.
        """
        if frames is None:
            z = self.posterior(x)[0]
        elif frames < 1:
            raise ValueError(f"frames is {frames}; it must be positive, or None")
        else:
            s, memory = self.config.factors[0], Memory()
            ends = [*range(1 + (frames - 1) * s, x.shape[2], frames * s), x.shape[2]]
            parts = itertools.pairwise([0, *ends])
            z = torch.cat([self.posterior(x[:, :, a:b], memory)[0] for a, b in parts], dim=2)
        return (z - self._row(self.latent_mean)) / self._row(self.latent_std)

    def decode(self, latents: Tensor, *, tile: Tile | None = None) -> Tensor:
        """Clips of normalised latents.

        Args:
            latents: ``[B, c, 1 + k, h, w]``.
            tile: the parts to decode in, to save memory; None for the whole at once.

        Returns:
            ``[B, C, 1 + s k, f h, f w]``.

        Raises:
            ValueError: latents of another shape.
        """
        channels = self.config.latent_channels
        if latents.dim() != 5 or latents.shape[1] != channels or latents.shape[2] < 1:
            raise ValueError(f"latents have shape {tuple(latents.shape)}; it must be [B, {channels}, 1 + k, h, w]")
        z = latents * self._row(self.latent_std) + self._row(self.latent_mean)
        if tile is None:
            return self.decoder(z, None, self.checkpointing)
        if tile.size is None:
            return self._decode_frames(z, tile.frames)

        (s, f), (b, _, t, h, w) = self.config.factors, z.shape
        height, width = min(tile.size[0], h), min(tile.size[1], w)
        video = z.new_zeros(b, self.config.channels, 1 + (t - 1) * s, h * f, w * f)
        weights = z.new_zeros(h * f, w * f)
        for top in starts(h, height, tile.overlap):
            for left in starts(w, width, tile.overlap):
                part = self._decode_frames(z[..., top : top + height, left : left + width], tile.frames)
                place = (..., slice(top * f, (top + height) * f), slice(left * f, (left + width) * f))
                rows = ramp(top * f, height * f, h * f, tile.overlap * f, z)
                weight = rows[:, None] * ramp(left * f, width * f, w * f, tile.overlap * f, z)
                video[place] += part * weight
                weights[place] += weight
        return video / weights

    def _decode_frames(self, z: Tensor, frames: int | None) -> Tensor:
        if frames is None:
            return self.decoder(z, None, self.checkpointing)
        memory = Memory()
        return torch.cat([self.decoder(part, memory) for part in z.split(frames, dim=2)], dim=2)

    @staticmethod
    def _row(statistic: Tensor) -> Tensor:
        return statistic[:, None, None, None]


@torch.no_grad()
def measure_latents(model: CausalTokenizer, batches: Iterable[Tensor]) -> None:
    """Set ``latent_mean`` and ``latent_std`` to those of the latents of clips, each ``[B, C, T, H, W]``.

    Raises:
        ValueError: no clip, or a channel of latents that does not vary.
    """
    count, total, squares = 0, torch.zeros(()), torch.zeros(())
    for x in batches:
        z = model.posterior(x)[0].double().transpose(0, 1).flatten(1).cpu()
        count, total, squares = count + z.shape[1], total + z.sum(1), squares + z.square().sum(1)
    if not count:
        raise ValueError("there is no clip to measure the latents of")
    mean = total / count
    variance = squares / count - mean.square()
    if (variance <= 1e-12).any():
        raise ValueError(f"channels {(variance <= 1e-12).nonzero().flatten().tolist()} of the latents do not vary")
    model.latent_mean.copy_(mean)
    model.latent_std.copy_(variance.sqrt())


def systems() -> dict[str, System]:
    """W.A.L.T's tokenizer."""
    return {"walt-tokenizer": System(TokenizerSettings(), Reconstruction())}
