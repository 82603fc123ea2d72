"""Clips from a model, batch by batch: from noise to pixels, continued, or made large."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from ..data.encoder import Decoder
from ..data.pixels import shrink, to_bytes, to_float
from ..denoisers.cascade import Conditioned
from ..denoisers.text import Text, rows
from ..denoisers.walt import WALT, augment
from ..registry import Objective
from ..runtime.progress import progress_bar
from .plans import count_steps
from .sampler import SOLVERS, sample
from .solvers import SolverOptions


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
