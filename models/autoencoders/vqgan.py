"""Stage A of StableCascade: a VQGAN that makes images, or the frames of a video, four times smaller (f4).

    h       = patch_embed(x, 2 x 2)                                        width / 2
    h       = block(conv(block(h)))                                        width, the convolution halves H and W
    z       = batch_norm(Linear(h))                                        [F, h w, c], c = 4, F frames
    e       = the nearest of the codes to each z                           e_q, q = argmin_j |z - code_j|
    x'      = unpatchify(Linear(block(conv^T(blocks(Linear(z_q))))))       z_q = z + sg(e - z)
    penalty = mean (sg(z) - e)^2 + 0.25 mean (z - sg(e))^2

sg stops the gradient, so that of z_q passes straight through to z; the first term moves the codes, the second commits
the encoder to them. A block mixes space, then channels, with six learned numbers m, at first 0, so it starts as the
identity:

    x = x + m_2 depthwise(norm(x) (1 + m_0) + m_1)          3 x 3, the border repeated
    x = x + m_5 mlp(norm(x) (1 + m_3) + m_4)                Linear, GELU, Linear

The GELU is the exact one, hence not ``gelu_mlp``. Latents for a diffusion are z without the quantiser, divided by
``scale``. The codes start as standard normals, the scale of z behind the batch norm: codes that start much closer to 0
than z are mostly never the nearest.

Source: Pernias et al. 2023 (arXiv 2306.00637) and StableCascade's published stage A; VQGAN, Esser et al. 2021
(arXiv 2012.09841); straight-through codes, van den Oord et al. 2017 (arXiv 1711.00937).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from minisora_kernels import adaln, gate_residual, gate_residual_adaln, unpatchify

from ..denoisers.layers import embed_patches
from ..objectives.reconstruction import Reconstruction
from ..parallel.norms import batch_norm
from ..protocols import Autoencoder, BaseSettings, System
from ..runtime.recompute import recomputed
from .discriminator import PatchDiscriminator

FACTOR = 4


COMMITMENT = 0.25


# Latents that are compared with the codes at a time: 128 MB of distances with 8192 codes.
ROWS = 4096


@dataclass(frozen=True)
class VQGANSettings(BaseSettings):
    """What a VQGAN is, whatever it is trained on."""

    name: ClassVar[str] = "vqgan"
    autoencoder: ClassVar[bool] = True

    width: int = 384
    """Channels of the lower level; the upper level has half of them."""
    blocks: int = 12
    """Number of blocks in the decoder's lower level; every other place has one."""
    latent_channels: int = 4
    codes: int = 8192
    scale: float = 0.43
    """Divisor of the latents. The default is StableCascade's and was not measured; see `normalize` of
    models.precompute."""
    unit_pixels: bool = False
    """Compute on pixels in [0, 1], as published weights do; clips are in [-1, 1] all the same."""
    discriminator: int = 0
    """Width of the discriminator of an adversarial objective; 0 for none."""


@dataclass(frozen=True, kw_only=True)
class VQGANConfig(VQGANSettings):
    """What a VQGAN is built from; survives ``dataclasses.asdict``, JSON and ``VQGANConfig(**values)``.

    Args:
        input_size: ``(T, H, W)`` of the training clips, in pixels; H and W are multiples of 4. The network itself takes
            every such size.
        channels: of the input.
        num_classes: of the data; an autoencoder makes no use of classes.

    Raises:
        ValueError: a value that does not fit, by name.
    """

    input_size: tuple[int, ...]
    channels: int
    num_classes: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "input_size", tuple(self.input_size))
        for name in ("width", "blocks", "latent_channels", "codes", "channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive")
        for name in ("discriminator", "num_classes"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative")
        if self.width % 2:
            raise ValueError(f"width is {self.width}; it must be even")
        if self.scale <= 0:
            raise ValueError(f"scale is {self.scale}; it must be positive")
        size = self.input_size
        if len(size) != 3 or any(n < 1 for n in size) or any(n % FACTOR for n in size[1:]):
            raise ValueError(f"input_size is {size}; it must be (T, H, W) with H and W multiples of {FACTOR}")

    @property
    def grid(self) -> tuple[int, int, int]:
        """Cells of the latents ``(T, H', W')`` of a training clip."""
        t, h, w = self.input_size
        return t, h // FACTOR, w // FACTOR


class Block(nn.Module):
    """Tokens ``[F, h w, D]`` of frames to the same; the equations are at the top of this module."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, padding_mode="replicate", groups=width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.gammas = nn.Parameter(torch.zeros(6))

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        m = self.gammas[:, None, None].expand(-1, len(x), x.shape[-1])
        branch = tokens(self.depthwise(frames(adaln(x, m[1], m[0]), grid)))
        x, y = gate_residual_adaln(x, branch, m[2], m[4], m[3])
        return gate_residual(x, self.mlp(y), m[5])


def frames(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Tokens ``[F, h w, D]`` as frames ``[F, D, h, w]``, channels last in memory."""
    return x.transpose(1, 2).unflatten(2, grid)


def tokens(x: Tensor) -> Tensor:
    """Frames ``[F, D, h, w]`` as tokens ``[F, h w, D]``."""
    return x.flatten(2).transpose(1, 2).contiguous()


class VQGAN(Autoencoder):
    """The autoencoder.

    Attributes:
        config: what it was built from.
        out_channels: ``channels``.
        null_class: None.
        checkpointing: recompute each block in backward instead of keeping its activations. False at first.
        discriminator: of an adversarial objective, or None.
    """

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        self.config = config
        self.out_channels = config.channels
        low, high, c = config.width, config.width // 2, config.latent_channels
        self.patches = nn.Conv2d(config.channels, high, 2, 2)
        self.encoder_high, self.encoder_low = Block(high), Block(low)
        self.down = nn.Conv2d(high, low, 4, 2, padding=1)
        self.to_latents = nn.Linear(low, c, bias=False)
        self.norm = nn.BatchNorm1d(c)
        self.codebook = nn.Embedding(config.codes, c)
        self.from_latents = nn.Linear(c, low)
        self.decoder_low = nn.ModuleList(Block(low) for _ in range(config.blocks))
        self.up = nn.ConvTranspose2d(low, high, 4, 2, padding=1)
        self.decoder_high = Block(high)
        self.pixels = nn.Linear(high, 4 * config.channels)
        self.discriminator = PatchDiscriminator(config.channels, config.discriminator) if config.discriminator else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The reconstruction and the penalty.

        Args:
            x: ``[B, C, H, W]`` or ``[B, C, T, H, W]``.

        Returns:
            The reconstruction, of x's shape, and the codebook and commitment loss, a scalar.

        Raises:
            ValueError: x of another shape.
        """
        z = self._latents(x)
        e = self.codebook(self.nearest(z)).to(z.dtype)
        penalty = (z.detach() - e).square().mean() + COMMITMENT * (z - e.detach()).square().mean()
        return self._decode(z + (e - z).detach(), x.shape), penalty

    def encode(self, x: Tensor) -> Tensor:
        """Latents for a diffusion, ``z / scale``, not quantised: ``[B, c, (T,) H / 4, W / 4]``.

        Args, raises: as for :meth:`forward`.
        """
        z = frames(self._latents(x), (x.shape[-2] // FACTOR, x.shape[-1] // FACTOR)) / self.config.scale
        return z if x.dim() == 4 else z.unflatten(0, (len(x), -1)).transpose(1, 2)

    def decode(self, latents: Tensor) -> Tensor:
        """Images or clips ``[B, C, (T,) 4 h, 4 w]`` of latents ``[B, c, (T,) h, w]``.

        Raises:
            ValueError: latents of another shape.
        """
        if latents.dim() not in (4, 5) or latents.shape[1] != self.config.latent_channels:
            raise ValueError(
                f"latents have shape {tuple(latents.shape)}; it must be [B, {self.config.latent_channels}, (T,) h, w]"
            )
        z = latents if latents.dim() == 4 else latents.transpose(1, 2).flatten(0, 1)
        size = (len(latents), self.config.channels, *latents.shape[2:-2], *(FACTOR * n for n in latents.shape[-2:]))
        return self._decode(tokens(z * self.config.scale), size)

    @torch.no_grad()
    def nearest(self, z: Tensor) -> Tensor:
        """Numbers of the codes nearest to latents ``z [..., c]``: ``[...]``, int64. In float32 at least.

        argmin_j |z - code_j|^2 = argmin_j |code_j|^2 - 2 z . code_j
        """
        with torch.autocast(z.device.type, enabled=False):
            codes = self.codebook.weight.to(torch.promote_types(z.dtype, torch.float32))
            squares = codes.square().sum(1)
            rows = z.to(codes.dtype).flatten(0, -2).split(ROWS)
            return torch.cat([(squares - 2 * row @ codes.T).argmin(1) for row in rows]).view(z.shape[:-1])

    def _latents(self, x: Tensor) -> Tensor:
        """``z [F, h w, c]`` of the frames, not scaled."""
        if x.dim() not in (4, 5) or x.shape[1] != self.config.channels or any(n % FACTOR for n in x.shape[-2:]):
            raise ValueError(
                f"x has shape {tuple(x.shape)}; it must be [B, {self.config.channels}, (T,) H, W], H and W multiples "
                f"of {FACTOR}"
            )
        if x.dim() == 5:
            x = x.transpose(1, 2).flatten(0, 1)
        if self.config.unit_pixels:
            x = (x + 1) / 2
        height, width = x.shape[-2:]
        h = embed_patches(x, self.patches)
        h = self._block(self.encoder_high, h, (height // 2, width // 2))
        h = tokens(self.down(frames(h, (height // 2, width // 2))))
        h = self._block(self.encoder_low, h, (height // 4, width // 4))
        return batch_norm(self.norm, self.to_latents(h).flatten(0, 1)).unflatten(0, (len(x), -1))

    def _decode(self, z: Tensor, shape: Sequence[int]) -> Tensor:
        """Images or clips of that shape from ``z [F, h w, c]``, not scaled."""
        height, width = (n // FACTOR for n in shape[-2:])
        h = self.from_latents(z)
        for block in self.decoder_low:
            h = self._block(block, h, (height, width))
        h = tokens(self.up(frames(h, (height, width))))
        h = self._block(self.decoder_high, h, (2 * height, 2 * width))
        x = unpatchify(self.pixels(h), (2 * height, 2 * width), (2, 2), self.config.channels)
        if self.config.unit_pixels:
            x = 2 * x - 1
        return x if len(shape) == 4 else x.unflatten(0, (shape[0], -1)).transpose(1, 2)

    def _block(self, block: nn.Module, x: Tensor, grid: tuple[int, int]) -> Tensor:
        return recomputed(block, x, grid, checkpointing=self.checkpointing)


def systems() -> dict[str, System]:
    """StableCascade's stage A."""
    return {"cascade-a": System(VQGANSettings(), Reconstruction(penalty_weight=1.0))}
