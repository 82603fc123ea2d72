"""Autoencoders as the sources of latents, ``models.precompute`` and the sampler use them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import checkpoint as checkpoints
from ..autoencoders.pretrained import load_autoencoder
from ..protocols import Autoencoder
from .checksums import describe, sha256_of, sha256_of_folder
from .pixels import to_float
from .source import Shape


class Encoder(Protocol):
    """An autoencoder, as this module and ``models.precompute`` use it."""

    def shape(self, pixels: Shape) -> Shape:
        """``(C, T, H, W)`` of the latents of clips of ``pixels``; ValueError if it does not take such clips."""
        ...

    def encode(self, clips: Tensor) -> Tensor:
        """uint8 ``[B, C, T, H, W]`` to float32 latents ``[B, C', T', H', W']``."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Latents to float32 pixels in [-1, 1]."""
        ...


class Pixels:
    """The identity: latents are the pixels in [-1, 1]."""

    def shape(self, pixels: Shape) -> Shape:
        return pixels

    def encode(self, clips: Tensor) -> Tensor:
        return to_float(clips)

    def decode(self, latents: Tensor) -> Tensor:
        return latents.float()


class FrozenAutoencoder:
    """Anything with ``encode`` and ``decode`` between pixels in [-1, 1] and latents, both ``[B, C, T, H, W]``."""

    def __init__(self, autoencoder: Any, device: torch.device) -> None:
        self.autoencoder, self.device = autoencoder, device

    def shape(self, pixels: Shape) -> Shape:
        try:
            channels, frames, height, width = self.encode(torch.zeros(1, *pixels, dtype=torch.uint8)).shape[1:]
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"the encoder does not take clips of {pixels} (C, T, H, W): {error}") from error
        return channels, frames, height, width

    def encode(self, clips: Tensor) -> Tensor:
        return self._run(self.autoencoder.encode, to_float(clips))

    def decode(self, latents: Tensor) -> Tensor:
        return self._run(self.autoencoder.decode, latents).clamp(-1, 1)

    @torch.no_grad()
    def _run(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        # Half precision is for the model that is trained; an autoencoder may overflow in it.
        with torch.autocast(self.device.type, enabled=False):
            return function(x.to(self.device)).float()


def identify(path: str | Path) -> dict[str, Any]:
    """Which encoder this is: ``{"kind", "path", "sha256"}``.

    Args:
        path: ``"pixels"``; a checkpoint of an autoencoder or a run's folder for its newest one (kind "checkpoint"); or
            a folder that diffusers' ``save_pretrained`` wrote (kind "diffusers").

    Raises:
        ValueError: none of these.
    """
    if str(path) == "pixels":
        return {"kind": "pixels", "path": "pixels", "sha256": None}
    path = Path(path)
    if path.is_dir() and any(path.glob("step_*.pt")):
        path = checkpoints.latest(path)[0]
    if checkpoints.is_checkpoint(path):
        digest = sha256_of_folder(path) if path.is_dir() else sha256_of(path)
        return {"kind": "checkpoint", "path": str(path.resolve()), "sha256": digest}
    if (path / "config.json").is_file():
        return {"kind": "diffusers", "path": str(path.resolve()), "sha256": sha256_of_folder(path)}
    raise ValueError(
        f"encoder is {str(path)!r}, which is not there; it may be 'pixels', a checkpoint of an autoencoder, the folder "
        f"of its run, or a folder of a diffusers autoencoder"
    )


def open_encoder(record: Mapping[str, Any], device: torch.device, path: str | Path | None = None) -> Encoder:
    """The encoder of a record that :func:`identify` made, loaded from ``path`` or where it was then.

    Raises:
        ValueError: it is not there, is another one than the record says, or cannot encode and decode.
    """
    try:
        found = identify(path or record["path"])
    except ValueError as error:
        raise ValueError(f"{error}; the latents were made with {describe(record)}") from None
    if (found["kind"], found["sha256"]) != (record["kind"], record["sha256"]):
        raise ValueError(f"encoder {describe(found)} is not the one of the latents, {describe(record)}")
    if found["kind"] == "pixels":
        return Pixels()
    if found["kind"] == "diffusers":
        return FrozenAutoencoder(load_autoencoder(found["path"], device=device), device)
    checkpoint = checkpoints.load(found["path"])
    if checkpoint.encoder is not None:
        raise ValueError(f"encoder {found['path']} was trained on latents itself; it must be trained on pixels")
    module = checkpoint.build()
    if not isinstance(module, Autoencoder):
        raise ValueError(f"encoder {found['path']} holds a {type(module).__name__}, which has no encode and decode")
    return FrozenAutoencoder(module.to(device).eval().requires_grad_(False), device)


class Decoder:
    """Latents as :class:`LatentClips` gives them, ``[B, C, T, H, W]``, to pixels in [-1, 1], and back.

    ``record`` is the source's ``encoder``, which checkpoints keep; ``path`` as for :func:`open_encoder`.
    """

    def __init__(self, record: Mapping[str, Any], device: torch.device, path: str | Path | None = None) -> None:
        self.encoder = open_encoder(record, device, path)
        self.moments = None
        if record["mean"] is not None:
            self.moments = [torch.tensor(record[key], device=device).view(-1, 1, 1, 1) for key in ("mean", "std")]

    def __call__(self, latents: Tensor) -> Tensor:
        latents = latents.float()
        if self.moments is not None:
            mean, std = self.moments
            latents = latents * std + mean
        return self.encoder.decode(latents)

    def encode(self, clips: Tensor) -> Tensor:
        """Such latents, float32, of uint8 clips ``[B, C, T, H, W]``."""
        latents = self.encoder.encode(clips)
        if self.moments is not None:
            mean, std = self.moments
            latents = (latents - mean) / std
        return latents
