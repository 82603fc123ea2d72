"""``python -m models.sample CHECKPOINT``: new clips from a checkpoint, as mp4, GIF, PNG contact sheet and npz."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

import av
import numpy as np
import torch
import tyro
from av.filter import Graph
from torch import Tensor, nn
from tqdm import tqdm

from minisora_kernels import use_backend

from . import checkpoint as checkpoints
from .allocator import reuse_large_allocations
from .config import from_dict
from .data import to_bytes
from .integrators import SolverOptions
from .latents import Decoder
from .registry import Objective
from .samplers import SOLVERS, count_steps, sample
from .text import Text, TextEncoder, identify_text_encoder, refuse_another, rows

SMALLEST_SIDE = 128
FORMATS = ("mp4", "gif", "png", "npz")


@dataclass(frozen=True)
class SampleConfig(SolverOptions):
    """What to sample, and how."""

    checkpoint: tyro.conf.Positional[Path]
    """A checkpoint, or a run's folder for its newest whole checkpoint."""
    out: Path | None = None
    """Folder for the files; by default `samples` beside the checkpoint."""
    count: int = 8
    """Number of clips."""
    classes: Annotated[tuple[str, ...], tyro.conf.arg(name="class")] = ()
    """Names or ids of the classes, dealt to the clips in turn; by default all."""
    prompt: tuple[str, ...] = ()
    """Captions, dealt to the clips in turn, for a model that was trained with text; '' is none."""
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


def choose_device(name: str) -> torch.device:
    """The device for ``--device``. A CUDA device is the current one of the process from now on, with TF32 products.

    Raises:
        ValueError: a device that is none of these, or not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    match = re.fullmatch(r"cpu|cuda(?::(\d+))?", name)
    if match is None:
        raise ValueError(f"device is {name!r}; it may be 'auto', 'cpu', 'cuda' or 'cuda:N'")
    if name != "cpu":
        number = int(match[1] or 0)
        if number >= torch.cuda.device_count():
            raise ValueError(f"device is {name!r}; torch finds {torch.cuda.device_count()} CUDA devices")
        torch.cuda.set_device(number)
        torch.set_float32_matmul_precision("high")
    return torch.device(name)


def choose_backend(name: str) -> contextlib.AbstractContextManager[None]:
    """The context for ``--backend``; "auto" leaves the choice, and the environment variable, as they are."""
    return contextlib.nullcontext() if name == "auto" else use_backend(name)


def progress_bar(**options: Any) -> tqdm:
    """A bar that moves on a terminal and adds a line to a log only now and then."""
    return tqdm(mininterval=0.1 if sys.stderr.isatty() else 10, dynamic_ncols=True, **options)


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
) -> Tensor:
    """uint8 ``[count, T, H, W, C]`` from the model, ``batch_size`` clips at a time, on the model's device.

    The clips depend on ``seed`` and ``count``, those of dopri5 and of solvers that draw noise on ``batch_size`` too.
    The solver is by default the first of the objective. ``decode`` makes pixels ``[B, C, T, H, W]`` of the samples of
    a model of latents.

    Raises:
        ValueError: an objective without a sampler, that of autoencoders.
    """
    if objective.name not in SOLVERS:
        raise ValueError(f"objective is {objective.name!r}; it may be one of {', '.join(SOLVERS)} to sample from noise")
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    shape = (model.config.channels, *model.config.input_size)
    noise = torch.randn((count, *shape), generator=generator, device=device)
    clips = []
    starts = range(0, count, batch_size)
    calls = 1 if steps is None else count_steps(objective, steps)
    with progress_bar(total=len(starts) * calls, desc="sampling", disable=not progress) as bar:

        def counted(steps: Iterable[int]) -> Iterator[int]:
            for step in steps:
                yield step
                bar.update()

        for start in starts:
            part = slice(start, start + batch_size)
            clip = sample(
                model,
                objective,
                noise[part],
                None if y is None else rows(y, part).to(device),
                solver=solver or SOLVERS[objective.name][0],
                steps=steps,
                guidance=guidance,
                guidance_channels=guidance_channels,
                guidance_rescale=guidance_rescale,
                options=options,
                generator=generator,
                progress=counted,
                cuda_graphs=cuda_graphs,
            )
            if decode is not None:
                clip = decode(clip if clip.dim() == 5 else clip.unsqueeze(2))
            clips.append(to_bytes(clip).cpu())
    result = torch.cat(clips)
    if result.dim() == 4:
        result = result.unsqueeze(2)
    return result.permute(0, 2, 3, 4, 1).contiguous()


def enlarge(clips: np.ndarray) -> np.ndarray:
    """Pixels repeated by a whole number so that the shorter side of ``[..., H, W, C]`` is 128 or more; RGB."""
    factor = -(-SMALLEST_SIDE // min(clips.shape[-3:-1]))
    clips = clips.repeat(factor, axis=-3).repeat(factor, axis=-2)
    return clips.repeat(3, axis=-1) if clips.shape[-1] == 1 else clips


def contact_sheet(clips: np.ndarray, gap: int = 4) -> np.ndarray:
    """uint8 ``[N, T, H, W, C]`` as one RGB image: a row a sample, a column a frame."""
    clips = enlarge(clips)
    count, frames, height, width, _ = clips.shape
    sheet = np.full((count * (height + gap) - gap, frames * (width + gap) - gap, 3), 255, dtype=np.uint8)
    for i, clip in enumerate(clips):
        for j, frame in enumerate(clip):
            top, left = i * (height + gap), j * (width + gap)
            sheet[top : top + height, left : left + width] = frame
    return sheet


def mosaic(clips: np.ndarray, gap: int = 4) -> np.ndarray:
    """uint8 ``[N, T, H, W, C]`` as one RGB clip ``[T, H', W', 3]`` with the samples side by side, about square.

    H' and W' are even, as H.264 wants them.
    """
    clips = enlarge(clips)
    count, frames, height, width, _ = clips.shape
    columns = min(count, max(1, round((count * height / width) ** 0.5)))
    rows = -(-count // columns)
    tall, wide = rows * (height + gap) - gap, columns * (width + gap) - gap
    film = np.full((frames, tall + tall % 2, wide + wide % 2, 3), 255, dtype=np.uint8)
    for i, clip in enumerate(clips):
        top, left = (height + gap) * (i // columns), (width + gap) * (i % columns)
        film[:, top : top + height, left : left + width] = clip
    return film


def write_png(path: Path, image: np.ndarray) -> None:
    """RGB uint8 ``[H, W, 3]`` as a PNG file."""
    encoder = av.CodecContext.create("png", "w")
    encoder.height, encoder.width = image.shape[:2]
    encoder.pix_fmt, encoder.time_base = "rgb24", Fraction(1)
    packets = encoder.encode(av.VideoFrame.from_ndarray(image, format="rgb24")) + encoder.encode(None)
    path.write_bytes(b"".join(bytes(packet) for packet in packets))


def write_mp4(path: Path, film: np.ndarray, fps: int) -> None:
    """RGB uint8 ``[T, H, W, 3]``, H and W even, as H.264, or as MPEG-4 where this FFmpeg has no H.264 encoder."""
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.height, stream.width = film.shape[1:3]
        stream.pix_fmt = "yuv420p"
        if codec == "libx264":
            stream.options = {"crf": "14"}
        else:
            stream.bit_rate = 8_000_000
        for image in film:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))


def write_gif(path: Path, film: np.ndarray, fps: int) -> None:
    """RGB uint8 ``[T, H, W, 3]`` as an endless GIF with a palette of its own."""
    height, width = film.shape[1:3]
    graph = Graph()
    source = graph.add_buffer(width=width, height=height, format="rgb24", time_base=Fraction(1, fps))
    split, palette = graph.add("split"), graph.add("palettegen")
    use, sink = graph.add("paletteuse"), graph.add("buffersink")
    source.link_to(split)
    split.link_to(palette, 0, 0)
    split.link_to(use, 1, 0)
    palette.link_to(use, 0, 1)
    use.link_to(sink)
    graph.configure()
    with av.open(str(path), "w", options={"loop": "0"}) as container:
        stream = container.add_stream("gif", rate=fps)
        stream.height, stream.width, stream.pix_fmt = height, width, "pal8"
        for number, image in enumerate(film):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, fps)
            source.push(frame)
        source.push(None)
        for _ in film:
            container.mux(stream.encode(sink.pull()))
        container.mux(stream.encode(None))


def write(folder: Path, clips: np.ndarray, labels: Tensor | list[str] | None, fps: int) -> list[Path]:
    """The four files for uint8 clips ``[N, T, H, W, C]``; the npz has ``clips`` and ``labels``, classes or captions."""
    folder.mkdir(parents=True, exist_ok=True)
    mp4, gif, png, npz = paths = output_paths(folder)
    film = mosaic(clips)
    write_mp4(mp4, film, fps)
    write_gif(gif, film, fps)
    write_png(png, contact_sheet(clips))
    np.savez_compressed(npz, clips=clips, **({} if labels is None else {"labels": np.asarray(labels)}))
    return paths


def output_paths(folder: Path) -> list[Path]:
    return [folder / f"samples.{suffix}" for suffix in FORMATS]


def open_checkpoint(path: Path) -> tuple[Path, checkpoints.Checkpoint]:
    """A checkpoint file, or a run folder's newest one."""
    return checkpoints.latest(path) if path.is_dir() else (path, checkpoints.load(path))


def run(config: SampleConfig) -> list[Path]:
    """Sample as configured; returns the files.

    Raises:
        ValueError: a file that is not a checkpoint or does not match, output that is there already, or an option that
            does not fit the model.
    """
    for name in ("count", "batch_size", "fps"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} is {getattr(config, name)}; it must be at least 1")
    path, checkpoint = open_checkpoint(config.checkpoint)
    train = from_dict(checkpoint.train)
    folder = config.out or path.parent / "samples"
    present = [str(file) for file in output_paths(folder) if file.exists()]
    if present and not config.overwrite:
        raise ValueError(f"{', '.join(present)} exists already; use --overwrite or another --out")
    labels = y = class_ids(config.classes, checkpoint.classes, config.count)
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
        labels = prompts(config.prompt, config.count)
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
        clips = sample_clips(
            model,
            train.objective,
            config.count,
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
        )
    paths = write(folder, clips.numpy(), labels, config.fps)
    print(f"{config.count} clips of {clips.shape[1]} frames from {path} (step {checkpoint.step}):")
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
