"""Clips from a model, batch by batch: from noise to pixels, continued, or made large."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..data.encoder import Decoder
from ..data.pixels import shrink, to_bytes, to_float
from ..denoisers.text import Text, rows
from ..parallel.draws import Share
from ..protocols import Denoiser
from ..registry import Objective
from ..runtime.progress import progress_bar
from .plans import count_steps
from .sampler import SampleRequest, Solving, sample


@dataclass(frozen=True, kw_only=True)
class ClipRequest(Solving):
    """Which clips to sample.

    The clips depend on ``seed`` and ``count``, those of dopri5 and of solvers that draw noise on ``batch_size`` too.

    Raises:
        ValueError: values that do not fit each other.
    """

    count: int
    """Number of clips."""
    y: Tensor | Text | None = None
    """Classes ``[count]``, captions, or None for an unconditional model."""
    seed: int
    """Seed of all noise."""
    batch_size: int = 16
    """Clips per call of the model."""
    progress: bool = False
    """Show a progress bar."""
    decode: Callable[[Tensor], Tensor] | None = None
    """Pixels ``[B, C, T, H, W]`` of the samples of a model of latents."""
    encode: Callable[[Tensor], Tensor] | None = None
    """Latents of uint8 pixels."""
    latents: bool = False
    """Return the model's samples as they are, float32, and not as pixels."""
    continuations: int = 0
    """Number of times to extend each clip from its last frames; needs a model trained with past frames."""
    past: Tensor | None = None
    """Clips to extend, instead of sampled ones: uint8 ``[count, T, H, W, C]``."""
    low: Tensor | None = None
    """For a second stage, the small clips ``[count, C, T, h, w]`` in the units of its training."""
    low_noise: int = 0
    """Level of the noise that the small clips get, also drawn from ``seed``."""
    share: Share = field(default_factory=Share)
    """The rank that draws, which makes a part of the clips. Solvers that draw noise draw other noise on each rank."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.continuations < (self.past is not None):
            rule = "not be negative" if self.past is None else "be at least 1 with past"
            raise ValueError(f"continuations is {self.continuations}; it must {rule}")
        if self.latents and (self.continuations or self.decode is not None):
            raise ValueError("latents is True; it goes with neither decode nor continuations")
        if self.decode is not None and self.encode is None and self.continuations:
            raise ValueError(f"encode is None; with decode and {self.continuations} continuations it must be given")
        if self.low is not None and self.continuations:
            raise ValueError(f"continuations is {self.continuations}; with low, which has no more frames, it must be 0")


def sample_clips(model: Denoiser, objective: Objective, request: ClipRequest) -> Tensor:
    """uint8, or with ``latents`` float32, ``[count, T, H, W, C]`` from the model, ``batch_size`` clips at a time.

    With a ``share`` they are the clips of that rank, in the order of the ranks, and as many as it has.

    With ``continuations`` the last frames of a clip are encoded again: W.A.L.T's tokenizer makes its two known latent
    frames of the last 5 frames. The result has them once.

    Raises:
        ValueError: an objective without a sampler, that of autoencoders; a model that cannot go on, ``past`` of another
            size, or ``low`` or ``low_noise`` that does not fit.
    """
    request.solver_for(objective)
    check_low(model, request)
    count, device = request.count, next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(request.seed)
    shape = (count, model.config.channels, *model.config.input_size)
    films = request.continuations + (request.past is None)
    noises = [torch.randn(shape, generator=generator, device=device) for _ in range(films)]
    low = {}
    if request.low is not None:
        low = model.small_clip_arguments(request.low.to(device), request.low_noise, generator)
    overlap = _overlap(model, request) if request.continuations else 0
    own = request.share.part(count)
    starts = own[:: request.batch_size]
    if request.share.rank:
        generator.manual_seed(int(np.random.SeedSequence((request.seed, request.share.rank)).generate_state(1)[0]))
    calls = films * (1 if request.steps is None else count_steps(objective, request.steps))
    result = []
    with progress_bar(total=len(starts) * calls, desc="sampling", disable=not request.progress) as bar:
        for start in starts:
            part = slice(start, min(start + request.batch_size, own.stop))
            y = None if request.y is None else rows(request.y, part).to(device)
            one = SampleRequest(
                **{item.name: getattr(request, item.name) for item in dataclasses.fields(Solving)},
                noise=noises[0][part],
                y=y,
                generator=generator,
                progress=functools.partial(_counted, bar),
                conditions={name: value[part] for name, value in low.items()},
            )
            film = None if request.past is None else request.past[part].to(device).permute(0, 4, 1, 2, 3)
            for noise in noises:
                film = _continued(model, objective, dataclasses.replace(one, noise=noise[part]), request, film, overlap)
            result.append(cast(Tensor, film).cpu())
    return torch.cat(result).permute(0, 2, 3, 4, 1).contiguous()


def _continued(
    model: Denoiser, objective: Objective, one: SampleRequest, request: ClipRequest, film: Tensor | None, overlap: int
) -> Tensor:
    """The film with one more clip, uint8 ``[B, C, T, H, W]``; the clip itself where there is no film yet."""
    if film is not None:
        one = dataclasses.replace(one, past=(request.encode or to_float)(film[:, :, -overlap:]))
    clip = sample(model, objective, one)
    clip = clip if clip.dim() == 5 else clip.unsqueeze(2)
    if request.latents:
        return clip.float()
    frames = to_bytes(clip if request.decode is None else request.decode(clip))
    return frames if film is None else torch.cat((film, frames[:, :, overlap:]), dim=2)


def _counted(bar: tqdm, steps: Iterable[int]) -> Iterator[int]:
    for step in steps:
        yield step
        bar.update()


def _overlap(model: Denoiser, request: ClipRequest) -> int:
    """How many frames of pixels a clip has in common with the one that it continues.

    Raises:
        ValueError: a model that was trained without past frames, or ``past`` that it cannot go on from.
    """
    known, past, count = model.known_frames, request.past, request.count
    if not known:
        raise ValueError(
            f"continuations is {request.continuations}; the model was trained without past, so it must be 0"
        )
    _, height, width = model.config.input_size
    latents = torch.zeros(1, model.config.channels, known, height, width, device=next(model.parameters()).device)
    channels, frames, height, width = (latents if request.decode is None else request.decode(latents)).shape[1:]
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


def check_low(model: Denoiser, request: ClipRequest) -> None:
    """Raises ValueError unless the model takes such small clips, or none, and noise of that level in them."""
    small, low, level = model.small_clips, request.low, request.low_noise
    if small is None and low is not None:
        raise ValueError("low was given, but the model is no second stage, which makes small clips large")
    if small is not None and low is None and small.required:
        raise ValueError("low was not given; the model is a second stage, which needs small clips to make large")
    if small is not None and low is not None:
        shape, fits = tuple(low.shape), (request.count, *small.shape)
        if len(shape) != 5 or any(b not in (None, a) for a, b in zip(shape, fits, strict=True)):
            sizes = ("any" if n is None else str(n) for n in fits)
            raise ValueError(f"low has shape {shape}; it must be [N, C, T, h, w] = [{', '.join(sizes)}]")
    most = 0 if small is None or low is None else small.most_noise
    if not 0 <= level <= most:
        raise ValueError(f"low_noise is {level}; with this model it must be in 0..{most}")


def small_latents(low: Tensor, model: Denoiser, decoder: Decoder, batch_size: int) -> Tensor:
    """What a second stage on latents is told of small clips uint8 ``[N, C, T, h, w]``: latents of half the size.

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


def in_training_units(low: Tensor | None, model: Denoiser, decoder: Decoder | None, batch_size: int) -> Tensor | None:
    """Small clips ``[N, C, T, h, w]``, uint8 or latents, as the training had them: latents, or floats in [-1, 1].

    Raises:
        ValueError: as :func:`small_latents`; latents for a model that is told small clips of its own input.
    """
    if low is None:
        return None
    if low.is_floating_point():
        if model.small_clips is not None and model.small_clips.of_input:
            raise ValueError("low has latents; this model takes clips of uint8")
        return low
    if decoder is not None and model.small_clips is not None and model.small_clips.of_input:
        return small_latents(low.to(next(model.parameters()).device), model, decoder, batch_size)
    return to_float(low)
