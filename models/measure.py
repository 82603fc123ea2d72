"""``python -m models.measure RUN``: what an autoencoder's reconstructions are worth, and the scale of its latents.

Prints the peak signal-to-noise ratio of reconstructed clips, mean and least, and writes a picture of some beside the
checkpoint. Digits are judged on held-out data, other sources on new crops of the training clips. A tokenizer's
latents are measured on the training clips, and their mean and deviation by channel are written into the checkpoint,
where ``encode`` and ``decode`` normalise with them; do this before anything is trained on its latents. A VQGAN keeps
the ``scale`` of its configuration: mean and deviation of a channel are what its batch norm has learned, and
``models.precompute --normalize`` takes them out.
"""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor

from minisora_kernels.commands import command

from . import checkpoint as checkpoints
from .autoencoders.tokenizer import CausalTokenizer, measure_latents
from .checkpoint import open_checkpoint
from .data.batches import Batches
from .data.config import DataConfig
from .data.media import contact_sheet, write_png
from .data.moving_digits import MovingDigits
from .data.open import open_source
from .data.pixels import to_bytes
from .data.source import Source
from .data.wrappers import ReducedClips
from .objectives.reconstruction import Reconstruction, psnr
from .runtime.arguments import read
from .runtime.device import choose_device
from .runtime.files import locked
from .training.config import from_dict


@dataclass(frozen=True)
class MeasureConfig:
    """The autoencoder and the clips of a measurement."""

    checkpoint: tyro.conf.Positional[Path]
    """Checkpoint, or folder of a run for its newest complete checkpoint."""
    batches: int = 16
    """Number of batches for each of the two measurements."""
    batch_size: int = 16
    """Clips per batch."""
    seed: int = 1
    """Seed of the crops and starts."""
    device: str = "auto"
    """Device: 'cpu', 'cuda', 'cuda:1' and so on. 'auto' is CUDA if there is a device, else the CPU."""


def _clips(source: Source, config: MeasureConfig, device: torch.device) -> list[Tensor]:
    batches = Batches(source, config.batch_size, config.seed, prefetch=0)
    return [batches.batch(step)[0].to(device) for step in range(config.batches)]


def _sources(data: DataConfig) -> tuple[Source, Source]:
    """Training clips, and those to judge on."""
    source = open_source(data)
    if data.source != "digits":
        return source, source
    judged: Source = MovingDigits(frames=data.frames, size=data.size, stride=data.stride, held_out=True)
    return source, judged if data.reduce == 1 else ReducedClips(judged, data.reduce)


@torch.no_grad()
def run(config: MeasureConfig) -> dict[str, float]:
    """Measure as configured; returns ``psnr`` and ``least psnr`` in dB.

    Raises:
        ValueError: a file that is not a checkpoint, one of a model that is not an autoencoder, or one of a tokenizer
            under another name than its run gave it, which could not be written again.
    """
    for name in ("batches", "batch_size"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} is {getattr(config, name)}; it must be at least 1")
    if config.seed < 0:
        raise ValueError(f"seed is {config.seed}; it must be at least 0")
    path, checkpoint = open_checkpoint(config.checkpoint)
    trained = from_dict(checkpoint.train)
    if not isinstance(trained.objective, Reconstruction):
        raise ValueError(f"{path} was trained with objective {trained.objective.name!r}; it must be an autoencoder's")
    if trained.model.name == "tokenizer" and path != checkpoints.path_of(path.parent, checkpoint.step):
        raise ValueError(
            f"{path} is not named as its run named it, {checkpoints.path_of(path.parent, checkpoint.step)}"
        )
    device = choose_device(config.device)
    model = checkpoint.build().to(device).eval()
    training, judged = _sources(trained.data)
    batches = _clips(judged, config, device)
    ratios = torch.cat([psnr(x, model(x)[0]) for x in batches])
    pairs = to_bytes(Reconstruction.preview(model, batches[0][:4])).permute(0, 2, 3, 4, 1)
    write_png(path.parent / "reconstructions.png", contact_sheet(pairs.cpu().numpy()))
    if isinstance(model, CausalTokenizer):
        measure_latents(model, _clips(training, config, device))
        measured = {name: getattr(model, name).cpu() for name in ("latent_mean", "latent_std")}
        changed = dataclasses.replace(
            checkpoint, model={**checkpoint.model, **measured}, ema={**checkpoint.ema, **measured}
        )
        with locked(path.parent):
            checkpoints.save(path.parent, changed, trained.keep)
    return {"psnr": ratios.mean().item(), "least psnr": ratios.min().item()}


@command()
def main(arguments: list[str]) -> None:
    logging.basicConfig(format="%(message)s")
    config = read(MeasureConfig, f"python -m {__package__}.measure", __doc__, arguments)
    result = run(config)
    clips = config.batches * config.batch_size
    print(f"PSNR of {clips} clips: {result['psnr']:.2f} dB, at least {result['least psnr']:.2f} dB")


if __name__ == "__main__":
    main()
