"""Pretrained autoencoders of diffusers: clips to scaled latents and back.

    latents = (mode or sample of q(z | video) - mean) * scaling / std        decode takes it back

| class                   | frames | cells per latent, per axis | mean, std                    | scaling          |
|---|---|---|---|---|
| ``AutoencoderKL``       | each alone | 1, and 8 in space | ``shift_factor``, 1 | 0.18215 for Stable Diffusion |
| ``AutoencoderKLWan``    | causal | 4, and 8 or 16 in space | ``latents_mean``, ``latents_std`` | 1 |
| ``AutoencoderKLCogVideoX`` | causal | 4, and 8 in space | 0, 1 | 1.15258426 or 0.7 |

The numbers are read from the config of the autoencoder at hand; the table has those of the published weights. A causal
one encodes the first frame and then so many frames at a time: 1 + 4 k frames are 1 + k latent frames, images are one.
CogVideoX decodes an even number of latent frames as if it had no first frame, so its k must be even. Other numbers of
frames are refused: diffusers drops or regroups some of them without a word.

Source: Rombach et al. 2021 (arXiv 2112.10752); Wan 2025 (arXiv 2503.20314); CogVideoX, Yang et al. 2024 (arXiv
2408.06072).
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..runtime.packages import package

KINDS = ("AutoencoderKL", "AutoencoderKLWan", "AutoencoderKLCogVideoX")


class PretrainedAutoencoder:
    """A frozen autoencoder in eval mode; :func:`load_autoencoder` makes it.

    Attributes:
        model: diffusers' own module, for its ``enable_slicing`` and ``enable_tiling``.
        kind: its class.
        channels: C', of the latents.
        spatial, temporal: pixels and frames of one cell of the latents.
        causal: whether the first frame has a latent frame of its own.
    """

    def __init__(self, model: Any) -> None:
        self.model = model.eval().requires_grad_(False)
        self.kind = type(model).__name__
        config = model.config
        if self.kind == "AutoencoderKLWan":
            self.channels: int = config.z_dim
            self.spatial = 2 ** (len(config.dim_mult) - 1) * (config.get("patch_size") or 1)
            self.temporal = 2 ** sum(config.temperal_downsample)
        else:
            self.channels = config.latent_channels
            self.spatial = 2 ** (len(config.block_out_channels) - 1)
            self.temporal = int(config.get("temporal_compression_ratio") or 1)
        self.causal = self.kind != "AutoencoderKL"
        self._together = 2 if self.kind == "AutoencoderKLCogVideoX" else 1
        self._mean = self._per_channel("latents_mean", config.get("shift_factor") or 0.0)
        self._std = self._per_channel("latents_std", 1.0) / (config.get("scaling_factor") or 1.0)

    def _per_channel(self, name: str, otherwise: float) -> Tensor:
        """``[C', 1, 1, 1]``, fp32, on the model's device."""
        values = self.model.config.get(name)
        values = [otherwise] * self.channels if values is None else values
        return torch.tensor(values, dtype=torch.float32, device=self.model.device).reshape(-1, 1, 1, 1)

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """``(C', T', H', W')`` of the latents of a clip.

        Raises:
            ValueError: a clip that does not divide into cells.
        """
        self._check_frames("frames", frames, self.temporal * self._together)
        for name, size in (("height", height), ("width", width)):
            if size < 1 or size % self.spatial:
                raise ValueError(f"{name} is {size}; {self.kind} takes a multiple of {self.spatial}")
        cells = self.causal + (frames - self.causal) // self.temporal
        return self.channels, cells, height // self.spatial, width // self.spatial

    def clip_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """``(3, T, H, W)`` of the clip that latents of so many frames and cells are decoded to.

        Raises:
            ValueError: a number of latent frames that is not decoded to such a clip.
        """
        self._check_frames("latent frames", frames, self._together)
        return 3, self.causal + (frames - self.causal) * self.temporal, height * self.spatial, width * self.spatial

    def _check_frames(self, name: str, count: int, step: int) -> None:
        if count < 1 or (count - self.causal) % step:
            raise ValueError(f"the number of {name} is {count}; {self.kind} takes 1 + a multiple of {step}")

    @torch.no_grad()
    def encode(self, video: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Latents ``[B, C', T', H', W']`` in fp32, about unit scale.

        Args:
            video: ``[B, 3, T, H, W]`` in [-1, 1], floating point.
            generator: draw from q(z | video) with it, on the video's device; None takes its mode.

        Raises:
            ValueError: a shape that does not fit.
        """
        if video.dim() != 5 or video.shape[1] != 3:
            raise ValueError(f"video has shape {tuple(video.shape)}; it must be [B, 3, T, H, W]")
        shape = self.latent_shape(*video.shape[2:])
        x = video.to(self.model.dtype)
        posterior = self.model.encode(x if self.causal else _fold(x)).latent_dist
        z = posterior.mode() if generator is None else posterior.sample(generator)
        z = z if self.causal else _unfold(z, len(video))
        if z.shape[1:] != shape:
            raise ValueError(f"{self.kind} made latents {tuple(z.shape[1:])} of a clip; they should be {shape}")
        return (z.float() - self._mean) / self._std

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Video ``[B, 3, T, H, W]`` in [-1, 1], fp32, of latents ``[B, C', T', H', W']``.

        Raises:
            ValueError: a shape that does not fit.
        """
        if latents.dim() != 5 or latents.shape[1] != self.channels:
            raise ValueError(f"latents have shape {tuple(latents.shape)}; it must be [B, {self.channels}, T', H', W']")
        shape = self.clip_shape(*latents.shape[2:])
        z = (latents.float() * self._std + self._mean).to(self.model.dtype)
        if self.causal:
            video = self.model.decode(z).sample
        else:
            video = _unfold(self.model.decode(_fold(z)).sample, len(latents))
        if video.shape[1:] != shape:
            raise ValueError(f"{self.kind} made a clip {tuple(video.shape[1:])} of latents; it should be {shape}")
        return video.float().clamp(-1, 1)


def _fold(x: Tensor) -> Tensor:
    """``[B, C, T, H, W]`` as images ``[B * T, C, H, W]``."""
    return x.transpose(1, 2).flatten(0, 1)


def _unfold(x: Tensor, batch: int) -> Tensor:
    return x.unflatten(0, (batch, -1)).transpose(1, 2)


def load_autoencoder(
    name: str | Path,
    *,
    subfolder: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> PretrainedAutoencoder:
    """An autoencoder from a folder, or by the hub name of one that was downloaded before: nothing is downloaded here.

    Args:
        name: folder with ``config.json`` and weights, or a hub name.
        subfolder: where it lies inside of that; ``"vae"`` in a pipeline.
        dtype: of its weights and activations; latents and video are fp32 in any case.
        device: where it runs.

    Raises:
        ValueError: no autoencoder there, one of another class, or a missing package.
    """
    diffusers = package("diffusers")
    options = {"subfolder": subfolder, "local_files_only": True}
    try:
        found = diffusers.AutoencoderKL.load_config(str(name), **options).get("_class_name")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"autoencoder {str(name)!r} is neither a folder with one nor the hub name of a downloaded one: {error}"
        ) from error
    if found not in KINDS:
        raise ValueError(f"autoencoder {str(name)!r} is a {found}; it may be one of {', '.join(KINDS)}")
    try:
        model, loading = getattr(diffusers, found).from_pretrained(str(name), output_loading_info=True, **options)
    except pickle.UnpicklingError as error:
        # torch's own message goes on to advise loading the file unsafely.
        raise ValueError(
            f"autoencoder {str(name)!r} is refused: it holds more than tensors and plain values"
        ) from error
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"autoencoder {str(name)!r} cannot be loaded: {error}") from error
    if loading["missing_keys"]:
        raise ValueError(f"autoencoder {str(name)!r} lacks weights, {', '.join(sorted(loading['missing_keys']))}")
    return PretrainedAutoencoder(model.to(device, dtype))
