"""``python -m models.convert``: a run from published weights, and published weights from a run.

    python -m models.convert dit DiT-XL-2-256x256.pt --autoencoder VAE_FOLDER --out runs/dit-xl
    python -m models.sample runs/dit-xl --class 207 360 --guidance 4
    python -m models.convert dit runs/mine --to mine.pt
    python -m models.convert dit runs/mine --adapters mine
    python -m models.convert video runs/dit-xl --frames 16 --out runs/video

A file may be torch's (``.pt``, ``.pth``, ``.bin``, ``.ckpt``), a ``.safetensors``, an index of shards, or a folder with
one of them. Nothing in it is executed. If a file has several sets of weights, the EMA is taken; ``--part`` names
another. Tensors that are missing, unknown or misshapen are listed by name, and then nothing is written.

| kind | weights |
|---|---|
| `dit` | Meta's DiT, files of its `train.py` and of fast-DiT, and the folder `transformer` of DiT in diffusers |
| `sit` | SiT; the half of the output that it does not train is dropped |
| `latte` | Latte, with classes or without |
| `stdit` | Open-Sora 1.0's STDiT, with its null caption |
| `vdit` | OpenDiT's VDiT, with text or classes |
| `cascade-a`, `cascade-b`, `cascade-c` | StableCascade's stages, diffusers' folders too; its EfficientNet is not here |
| `video` | no file but a run of an image DiT, which becomes a video model to train on clips |
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor

from minisora_kernels.commands import command

from . import checkpoint as checkpoints
from .checkpoint import Checkpoint, open_checkpoint
from .data.config import TextConfig
from .data.encoder import identify
from .data.text import TextEncoder, identify_text_encoder
from .denoisers.cascade_config import CascadeConfig, with_time
from .denoisers.dit import DiTConfig
from .denoisers.inflate import load_image_weights
from .denoisers.lora import write_adapters
from .registry import FAMILIES, Config, build, config_from
from .runtime.arguments import read
from .runtime.plain import as_plain
from .training.config import TrainConfig, from_dict
from .weights.files import read_weights, write_weights
from .weights.layout import Hints, check_fit
from .weights.layouts import LAYOUTS

_log = logging.getLogger(__name__)
KINDS = (*LAYOUTS, "video")


@dataclass(frozen=True)
class ConvertConfig:
    """What is converted, and to what."""

    kind: tyro.conf.Positional[Literal[KINDS]]  # type: ignore[valid-type]
    """Whose weights these are; 'video' makes a video model of an image model."""
    source: tyro.conf.Positional[Path]
    """The published weights; with `video`, `--to` or `--adapters`, a run or a checkpoint."""
    out: Path | None = None
    """Folder of the new run; it must not exist."""
    to: Path | None = None
    """New file of weights under their published names: .safetensors or .pt. What LoRA trained is added to them."""
    adapters: Path | None = None
    """New folder for what LoRA trained, as `peft.PeftModel.from_pretrained` reads it for the published code."""
    autoencoder: str | None = None
    """The autoencoder of the latents: a folder that diffusers wrote, a checkpoint or a run. Sampling needs it."""
    text_encoder: str | None = None
    """The T5 or CLIP of the captions: a folder, or the hub name of one that is downloaded already. Models with text
    need it."""
    part: str | None = None
    """Set of weights in a file that has several; by default `ema`, else `model`."""
    heads: int | None = None
    """Number of attention heads, in StableCascade of the deepest level; needed if the size is not a published one and
    no `config.json` of diffusers says it."""
    size: tuple[int, int] | None = None
    """Height and width of the latents; by default a square of as many tokens as the weights have positions, and for
    StableCascade those of a picture of 1024 x 1024."""
    frames: int | None = None
    """Frames of a clip, or of its latents; `video` only."""
    attention: Literal["factorized", "joint"] | None = None
    """Attention of the video model; by default 'factorized', with a block over time behind each of the image's."""
    names: Literal["published", "diffusers"] = "published"
    """Names of the tensors that `--to` and `--adapters` write; 'diffusers' are those of its `DiTTransformer2DModel`,
    `PaellaVQModel` and `StableCascadeUNet`."""

    def __post_init__(self) -> None:
        if sum(each is not None for each in (self.out, self.to, self.adapters)) != 1:
            raise ValueError(
                "one of out, to and adapters must be given: the folder of a run, a file of weights, or a folder of "
                "adapters"
            )
        video, ours, theirs = self.kind == "video", ("frames", "attention"), ("autoencoder", "part", "heads", "size")
        if video and (self.out is None or self.frames is None or self.frames < 1):
            raise ValueError(f"frames is {self.frames}; video needs out, and frames of at least 1")
        for name in (*(() if video else ours), *(theirs if video or self.out is None else ())):
            if getattr(self, name) is not None:
                others = "video" if name in ours else "out, and not with video"
                raise ValueError(f"{name} is {getattr(self, name)}; it goes with {others}")
        known = self.kind in LAYOUTS and LAYOUTS[self.kind].to_diffusers is not None
        if self.names == "diffusers" and (self.out is not None or not known):
            names = ", ".join(kind for kind, layout in LAYOUTS.items() if layout.to_diffusers is not None)
            raise ValueError(f"names is 'diffusers'; it goes with to or adapters, and with {names}")
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
    layout = LAYOUTS[config.kind]
    weights = layout.write(checkpoint.merged())
    if config.adapters is not None:
        weights |= layout.adapters(dict(checkpoint.ema), config_from(checkpoint.config))
    if config.names == "diffusers" and layout.to_diffusers is not None:
        weights = layout.to_diffusers(weights)
    if config.adapters is not None:
        write_adapters(to, weights, checkpoint.lora)
    else:
        write_weights(to, weights)
    what, names = "weights" if config.adapters is None else "adapters", f"{config.names} names"
    print(f"{to} has the averaged {what} of {path}, under the {names} of {config.kind}")
    return to


def to_video(config: ConvertConfig) -> Path:
    """A new run with the video model that an image model becomes.

    Raises:
        ValueError: a run of another model.
    """
    assert config.out is not None and config.frames is not None
    path, checkpoint = open_checkpoint(config.source)
    checkpoint = checkpoint.merged()
    image = config_from(checkpoint.config)
    if not isinstance(image, (DiTConfig, CascadeConfig)) or not image.is_image:
        raise ValueError(f"{path} is of {checkpoint.config.get('name')!r}; it must be of a DiT or Cascade for images")
    size = (config.frames, *image.input_size)
    video: DiTConfig | CascadeConfig
    if isinstance(image, CascadeConfig):
        if config.attention is not None:
            raise ValueError(
                f"attention is {config.attention!r}; a StableCascade has attention over time behind each over space"
            )
        video = with_time(image, input_size=size)
    else:
        attention = config.attention or "factorized"
        depth = image.depth * (2 if attention == "factorized" else 1)
        patch = (1, *image.patch)
        video = dataclasses.replace(image, input_size=size, patch=patch, attention=attention, depth=depth)
    torch.manual_seed(0)
    model = build(video)
    load_image_weights(model, checkpoint.ema, frame_positions=isinstance(video, DiTConfig))
    train = from_dict(checkpoint.train)
    train = dataclasses.replace(
        train,
        run=str(config.out),
        model=_settings(video),
        data=dataclasses.replace(train.data, frames=config.frames),
    )
    weights = {name: value.detach() for name, value in model.state_dict().items()}
    return _save(
        config.out,
        dataclasses.replace(
            checkpoint,
            train=as_plain(train),
            config=as_plain(video),
            step=0,
            model=weights,
            ema=weights,
            optimizer={},
            rng={},
            memory={},
            data_digest=None,
        ),
    )


def _settings(config: Config) -> Any:
    """What a model is, whatever it is trained on."""
    settings = FAMILIES[config.name].settings
    return settings(**{item.name: getattr(config, item.name) for item in dataclasses.fields(settings)})


def _save(folder: Path, checkpoint: Checkpoint) -> Path:
    """A new run's first checkpoint."""
    folder.mkdir(parents=True)
    path = checkpoints.save(folder, checkpoint, keep=1)
    count = sum(value.numel() for value in checkpoint.ema.values())
    print(f"{path}: {checkpoint.config['name']} of {count / 1e6:,.1f} M parameters")
    print(f"sample from it with python -m {__package__}.sample {folder}")
    return path


def _empty_caption(encoder: str, **options: Any) -> Tensor:
    return TextEncoder(**vars(TextConfig(encoder, **options))).empty()


def run(config: ConvertConfig) -> Path:
    """Convert as configured; returns the checkpoint or the file.

    Raises:
        ValueError: files that do not fit, or output that is there already.
    """
    if config.out is None:
        return publish(config)
    if config.out.exists():
        raise ValueError(f"{config.out} exists already; choose another --out")
    if config.kind == "video":
        return to_video(config)
    encoder = None if config.autoencoder is None else identify(config.autoencoder) | {"mean": None, "std": None}
    weights = read_weights(config.source, config.part)
    name = config.text_encoder
    empty = None if name is None else functools.partial(_empty_caption, name)
    converted = LAYOUTS[config.kind].read(weights, Hints(config.heads, config.size, config.source, empty))
    check_fit(converted.config, converted.weights)
    if (name is None) != (converted.text is None):
        rule = "it must be named for a model with text" if name is None else "the model has no text"
        raise ValueError(f"text_encoder is {name!r}; {rule}")
    for note in converted.notes:
        print(note)
    model = converted.config
    train = TrainConfig(
        run=str(config.out),
        model=_settings(model),
        text=TextConfig(encoder=name, **converted.text or {}),
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
        text_encoder=None if name is None else identify_text_encoder(name),
    )
    path = _save(config.out, checkpoint)
    if encoder is None:
        _log.warning("without --autoencoder training can start from it, and sampling from latents cannot")
    return path


@command()
def main(arguments: list[str]) -> None:
    logging.basicConfig(format="%(message)s")
    run(read(ConvertConfig, f"python -m {__package__}.convert", __doc__, arguments))


if __name__ == "__main__":
    main()
