"""``python -m models.digits``: train on moving digits, then count the generated frames that show the digit asked for.

Presets of latents need other presets to be trained before them (:data:`models.training.presets.PREREQUISITES`): the
autoencoder, and for stage B of StableCascade also stage C, whose small clips it makes large. These are trained first,
and samples go all the way: small clips, latents, frames.

A small convolutional network learns the ten digits from real frames. Its accuracy on frames of handwritten digits that
neither it nor the diffusion model has seen says how far to trust its count on the generated ones. A digit moves by one
pixel a frame on either axis; the share of frame pairs where the centre moves so measures the motion.
"""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minisora_kernels.commands import command

from . import checkpoint as checkpoints
from . import measure, precompute
from .checkpoint import Checkpoint
from .data.batches import Batches
from .data.encoder import Decoder
from .data.latents import LATENT_INDEX
from .data.media import contact_sheet, write_png
from .data.moving_digits import MovingDigits
from .data.pixels import to_bytes, to_float
from .runtime.allocator import reuse_large_allocations
from .runtime.arguments import read
from .runtime.device import choose_device
from .runtime.files import write_whole
from .runtime.plain import merge
from .runtime.progress import progress_bar
from .sampling.clips import ClipRequest, sample_clips
from .training.config import TrainConfig, from_dict
from .training.presets import PREREQUISITES, Prerequisite, preset
from .training.run import Stopped, train_or_continue


@dataclass(frozen=True)
class DigitsConfig:
    """The runs and the clips to judge."""

    preset: str = "digits"
    """Preset of digits to train; see `python -m models.train --help`."""
    runs: Path = Path("runs")
    """Folder of the runs, each named after its preset. An interrupted run continues; a complete one is only judged."""
    per_class: int = 20
    """Number of clips per digit."""
    steps: int = 30
    """Steps of the objective's default solver."""
    guidance: float = 3.0
    """Scale of classifier-free guidance; 1 is none."""
    seed: int = 1
    """Seed of the noise."""


class Classifier(nn.Module):
    """Logits ``[B, 10]`` of frames ``[B, 1, H, W]`` in [-1, 1]."""

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(64 * (size[0] // 4) * (size[1] // 4), 128),
            nn.ReLU(),
            nn.Linear(128, 10),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def train_classifier(size: tuple[int, int], steps: int = 600, batch_size: int = 128, seed: int = 0) -> Classifier:
    """A classifier of single frames, trained on the digits that the diffusion model is trained on."""
    torch.manual_seed(seed)
    classifier = Classifier(size)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    batches = Batches(MovingDigits(frames=1, size=size), batch_size, seed)
    for step in progress_bar(iterable=range(steps), desc="classifier"):
        x, y, _ = batches.batch(step)
        F.cross_entropy(classifier(x[:, :, 0]), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    batches.close()
    return classifier.eval()


@torch.no_grad()
def recognition_rates(classifier: Classifier, clips: Tensor, labels: Tensor) -> Tensor:
    """Share of each clip's frames, uint8 ``clips [N, T, H, W, 1]``, that are classified as its label: ``[N]``."""
    frames = to_float(clips).flatten(0, 1).permute(0, 3, 1, 2)
    predicted = torch.cat([classifier(part).argmax(1) for part in frames.split(512)])
    return (predicted.view(clips.shape[:2]) == labels[:, None]).double().mean(1)


def moves(clips: Tensor) -> float:
    """Share of the steps from frame to frame of uint8 ``clips [N, T, H, W, 1]`` that are those of a moving digit.

    That is, the centre of brightness goes by one pixel, give or take a quarter, along each axis.
    """
    light = clips[..., 0].double()
    total = light.sum((2, 3)).clamp_min(1)
    rows, columns = (torch.arange(n, dtype=torch.float64) for n in light.shape[2:])
    centre = torch.stack(((light.sum(3) @ rows) / total, (light.sum(2) @ columns) / total), dim=-1)
    return ((centre.diff(dim=1).abs() - 1).abs() <= 0.25).all(-1).double().mean().item()


def held_out_clips(frames: int, size: tuple[int, int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """One real clip ``[T, H, W, 1]`` of every held-out digit, and the labels."""
    source = MovingDigits(frames=frames, size=size, held_out=True)
    pairs = [source.clip(index, np.random.default_rng((seed, index))) for index in range(len(source))]
    clips = torch.from_numpy(np.stack([clip for clip, _ in pairs]))
    return clips.permute(0, 2, 3, 4, 1), torch.tensor([label for _, label in pairs])


def config_of(name: str, runs: Path, backend: str = "auto") -> TrainConfig:
    """A preset whose run lies in ``runs``, beside what it needs; a ``backend`` that was asked for is in its name."""
    changes: dict[str, Any] = {"run": str(runs / (name if backend == "auto" else f"{name}-{backend}"))}
    if name in PREREQUISITES:
        changes["data"] = {"source": str(latents_of(PREREQUISITES[name], runs))}
    return merge(preset(name), changes | {"backend": backend})


def latents_of(needed: Prerequisite, runs: Path) -> Path:
    return runs / f"{needed.autoencoder}-latents"


def train(name: str, runs: Path, backend: str = "auto") -> Path:
    """Train a preset, and what it needs before, as far as that is still to be done; returns the last checkpoint.

    What it needs before is trained on the automatic backend, whatever ``backend`` is.
    """
    if name in PREREQUISITES:
        encode(PREREQUISITES[name], runs)
    small = PREREQUISITES[name].small if name in PREREQUISITES else None
    if small is not None:
        train(small, runs)
    return train_or_continue(config_of(name, runs, backend))


def encode(needed: Prerequisite, runs: Path) -> None:
    """Train the autoencoder and make its latents, if they are not there."""
    folder = latents_of(needed, runs)
    path = train(needed.autoencoder, runs)
    if (folder / LATENT_INDEX).is_file():
        return
    trained = preset(needed.autoencoder)
    if trained.model.name == "tokenizer":
        measure.run(measure.MeasureConfig(path))
    precompute.run(
        precompute.PrecomputeConfig(
            out=folder,
            encoder=str(path),
            data=trained.data,
            passes=needed.passes,
            normalize=trained.model.name != "tokenizer",  # whose latents are of unit scale once they are measured
            low=0 if needed.small is None else preset(needed.small).data.reduce,
        )
    )


def generate(config: DigitsConfig, checkpoint: Checkpoint, labels: Tensor, low: Tensor | None = None) -> Tensor:
    """uint8 clips ``[N, T, H, W, 1]`` of the digits asked for, from a checkpoint and, if it needs them, small clips."""
    trained = from_dict(checkpoint.train)
    if checkpoint.classes != list(MovingDigits.classes):
        raise ValueError(f"{trained.run} was trained on {trained.data.source!r}, not on digits")
    device = choose_device(trained.device)
    return sample_clips(
        checkpoint.build().to(device),
        trained.objective,
        ClipRequest(
            count=len(labels),
            y=labels,
            steps=config.steps,
            guidance=config.guidance,
            seed=config.seed + (low is not None),  # another stage, other noise
            batch_size=50,
            progress=True,
            decode=None if checkpoint.encoder is None else Decoder(checkpoint.encoder, device),
            low=low,
        ),
    )


@torch.no_grad()
def decode_again(checkpoint: Checkpoint, clips: Tensor) -> Tensor:
    """uint8 clips ``[N, T, H, W, 1]``, encoded and decoded by the autoencoder of a checkpoint of latents."""
    assert checkpoint.encoder is not None
    device = choose_device(from_dict(checkpoint.train).device)
    decoder = Decoder(checkpoint.encoder, device)
    parts = clips.permute(0, 4, 1, 2, 3).to(device).split(50)
    return torch.cat([to_bytes(decoder(decoder.encode(part))) for part in parts]).permute(0, 2, 3, 4, 1).cpu()


def judge(config: DigitsConfig, path: Path) -> dict[str, Any]:
    """Sample from the checkpoint, judge the frames, and write ``digits.json`` and ``digits.png`` beside it."""
    labels = torch.arange(10 * config.per_class) % 10
    small, low = PREREQUISITES[config.preset].small if config.preset in PREREQUISITES else None, None
    if small is not None:
        clips = generate(config, checkpoints.latest(config.runs / small)[1], labels)
        low = to_float(clips).permute(0, 4, 1, 2, 3)
    checkpoint = checkpoints.load(path)
    clips = generate(config, checkpoint, labels, low)
    frames, height, width = clips.shape[1:4]
    classifier = train_classifier((height, width))
    real, real_labels = held_out_clips(frames, (height, width))
    shares = recognition_rates(classifier, clips, labels)
    result = {
        "step": checkpoint.step,
        "real_frames": real.shape[0] * real.shape[1],
        "real_recognised": recognition_rates(classifier, real, real_labels).mean().item(),
        "real_moves": moves(real),
        "generated_frames": clips.shape[0] * clips.shape[1],
        "generated_recognised": shares.mean().item(),
        "generated_recognised_by_class": [shares[labels == digit].mean().item() for digit in range(10)],
        "generated_moves": moves(clips),
    }
    if checkpoint.encoder is not None:  # the most that a model of its latents can reach
        result["decoded_moves"] = moves(decode_again(checkpoint, real))
    write_whole(path.parent / "digits.json", (json.dumps(result, indent=2) + "\n").encode())
    write_png(path.parent / "digits.png", contact_sheet(clips[:10].numpy()))
    return result


def run(config: DigitsConfig) -> dict[str, Any]:
    """Train the preset, or go on with what is in the run's folder, then judge."""
    chosen, folder = preset(config.preset), config.runs / config.preset
    for name in ("per_class", "steps"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} is {getattr(config, name)}; it must be at least 1")
    digits = chosen.data.source == "digits" and chosen.data.reduce == 1 and not chosen.model.autoencoder
    if not digits and config.preset not in PREREQUISITES:
        raise ValueError(f"preset is {config.preset!r}; it must be a model that makes digits")
    result = judge(config, train(config.preset, config.runs))
    print(
        f"recognised: {result['generated_recognised']:.1%} of {result['generated_frames']} generated frames, "
        f"{result['real_recognised']:.1%} of {result['real_frames']} real frames of unseen digits\n"
        f"moving as a digit does: {result['generated_moves']:.1%} of the generated steps from frame to frame, "
        f"{result['real_moves']:.1%} of the real ones\n"
        f"  {folder / 'digits.json'}\n  {folder / 'digits.png'}"
    )
    return result


@command()
def main(arguments: list[str]) -> None:
    logging.basicConfig(format="%(message)s")
    reuse_large_allocations()
    try:
        run(read(DigitsConfig, f"python -m {__package__}.digits", __doc__, arguments))
    except Stopped as stopped:
        print(f"{stopped}\nrun the same command again to go on", file=sys.stderr)
        sys.exit(stopped.status)


if __name__ == "__main__":
    main()
