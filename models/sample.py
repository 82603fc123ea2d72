"""``python -m models.sample CHECKPOINT``: new clips from a checkpoint, as mp4, GIF, PNG contact sheet and npz."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
import tyro
from torch import Tensor

from minisora_kernels.commands import command

from .checkpoint import Checkpoint, open_checkpoint
from .data.encoder import Decoder
from .data.media import read_samples, refuse_present, write_samples
from .data.text import TextEncoder, identify_text_encoder, refuse_another
from .denoisers.text import Text
from .parallel.config import ParallelConfig, SamplingConfig
from .parallel.ranks import is_first, open_ranks, processes, serving_on
from .parallel.sequence import check_divisible, dividing
from .runtime.allocator import reuse_large_allocations
from .runtime.arguments import read
from .runtime.device import check_backend, choose_device
from .sampling.clips import ClipRequest, in_training_units, sample_clips
from .sampling.solvers import SolverOptions
from .training.config import TrainConfig, from_dict

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SampleConfig(SolverOptions):
    """Options of sampling."""

    checkpoint: tyro.conf.Positional[Path]
    """Checkpoint, or folder of a run for its newest complete checkpoint."""
    out: Path | None = None
    """Folder for the files; by default `samples` beside the checkpoint."""
    count: int | None = None
    """Number of clips; by default 8, or as many as `low` or `past` has."""
    classes: Annotated[tuple[str, ...], tyro.conf.arg(name="class")] = ()
    """Names or ids of classes, assigned to the clips in turn; by default all, or those of `low` or `past`."""
    prompt: tuple[str, ...] = ()
    """Captions, assigned to the clips in turn, for a model with text; '' is no caption. By default those of `low` or
    `past`."""
    low: Path | None = None
    """Small clips for a second stage: the first stage's samples.npz. W.A.L.T on latents encodes them first;
    StableCascade takes latents too, and also samples without."""
    low_noise: int = 0
    """Level of the noise in the small clips, W.A.L.T only; at most `model.low_noise` of the training."""
    text_encoder: str | None = None
    """New place of the text encoder, if it has moved since the training."""
    steps: int | str | None = None
    """Steps of the solver, by default 50; dopri5 chooses its own. A diffusion also takes 'ddim50' (timesteps 0, 20, ...
    980) or '10,15,20' (steps in each third)."""
    solver: (
        Literal[
            "euler", "heun", "midpoint", "rk4", "rk4_38", "dopri5", "euler_maruyama", "heun_sde", "ddpm", "ddim"
        ]
        | None
    ) = None  # fmt: skip
    """Solver. A flow's ODE: euler (default), heun, midpoint, rk4, rk4_38 (the 3/8 rule, SiT's rk4), dopri5; its SDE:
    euler_maruyama, heun_sde. A diffusion: ddpm (default), ddim."""
    guidance: float = 1.0
    """Scale of classifier-free guidance; 1 is none."""
    guidance_end: float | None = None
    """Scale that the guidance goes to over the steps; by default it stays."""
    guidance_channels: int | None = None
    """Number of leading channels to guide; by default all."""
    guidance_rescale: float = 0.0
    """Share of the guided prediction that gets the standard deviation of the conditional one; StableCascade uses
    0.7."""
    seed: int = 0
    """Seed of the noise."""
    batch_size: int = 16
    """Clips per call of the model."""
    last_weights: bool = False
    """Use the last weights instead of their EMA."""
    merge: bool = True
    """Add what LoRA trained to the weights first; else it is computed beside them, in each step."""
    encoder: str | None = None
    """New place of the autoencoder of a model of latents, if it has moved since."""
    latents: bool = False
    """Write the latents themselves into samples.npz, and no pictures: those of StableCascade's stage C are `--low` of
    stage B."""
    fps: int = 8
    """Frames per second of mp4 and GIF."""
    continuations: int = 0
    """Number of times to extend each clip from its last frames; needs a model trained with --model.past."""
    past: Path | None = None
    """An npz of earlier samples. Its clips are extended, with their classes or captions unless others are named."""
    overwrite: bool = False
    """Replace existing files."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """'bf16' is autocast. On CUDA 'fp32' uses TF32 products."""
    compile: bool = False
    """Compile the model with torch.compile."""
    cuda_graphs: bool = False
    """Replay the steps as CUDA graphs; CUDA only."""
    backend: Literal["auto", "reference", "cpu", "cuda", "triton"] = "auto"
    """Kernels of the ops; 'auto' takes the verified ones of the device."""
    verify: Literal["auto", "never"] = "auto"
    """On CUDA 'auto' verifies the kernels first where that was not done, with backend 'auto' only."""
    device: str = "auto"
    """Device: 'cpu', 'cuda', 'cuda:1' and so on. 'auto' is CUDA if there is a device, else the CPU."""
    parallel: SamplingConfig = field(default_factory=SamplingConfig)
    """The processes that torchrun started: how they share the clips."""


# Options of the command that the request has under the same name.
SAME_NAMES = (
    "solver",
    "guidance",
    "guidance_end",
    "guidance_channels",
    "guidance_rescale",
    "seed",
    "batch_size",
    "cuda_graphs",
    "continuations",
    "latents",
    "low_noise",
)


def class_ids(names: tuple[str, ...], classes: list[str], count: int, empty: Sequence[int] = ()) -> Tensor | None:
    """Class ids ``[count]``, the named classes in turn; None for a model without classes.

    By default they are all classes but the empty ones, which no training clip had. To name one of these warns.

    Raises:
        ValueError: a class that the model does not have.
    """
    if not classes:
        if names:
            raise ValueError(f"class {names[0]!r} was asked for; this model was trained without classes")
        return None
    ids = []
    for name in names:
        if name in classes:
            ids.append(classes.index(name))
        elif name.isdecimal() and int(name) < len(classes):
            ids.append(int(name))
        else:
            raise ValueError(f"class is {name!r}; it may be one of {', '.join(classes)} or 0..{len(classes) - 1}")
    if never := [classes[i] for i in dict.fromkeys(ids) if i in empty]:
        _log.warning("no clip of the training data had class %s: the model has not learned it", ", ".join(never))
    ids = ids or [i for i in range(len(classes)) if i not in empty] or list(range(len(classes)))
    return torch.tensor([ids[i % len(ids)] for i in range(count)])


def prompts(captions: tuple[str, ...], count: int) -> list[str]:
    """The captions in turn, ``count`` of them.

    Raises:
        ValueError: there is none.
    """
    if not captions:
        raise ValueError("this model was trained with text; prompt must have a caption, '' for none")
    return [captions[i % len(captions)] for i in range(count)]


def names_of(labels: np.ndarray, classes: list[str]) -> tuple[str, ...]:
    """The names of classes given by id or name; captions, of a model without classes, as they are.

    Raises:
        ValueError: a label that is not the model's.
    """
    for label in labels.tolist():
        named = isinstance(label, str) and (label in classes or not classes)
        if not named and not (isinstance(label, int) and 0 <= label < len(classes)):
            allowed = f"a class id in 0..{len(classes) - 1} or one of {', '.join(classes)}" if classes else "a caption"
            raise ValueError(f"label is {label!r}; for this model it must be {allowed}")
    return tuple(label if isinstance(label, str) else classes[label] for label in labels.tolist())


class Start(NamedTuple):
    """The clips of a file that sampling starts from, and their labels; without a file both are None."""

    file: Path | None
    clips: Tensor | None
    labels: np.ndarray | None

    def past(self, config: SampleConfig) -> Tensor | None:
        """The clips to go on from, uint8 ``[N, T, H, W, C]``."""
        return None if config.past is None else self.clips

    def low(self, config: SampleConfig) -> Tensor | None:
        """The small clips, uint8 ``[N, C, T, h, w]``."""
        return None if config.low is None or self.clips is None else self.clips.permute(0, 4, 1, 2, 3)


def shares_of(config: SampleConfig) -> ParallelConfig:
    """How the processes share the clips.

    Raises:
        ValueError: a number that does not divide them, or an option that does not go with divided tokens.
    """
    parallel = config.parallel.among(processes())
    for name in ("compile", "cuda_graphs"):
        if getattr(config, name) and parallel.sequence > 1:
            raise ValueError(f"{name} is True; with parallel.sequence {parallel.sequence} it must be False")
    return parallel


def start_of(config: SampleConfig) -> tuple[Start, int]:
    """What sampling starts from, and how many clips it makes.

    Raises:
        ValueError: two files, a file that cannot be read, or a count that does not fit it.
    """
    if config.past is not None and config.low is not None:
        raise ValueError("past and low were given; a model goes on from clips or makes them large, not both")
    file = config.past or config.low
    clips, labels = (None, None) if file is None else read_samples(file)
    if config.past is not None and clips is not None and clips.dtype != "uint8":
        raise ValueError(f"{file} has clips of {clips.dtype} {list(clips.shape)}; they must be uint8 [N, T, H, W, C]")
    count = (8 if clips is None else len(clips)) if config.count is None else config.count
    for name, value in (("count", count), ("batch_size", config.batch_size), ("fps", config.fps)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    shares = shares_of(config).data
    if count < shares:
        group = "processes" if config.parallel.sequence == 1 else f"groups of {config.parallel.sequence} processes"
        raise ValueError(f"count is {count}; each of {shares} {group} needs at least one clip")
    if config.fps > 1000:
        raise ValueError(f"fps is {config.fps}; it must be at most 1000")
    if clips is not None and count > len(clips):
        raise ValueError(f"count is {count}; {file} has {len(clips)} clips")
    return Start(file, None if clips is None else torch.from_numpy(clips[:count]), labels), count


class Conditions(NamedTuple):
    """What the clips are of: class ids or captions, and what the model takes for them."""

    labels: Tensor | list[str] | None
    y: Tensor | Text | None


def conditions_of(
    config: SampleConfig, checkpoint: Checkpoint, train: TrainConfig, start: Start, count: int, device: torch.device
) -> Conditions:
    """The classes or captions of the command line, or else those of the file that sampling starts from.

    Raises:
        ValueError: a class or an option that does not fit the model, or a text encoder that is another one.
    """
    classes, captions = config.classes, config.prompt
    if start.clips is not None and start.labels is None and checkpoint.classes and not classes:
        raise ValueError(f"{start.file} has no labels; use --class")
    if start.labels is not None and checkpoint.classes:
        classes = classes or names_of(start.labels, checkpoint.classes)
    if start.labels is not None and train.text.encoder is not None:
        captions = captions or names_of(start.labels, [])
    ids = class_ids(classes, checkpoint.classes, count, checkpoint.empty_classes)
    if config.guidance != 1 and checkpoint.config.get("class_dropout") == 0:
        raise ValueError(
            f"guidance is {config.guidance}; it must be 1, for the model was trained with class_dropout 0, without a "
            "null class"
        )
    if train.text.encoder is None:
        if config.prompt or config.text_encoder:
            option = "prompt" if config.prompt else "text_encoder"
            raise ValueError(f"{option} is {getattr(config, option)!r}; this model was trained without text")
        return Conditions(ids, ids)
    texts = prompts(captions, count)
    encoder = config.text_encoder or train.text.encoder
    if checkpoint.text_encoder is not None:
        refuse_another(identify_text_encoder(encoder), checkpoint.text_encoder)
    encode = TextEncoder(**dataclasses.asdict(train.text) | {"encoder": encoder}, device=device)
    return Conditions(texts, encode(texts))


def model_of(config: SampleConfig, checkpoint: Checkpoint, device: torch.device) -> Any:
    """The model of the checkpoint.

    Raises:
        ValueError: more processes than its tokens can be divided among.
    """
    model = (checkpoint.merged() if config.merge else checkpoint).build(ema=not config.last_weights).to(device)
    check_divisible(config.parallel.sequence, model.divisible())
    if config.compile:
        model.compile()
    return model


def run(config: SampleConfig) -> list[Path]:
    """Sample as configured, on all processes that torchrun started; returns the files, on the first.

    Raises:
        ValueError: a file that is not a checkpoint or does not match, output that is there already, or an option that
            does not fit the model.
    """
    start, count = start_of(config)
    path, checkpoint = open_checkpoint(config.checkpoint)
    train = from_dict(checkpoint.train)
    folder = config.out or path.parent / "samples"
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out is {str(folder)!r}, which is a file; it must be a folder")
    if not config.overwrite:
        refuse_present(folder)
    device = choose_device(config.device)
    check_backend(config.backend, device)
    if checkpoint.encoder is None and config.encoder is not None:
        raise ValueError(f"encoder is {config.encoder!r}, but {path} makes pixels, not latents")
    channels = checkpoint.config.get("channels")
    if checkpoint.encoder is None and channels not in (1, 3) and not config.latents:
        raise ValueError(
            f"{path} makes latents of {channels} channels and names no autoencoder; convert it with one, or use "
            "--latents"
        )
    labels, y = conditions_of(config, checkpoint, train, start, count, device)
    # Before the sampling, so that an encoder that is missing costs no time.
    decode = (
        None if checkpoint.encoder is None or config.latents else Decoder(checkpoint.encoder, device, config.encoder)
    )
    model = model_of(config, checkpoint, device)
    with (
        open_ranks(shares_of(config), device) as ranks,
        serving_on(ranks, device, config.backend, config.verify),
        dividing(ranks.line),
        torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"),
    ):
        request = ClipRequest(
            count=count,
            y=y,
            steps=50 if config.steps is None and config.solver != "dopri5" else config.steps,
            options=config,
            progress=ranks.first,
            share=ranks.share,
            decode=decode,
            encode=None if decode is None else decode.encode,
            past=start.past(config),
            low=in_training_units(start.low(config), model, decode, config.batch_size),
            **{name: getattr(config, name) for name in SAME_NAMES},
        )
        parts = ranks.joined(sample_clips(model, train.objective, request))
    if not parts:
        return []
    clips = torch.cat(parts)
    paths = write_samples(folder, clips.numpy(), labels, checkpoint.classes, config.fps, overwrite=config.overwrite)
    print(f"{count} clips of {clips.shape[1]} frames from {path} (step {checkpoint.step}):")
    print(*said_of(labels, checkpoint), *(f"  {file}" for file in paths), sep="\n")
    return paths


def said_of(labels: Tensor | list[str] | None, checkpoint: Checkpoint) -> list[str]:
    """What clips are of, in a line, if there is anything to say."""
    if isinstance(labels, list):
        return ["prompts: " + ", ".join(map(repr, labels))]
    return [] if labels is None else ["classes: " + ", ".join(checkpoint.classes[i] for i in labels)]


@command()
def main(arguments: list[str]) -> None:
    logging.basicConfig(format="%(message)s", level=logging.WARNING if is_first() else logging.ERROR)
    reuse_large_allocations()
    run(read(SampleConfig, f"python -m {__package__}.sample", __doc__, arguments))


if __name__ == "__main__":
    main()
