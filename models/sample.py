"""``python -m models.sample CHECKPOINT``: new clips from a checkpoint, as mp4, GIF, PNG contact sheet and npz."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from torch import Tensor, nn

from .checkpoint import open_checkpoint
from .config import from_dict
from .data.encoder import Decoder
from .data.media import output_paths, read, write
from .data.pixels import shrink, to_bytes, to_float
from .data.text import TextEncoder, identify_text_encoder, refuse_another
from .denoisers.cascade import Conditioned
from .denoisers.text import Text, rows
from .denoisers.walt import WALT, augment
from .integrators import SolverOptions
from .registry import Objective
from .runtime.allocator import reuse_large_allocations
from .runtime.device import choose_backend, choose_device
from .runtime.progress import progress_bar
from .samplers import SOLVERS, count_steps, sample


@dataclass(frozen=True)
class SampleConfig(SolverOptions):
    """What to sample, and how."""

    checkpoint: tyro.conf.Positional[Path]
    """A checkpoint, or a run's folder for its newest whole checkpoint."""
    out: Path | None = None
    """Folder for the files; by default `samples` beside the checkpoint."""
    count: int | None = None
    """Number of clips; by default 8, or as many as `low` or `past` has."""
    classes: Annotated[tuple[str, ...], tyro.conf.arg(name="class")] = ()
    """Names or ids of the classes, dealt to the clips in turn; by default all, or those of `low` or `past`."""
    prompt: tuple[str, ...] = ()
    """Captions, dealt to the clips in turn, for a model that was trained with text; '' is none. By default those of
    `low` or `past`."""
    low: Path | None = None
    """For a second stage: samples.npz of the first, the small clips that it makes large. W.A.L.T on latents encodes
    them first; StableCascade's goes without as well."""
    low_noise: int = 0
    """W.A.L.T: the level of the noise that the small clips get, at most model.low_noise of the training."""
    text_encoder: str | None = None
    """The text encoder of the training, if it is elsewhere now."""
    steps: int | str | None = None
    """Steps of the solver, by default 50; dopri5 takes what its tolerances need. Of a diffusion also 'ddim50'
    (timesteps 0, 20, ... 980) or '10,15,20' (of each third)."""
    solver: (
        Literal["euler", "heun", "midpoint", "rk4", "dopri5", "euler_maruyama", "heun_sde", "ddpm", "ddim"] | None
    ) = None
    """For a flow its ODE by euler (default), heun, midpoint, rk4 or dopri5, or its SDE by euler_maruyama or heun_sde.
    For a diffusion ddpm (default) or ddim."""
    guidance: float = 1.0
    """Scale of classifier-free guidance; 1 is none."""
    guidance_channels: int | None = None
    """Guide the first so many channels only; by default all."""
    guidance_rescale: float = 0.0
    """Share of the guided prediction that gets the spread of the one with classes; StableCascade takes 0.7."""
    seed: int = 0
    batch_size: int = 16
    """Clips made at a time."""
    last_weights: bool = False
    """The last weights instead of their moving average."""
    encoder: str | None = None
    """Where the autoencoder of a model of latents is now; by default where it was when they were made."""
    fps: int = 8
    """Frames a second of mp4 and GIF."""
    continuations: int = 0
    """How often to go on from the last frames of a clip, with a model that was trained with `past`."""
    past: Path | None = None
    """An npz as it is written here, to go on from its clips instead of from sampled ones, with their classes or
    captions if none are given."""
    overwrite: bool = False
    """Replace files that are there."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """'bf16': autocast. On CUDA 'fp32' has TF32 products."""
    compile: bool = False
    """torch.compile the model."""
    cuda_graphs: bool = False
    """Replay the steps as CUDA graphs; CUDA only. Not run on a GPU."""
    backend: Literal["auto", "reference", "cpu", "cuda", "triton"] = "auto"
    """Which kernels the ops run on."""
    device: str = "auto"
    """'cpu', 'cuda' or 'cuda:1' and so on; 'auto' is CUDA if there is a device. CUDA was not run on a GPU."""


def class_ids(wanted: tuple[str, ...], classes: list[str], count: int) -> Tensor | None:
    """Class ids ``[count]``, the wanted classes (all by default) in turn; None for a model without classes.

    Raises:
        ValueError: a class that the model does not have.
    """
    if not classes:
        if wanted:
            raise ValueError(f"class {wanted[0]!r} was asked for; this model was trained without classes")
        return None
    ids = []
    for name in wanted:
        if name in classes:
            ids.append(classes.index(name))
        elif name.isdecimal() and int(name) < len(classes):
            ids.append(int(name))
        else:
            raise ValueError(f"class is {name!r}; it may be one of {', '.join(classes)} or 0..{len(classes) - 1}")
    ids = ids or list(range(len(classes)))
    return torch.tensor([ids[i % len(ids)] for i in range(count)])


def prompts(wanted: tuple[str, ...], count: int) -> list[str]:
    """The captions in turn, ``count`` of them.

    Raises:
        ValueError: there is none.
    """
    if not wanted:
        raise ValueError("this model was trained with text; prompt must have a caption, '' for none")
    return [wanted[i % len(wanted)] for i in range(count)]


def sample_clips(
    model: nn.Module,
    objective: Objective,
    count: int,
    y: Tensor | Text | None,
    *,
    solver: str | None = None,
    steps: int | str | None,
    guidance: float = 1.0,
    guidance_channels: int | None = None,
    guidance_rescale: float = 0.0,
    options: SolverOptions | None = None,
    seed: int,
    batch_size: int = 16,
    progress: bool = False,
    cuda_graphs: bool = False,
    decode: Callable[[Tensor], Tensor] | None = None,
    encode: Callable[[Tensor], Tensor] | None = None,
    continuations: int = 0,
    past: Tensor | None = None,
    low: Tensor | None = None,
    low_noise: int = 0,
) -> Tensor:
    """uint8 ``[count, T, H, W, C]`` from the model, ``batch_size`` clips at a time, on the model's device.

    The clips depend on ``seed`` and ``count``, those of dopri5 and of solvers that draw noise on ``batch_size`` too.
    The solver is by default the first of the objective. ``decode`` makes pixels ``[B, C, T, H, W]`` of the samples of
    a model of latents, and ``encode`` latents of uint8 pixels.

    With ``continuations`` the model, trained with past frames, goes on so often from the last frames of a clip, which
    are encoded anew: W.A.L.T's tokenizer makes its two known latent frames of the last 5 frames. The result has them
    once. ``past`` are clips to go on from, as they are returned here, in the place of sampled ones.

    A second stage (``config.low_shape``) is told the small clips ``low [count, C, T, h, w]``: stage B of StableCascade
    in [-1, 1] or none, W.A.L.T as its data is, with noise of level ``low_noise``, also drawn from ``seed``.

    Raises:
        ValueError: an objective without a sampler, that of autoencoders; a model that cannot go on, ``past`` of another
            size, or ``low`` or ``low_noise`` that does not fit.
    """
    if objective.name not in SOLVERS:
        raise ValueError(f"objective is {objective.name!r}; it may be one of {', '.join(SOLVERS)} to sample from noise")
    if continuations < (past is not None):
        wanted = "not be negative" if past is None else "be at least 1 with past"
        raise ValueError(f"continuations is {continuations}; it must {wanted}")
    if decode is not None and encode is None and continuations:
        raise ValueError(f"encode is None; with decode and {continuations} continuations it must be given")
    check_low(model, count, low, low_noise)
    if low is not None and continuations:
        raise ValueError(f"continuations is {continuations}; with low, which has no more frames, it must be 0")
    decode, encode = decode or (lambda clip: clip), encode or to_float
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    shape = (model.config.channels, *model.config.input_size)
    noises = [
        torch.randn((count, *shape), generator=generator, device=device) for _ in range(continuations + (past is None))
    ]
    low_t = None
    if low is not None:
        low = low.to(device)
        if isinstance(model, WALT):
            low_t = torch.full((count,), low_noise, device=device)
            low = augment(low, low_t, generator)
        elif len(shape) == 3:
            low = low.squeeze(2)
    overlap = _overlap(model, decode, count, continuations, past) if continuations else 0
    films = []
    starts = range(0, count, batch_size)
    calls = len(noises) * (1 if steps is None else count_steps(objective, steps))
    with progress_bar(total=len(starts) * calls, desc="sampling", disable=not progress) as bar:

        def counted(steps: Iterable[int]) -> Iterator[int]:
            for step in steps:
                yield step
                bar.update()

        for start in starts:
            part = slice(start, start + batch_size)
            labels = None if y is None else rows(y, part).to(device)
            told, given = model, {}
            if low is not None and low_t is not None:
                given = {"low": low[part], "low_t": low_t[part]}
            elif low is not None:
                told = Conditioned(model, low[part])
            film = None if past is None else past[part].to(device).permute(0, 4, 1, 2, 3)
            for noise in noises:
                clip = sample(
                    told,
                    objective,
                    noise[part],
                    labels,
                    solver=solver or SOLVERS[objective.name][0],
                    steps=steps,
                    guidance=guidance,
                    guidance_channels=guidance_channels,
                    guidance_rescale=guidance_rescale,
                    options=options,
                    generator=generator,
                    progress=counted,
                    cuda_graphs=cuda_graphs,
                    past=None if film is None else encode(film[:, :, -overlap:]),
                    **given,
                )
                frames = to_bytes(decode(clip if clip.dim() == 5 else clip.unsqueeze(2)))
                film = frames if film is None else torch.cat((film, frames[:, :, overlap:]), dim=2)
            films.append(film.cpu())
    return torch.cat(films).permute(0, 2, 3, 4, 1).contiguous()


def _overlap(
    model: nn.Module, decode: Callable[[Tensor], Tensor], count: int, continuations: int, past: Tensor | None
) -> int:
    """How many frames of pixels a clip has in common with the one that it continues.

    Raises:
        ValueError: a model that was trained without past frames, or ``past`` that it cannot go on from.
    """
    known = getattr(model.config, "known_frames", 0)
    if not known:
        raise ValueError(f"continuations is {continuations}; the model was trained without past, so it must be 0")
    _, height, width = model.config.input_size
    latents = torch.zeros(1, model.config.channels, known, height, width, device=next(model.parameters()).device)
    channels, frames, height, width = decode(latents).shape[1:]
    if past is not None and (
        past.dtype != torch.uint8
        or past.dim() != 5
        or past.shape[1] < frames
        or (len(past), *past.shape[2:]) != (count, height, width, channels)
    ):
        raise ValueError(
            f"past is {past.dtype} of shape {tuple(past.shape)}; it must be torch.uint8 "
            f"[{count}, {frames} or more, {height}, {width}, {channels}]"
        )
    return frames


def check_low(model: nn.Module, count: int, low: Tensor | None, low_noise: int) -> None:
    """Raises ValueError unless the model takes such small clips, or none, and noise of that level in them.

    Stage B of StableCascade does without, but W.A.L.T's super-resolution does not.
    """
    wanted = getattr(model.config, "low_shape", None)
    if wanted is None and low is not None:
        raise ValueError("low was given, but the model is no second stage, which makes small clips large")
    if wanted is not None and low is None and isinstance(model, WALT):
        raise ValueError("low was not given; the model is a second stage, which needs small clips to make large")
    if low is not None:
        shape = tuple(low.shape)
        fits = len(shape) == 5 and all(w in (None, n) for n, w in zip(shape, (count, *wanted), strict=True))
        if not fits:
            sizes = ("any" if n is None else str(n) for n in (count, *wanted))
            raise ValueError(f"low has shape {shape}; it must be [N, C, T, h, w] = [{', '.join(sizes)}]")
    most = model.config.low_noise if low is not None and isinstance(model, WALT) else 0
    if not 0 <= low_noise <= most:
        raise ValueError(f"low_noise is {low_noise}; with this model it must be in 0..{most}")


def small_latents(low: Tensor, model: WALT, decoder: Decoder, batch_size: int) -> Tensor:
    """What W.A.L.T on latents is told of small clips uint8 ``[N, C, T, h, w]``: latents of half the height and width.

    Pixels are repeated to twice the height and width and encoded, and of the latents 2 x 2 means taken, as training
    takes them of the latents of the large clips.

    Raises:
        ValueError: clips that the encoder does not take, or whose latents are of another size than the model's.
    """
    channels, frames, height, width = low.shape[1:]
    latents, wanted = decoder.encoder.shape((channels, frames, 2 * height, 2 * width)), model.config.input_size
    if latents != (model.config.channels, *wanted):
        raise ValueError(
            f"low has shape {tuple(low.shape)}, of which the latents at twice the height and width are {latents}; they "
            f"must be {(model.config.channels, *wanted)}"
        )
    large = low.repeat_interleave(2, -2).repeat_interleave(2, -1)
    return torch.cat([shrink(decoder.encode(part), 2) for part in large.split(batch_size)])


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


def run(config: SampleConfig) -> list[Path]:
    """Sample as configured; returns the files.

    Raises:
        ValueError: a file that is not a checkpoint or does not match, output that is there already, or an option that
            does not fit the model.
    """
    if config.past is not None and config.low is not None:
        raise ValueError("past and low were given; a model goes on from clips or makes them large, not both")
    file = config.past or config.low
    given, told = (None, None) if file is None else read(file)
    count = (8 if given is None else len(given)) if config.count is None else config.count
    for name, value in (("count", count), ("batch_size", config.batch_size), ("fps", config.fps)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    if given is not None and count > len(given):
        raise ValueError(f"count is {count}; {file} has {len(given)} clips")
    past = low = None
    if given is not None:
        clips = torch.from_numpy(given[:count])
        past = clips if config.low is None else None
        low = clips.permute(0, 4, 1, 2, 3) if config.low is not None else None
    path, checkpoint = open_checkpoint(config.checkpoint)
    train = from_dict(checkpoint.train)
    folder = config.out or path.parent / "samples"
    present = [str(file) for file in output_paths(folder) if file.exists()]
    if present and not config.overwrite:
        raise ValueError(f"{', '.join(present)} exists already; use --overwrite or another --out")
    wanted, captions = config.classes, config.prompt
    if given is not None and told is None and checkpoint.classes and not wanted:
        raise ValueError(f"{file} has no labels; use --class")
    if told is not None and checkpoint.classes:
        wanted = wanted or names_of(told, checkpoint.classes)
    if told is not None and train.text.encoder is not None:
        captions = captions or names_of(told, [])
    labels = y = class_ids(wanted, checkpoint.classes, count)
    if config.guidance != 1 and checkpoint.config.get("class_dropout") == 0:
        raise ValueError(
            f"guidance is {config.guidance}; it must be 1, for the model was trained with class_dropout 0, without a "
            "null class"
        )
    device = choose_device(config.device)
    if checkpoint.encoder is None and config.encoder is not None:
        raise ValueError(f"encoder is {config.encoder!r}, but {path} makes pixels, not latents")
    # Before the sampling, so that an encoder that is missing costs no time.
    decode = None if checkpoint.encoder is None else Decoder(checkpoint.encoder, device, config.encoder)
    if train.text.encoder is not None:
        labels = prompts(captions, count)
        encoder = config.text_encoder or train.text.encoder
        if checkpoint.text_encoder is not None:
            refuse_another(identify_text_encoder(encoder), checkpoint.text_encoder)
        y = TextEncoder(**dataclasses.asdict(train.text) | {"encoder": encoder}, device=device)(labels)
    elif config.prompt or config.text_encoder:
        option = "prompt" if config.prompt else "text_encoder"
        raise ValueError(f"{option} is {getattr(config, option)!r}; this model was trained without text")
    model = checkpoint.build(ema=not config.last_weights).to(device)
    if config.compile:
        model.compile()
    with (
        choose_backend(config.backend),
        torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"),
    ):
        if low is not None and decode is not None and isinstance(model, WALT) and model.config.low_resolution:
            low = small_latents(low.to(device), model, decode, config.batch_size)
        elif low is not None:
            low = to_float(low)
        clips = sample_clips(
            model,
            train.objective,
            count,
            y,
            solver=config.solver,
            steps=50 if config.steps is None and config.solver != "dopri5" else config.steps,
            guidance=config.guidance,
            guidance_channels=config.guidance_channels,
            guidance_rescale=config.guidance_rescale,
            options=config,
            seed=config.seed,
            batch_size=config.batch_size,
            progress=True,
            cuda_graphs=config.cuda_graphs,
            decode=decode,
            encode=None if decode is None else decode.encode,
            continuations=config.continuations,
            past=past,
            low=low,
            low_noise=config.low_noise,
        )
    paths = write(folder, clips.numpy(), labels, checkpoint.classes, config.fps)
    print(f"{count} clips of {clips.shape[1]} frames from {path} (step {checkpoint.step}):")
    if isinstance(labels, list):
        print("prompts:", ", ".join(map(repr, labels)))
    elif labels is not None:
        print("classes:", ", ".join(checkpoint.classes[i] for i in labels))
    for file in paths:
        print(f"  {file}")
    return paths


def main(arguments: list[str] | None = None) -> None:
    logging.basicConfig(format="%(message)s")
    reuse_large_allocations()
    config = tyro.cli(SampleConfig, prog="python -m models.sample", description=__doc__, args=arguments)
    try:
        run(config)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
