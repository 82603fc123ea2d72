"""The typed configuration of a training run: defaults, presets, and YAML or JSON files."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any, Literal

from ..data.config import DataConfig, TextConfig
from ..denoisers.dit import DiTSettings
from ..denoisers.lora import LoRAConfig
from ..objectives.ddpm import DDPM
from ..objectives.flow import FlowMatching
from ..objectives.reconstruction import Reconstruction
from ..parallel.config import ParallelConfig
from ..registry import Objective, Settings
from ..runtime.plain import merge
from ..runtime.recompute import Keeps, chosen


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, its learning rate over the steps, and the moving average of the weights."""

    learning_rate: float = 1e-4
    """Largest learning rate of AdamW."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and the second moment."""
    weight_decay: float = 0.0
    """Weight decay of AdamW."""
    warmup: int = 0
    """Number of steps in which the learning rate rises linearly from near 0."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Learning rate after the warm-up; 'cosine' and 'linear' reach 0 after the last step."""
    clip: float = 1.0
    """Largest norm of the gradient; 0 turns clipping off."""
    offload: bool = False
    """Keep the moments in the CPU's memory and step there; with shards the weights and gradients too."""
    ema: float = 0.9999
    """Decay of the EMA of the weights; early steps use the smaller (1 + step) / (10 + step)."""


@dataclass(frozen=True)
class PreviewConfig:
    """Samples drawn while training."""

    every: int = 0
    """Steps between previews; 0 makes only the one at the end."""
    count: int = 4
    """Number of clips."""
    steps: int = 20
    """Steps of the objective's default solver."""
    guidance: float = 1.0
    """Scale of classifier-free guidance; 1 is none."""


# The least values of numbers, by dotted name.
LEAST = {
    "text.max_length": 1,
    "text.cache": 0,
    "optimizer.warmup": 0,
    "optimizer.clip": 0,
    "optimizer.weight_decay": 0,
    "preview.every": 0,
    "preview.count": 1,
    "preview.steps": 1,
    "steps": 1,
    "batch_size": 1,
    "batch_tokens": 0,
    "accumulation": 1,
    "save_every": 1,
    "keep": 1,
    "log_every": 1,
    "patience": 1,
    "seed": 0,
}


@dataclass(frozen=True)
class TrainConfig:
    """One run."""

    run: str = "runs/train"
    """Folder of the run; it must not exist."""
    data: DataConfig = field(default_factory=DataConfig)
    model: Settings = field(default_factory=DiTSettings)
    text: TextConfig = field(default_factory=TextConfig)
    objective: Objective = field(default_factory=FlowMatching)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    preview: PreviewConfig = field(default_factory=PreviewConfig)
    init: str | None = None
    """Run or checkpoint whose averaged weights training starts from; its options hold, except those you type."""
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    encoder: str | None = None
    """Where the autoencoder is now, if it moved after models.precompute. It does not encode videos."""
    steps: int = 10_000
    """Number of optimizer steps."""
    batch_size: int = 32
    """Samples per optimizer step; ignored with data.buckets, where batch_tokens counts."""
    batch_tokens: int = 0
    """Most tokens per optimizer step, with buckets only; they set the number of samples."""
    accumulation: int = 1
    """Number of parts of a batch, computed one after the other to save memory."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: Literal["fp32", "bf16"] = "fp32"
    """'bf16' is autocast; weights, EMA and optimizer stay fp32. On CUDA 'fp32' uses TF32 products."""
    checkpointing: bool = False
    """Recompute the blocks in the backward instead of saving their activations."""
    checkpointing_keeps: Keeps = "nothing"
    """With checkpointing: outputs that are saved all the same, those of attention, or of attention and products."""
    compile: bool = False
    """Compile the model with torch.compile."""
    backend: Literal["auto", "reference", "cpu", "cuda", "triton"] = "auto"
    """Kernels of the ops; 'auto' takes the verified ones of the device."""
    verify: Literal["auto", "never"] = "auto"
    """On CUDA 'auto' verifies the kernels first where that was not done, with backend 'auto' only."""
    device: str = "auto"
    """Device: 'cpu', 'cuda', 'cuda:1' and so on. 'auto' is CUDA if there is a device, else the CPU."""
    patience: int = 1800
    """Number of seconds that processes wait for one that stands still, or for its part of a checkpoint, before the run
    ends and names it."""
    seed: int = 0
    """Seed of the weights, the data and the noise."""
    save_every: int = 1000
    """Steps between checkpoints; there is always one at the start and one at the end."""
    keep: int = 2
    """Number of newest checkpoints to keep."""
    log_every: int = 10
    """Steps between log entries."""

    def __post_init__(self) -> None:
        for path, least in LEAST.items():
            value = functools.reduce(getattr, path.split("."), self)
            if value < least:  # type: ignore[operator]
                raise ValueError(f"{path} is {value}; it must be at least {least}")
        if not self.optimizer.learning_rate > 0:
            raise ValueError(f"optimizer.learning_rate is {self.optimizer.learning_rate}; it must be positive")
        if not all(0 <= beta < 1 for beta in self.optimizer.betas):
            raise ValueError(f"optimizer.betas is {self.optimizer.betas}; both must be in [0, 1)")
        if not 0 <= self.optimizer.ema < 1:
            raise ValueError(f"optimizer.ema is {self.optimizer.ema}; it must be in [0, 1)")
        if self.data.buckets and self.batch_tokens < 1:
            raise ValueError(f"batch_tokens is {self.batch_tokens}; with data.buckets it must be at least 1")
        self._check_shares()
        chosen(self.checkpointing, self.checkpointing_keeps)
        for name in ("shard", "sequence"):
            if self.compile and self.parallel.axes[name] > 1:
                raise ValueError(f"compile is True; with parallel.{name} {self.parallel.axes[name]} it must be False")
        if self.lora.rank and self.init is None:
            raise ValueError(f"lora.rank is {self.lora.rank}; it needs init, the weights that stay as they are")
        if self.lora.rank and self.model.autoencoder:
            raise ValueError(
                f"lora.rank is {self.lora.rank}; with model {self.model.name!r}, an autoencoder, it must be 0"
            )
        self._check_model()

    def _check_shares(self) -> None:
        """That each part of a batch has the same number of samples, and each rank of a part."""
        shares = self.accumulation * self.parallel.shares
        if self.batch_tokens or not self.batch_size % shares:
            return
        if self.parallel.shares == 1:
            raise ValueError(f"accumulation is {self.accumulation}; it must divide batch_size {self.batch_size}")
        near = self.batch_size // shares * shares
        sizes = f"{near} or {near + shares}" if near else str(shares)
        raise ValueError(
            f"batch_size is {self.batch_size}; with {self.parallel} and accumulation {self.accumulation} it must be a "
            f"multiple of {shares}, for instance {sizes}"
        )

    def _check_model(self) -> None:
        """That the model fits the data and the objective."""
        model, objective = self.model, self.objective
        model.check_images(self.data.images, text=self.text.encoder is not None)
        if model.pooled_text and self.text.encoder is not None and not self.text.pooled:
            raise ValueError(
                f"text.encoder is {self.text.encoder!r}; with model {model.name!r}, which takes one vector, "
                "text.pooled must be True"
            )
        if self.preview.guidance != 1 and model.class_dropout == 0:
            raise ValueError(
                f"preview.guidance is {self.preview.guidance}; with model.class_dropout 0 it must be 1, for the null "
                "class is never trained"
            )
        if model.autoencoder != isinstance(objective, Reconstruction):
            raise ValueError(
                f"objective is {objective.name!r} and the model {model.name!r}; 'reconstruction' goes with an "
                "autoencoder, and an autoencoder with no other"
            )
        if isinstance(objective, Reconstruction):
            objective.check_discriminator(model.discriminator > 0)
        for name in model.only_ddpm():
            if not isinstance(objective, DDPM):
                raise ValueError(f"model.{name} needs objective 'ddpm'; it is {objective.name!r}")
            if name == "learn_sigma" and objective.zero_snr:
                raise ValueError("model.learn_sigma is True; with objective.zero_snr it must be False")


def from_dict(values: dict[str, Any]) -> TrainConfig:
    """A configuration from what :func:`as_plain` and JSON made of it."""
    return merge(TrainConfig(), values)


# What a continuation may change: what does not touch the losses, but for the rounding of another backend, GPU or number
# of ranks, and where the data and the text encoder are, if the checkpoint can tell that they are the same.
RESUMABLE = {
    "encoder",
    "steps",
    "save_every",
    "keep",
    "log_every",
    "preview",
    "backend",
    "verify",
    "device",
    "parallel",
    "patience",
}
