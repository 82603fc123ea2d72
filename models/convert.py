"""``python -m models.convert``: a run from published weights, and published weights from a run.

    python -m models.convert dit DiT-XL-2-256x256.pt --autoencoder VAE_FOLDER --out runs/dit-xl
    python -m models.sample runs/dit-xl --class 207 360 --guidance 4
    python -m models.convert dit runs/mine --to mine.pt
    python -m models.convert dit runs/mine --adapters mine

A file may be torch's (``.pt``, ``.pth``, ``.bin``, ``.ckpt``), a ``.safetensors``, an index of shards, or a folder with
one of them. Nothing in it is executed. If a file has several sets of weights, the EMA is taken; ``--part`` names
another. Tensors that are missing, unknown or misshapen are listed by name, and then nothing is written.

| kind | weights |
|---|---|
| `dit` | Meta's DiT, files of its `train.py` and of fast-DiT, and the folder `transformer` of DiT in diffusers |
| `sit` | SiT; the half of the output that it does not train is dropped |
| `latte` | Latte, with classes or without |
"""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from minisora_kernels.commands import command

from . import checkpoint as checkpoints
from .checkpoint import Checkpoint, open_checkpoint
from .data.encoder import identify
from .denoisers.lora import write_adapters
from .registry import FAMILIES
from .runtime.arguments import read
from .runtime.plain import as_plain
from .training.config import TrainConfig
from .weights.diffusers_dit import hints_of, is_diffusers, to_diffusers
from .weights.dit import LAYOUTS
from .weights.files import read_weights, write_weights
from .weights.layout import Hints, check_fit

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ConvertConfig:
    """What is converted, and to what."""

    kind: tyro.conf.Positional[Literal["dit", "sit", "latte"]]
    """Whose weights these are."""
    source: tyro.conf.Positional[Path]
    """The published weights; with `--to` or `--adapters`, a run or a checkpoint."""
    out: Path | None = None
    """Folder of the new run; it must not exist."""
    to: Path | None = None
    """New file of weights under their published names: .safetensors or .pt. What LoRA trained is added to them."""
    adapters: Path | None = None
    """New folder for what LoRA trained, as `peft.PeftModel.from_pretrained` reads it for the published code."""
    autoencoder: str | None = None
    """The autoencoder of the latents: a folder that diffusers wrote, a checkpoint or a run. Sampling needs it."""
    part: str | None = None
    """Set of weights in a file that has several; by default `ema`, else `model`."""
    heads: int | None = None
    """Number of attention heads; needed if width and depth are not those of DiT-S, B, L or XL, and no `config.json` of
    diffusers says it."""
    size: tuple[int, int] | None = None
    """Height and width of the latents; by default a square of as many tokens as the weights have positions."""
    names: Literal["published", "diffusers"] = "published"
    """Names of the tensors that `--to` writes; 'diffusers' are those of its `DiTTransformer2DModel`, for `dit` only."""

    def __post_init__(self) -> None:
        if sum(each is not None for each in (self.out, self.to, self.adapters)) != 1:
            raise ValueError(
                "one of out, to and adapters must be given: the folder of a run, a file of weights, or a folder of "
                "adapters"
            )
        for name in ("autoencoder", "part", "heads", "size") if self.out is None else ():
            if getattr(self, name) is not None:
                raise ValueError(f"{name} is {getattr(self, name)}; it goes with out")
        if self.names == "diffusers" and (self.to is None or self.kind != "dit"):
            raise ValueError("names is 'diffusers'; it goes with dit and with to")
        if self.to is not None and self.to.suffix not in (".safetensors", ".pt"):
            raise ValueError(f"to is {str(self.to)!r}; its suffix must be .safetensors or .pt")


def publish(config: ConvertConfig) -> Path:
    """Write the weights of a run, or its adapters, under their published names.

    Raises:
        ValueError: a run of another model, or a file that is there already.
    """
    to = config.to or config.adapters
    assert to is not None
    if to.exists():
        raise ValueError(f"{to} exists already; choose another name")
    path, checkpoint = open_checkpoint(config.source)
    weights = LAYOUTS[config.kind].write(checkpoint.merged())
    if config.adapters is not None:
        write_adapters(to, checkpoint.ema, checkpoint.lora)
        print(f"{to} has the averaged adapters of {path}, under the names of {config.kind}")
        return to
    assert config.to is not None
    write_weights(config.to, to_diffusers(weights) if config.names == "diffusers" else weights)
    print(f"{config.to} has the averaged weights of {path}, under the names of {config.kind}")
    return config.to


def run(config: ConvertConfig) -> Path:
    """Convert as configured; returns the checkpoint or the file.

    Raises:
        ValueError: files that do not fit, or output that is there already.
    """
    if config.out is None:
        return publish(config)
    if config.out.exists():
        raise ValueError(f"{config.out} exists already; choose another --out")
    encoder = None if config.autoencoder is None else identify(config.autoencoder) | {"mean": None, "std": None}
    weights = read_weights(config.source, config.part)
    hints = Hints(config.heads, config.size)
    converted = LAYOUTS[config.kind].read(weights, hints_of(config.source, hints) if is_diffusers(weights) else hints)
    check_fit(converted.config, converted.weights)
    for note in converted.notes:
        print(note)
    model = converted.config
    settings = FAMILIES[model.name].settings
    values = {item.name: getattr(model, item.name) for item in dataclasses.fields(settings)}
    train = TrainConfig(
        run=str(config.out),
        model=settings(**values),
        objective=converted.objective,
    )
    checkpoint = Checkpoint(
        train=as_plain(train),
        config=as_plain(model),
        classes=[str(number) for number in range(model.num_classes)],
        step=0,
        model=converted.weights,
        ema=converted.weights,
        optimizer={},
        rng={},
        encoder=encoder,
    )
    config.out.mkdir(parents=True)
    path = checkpoints.save(config.out, checkpoint, keep=1)
    count = sum(value.numel() for value in converted.weights.values())
    print(f"{path}: {config.kind} of {count / 1e6:,.1f} M parameters")
    print(f"sample from it with python -m {__package__}.sample {config.out}")
    if encoder is None:
        _log.warning("without --autoencoder training can start from it, and sampling from latents cannot")
    return path


@command()
def main(arguments: list[str]) -> None:
    logging.basicConfig(format="%(message)s")
    run(read(ConvertConfig, f"python -m {__package__}.convert", __doc__, arguments))


if __name__ == "__main__":
    main()
