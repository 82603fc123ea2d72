"""From noise to samples: solvers of the flow's ODE and of the reversed diffusion, with classifier-free guidance."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from .objectives import DDPM, FlowMatching, Model, schedule

Objective = FlowMatching | DDPM
Progress = Callable[[Iterable[int]], Iterable[int]]

SOLVERS = {"flow": ("euler", "heun"), "ddpm": ("ddpm", "ddim")}


def guide(cond: Tensor, null: Tensor, guidance: float, channels: int | None = None) -> Tensor:
    """``null + guidance * (cond - null)`` on the first ``channels`` channels (None: all); the rest is ``cond``.

    Source: Ho & Salimans 2022 (arXiv 2207.12598). Meta's DiT guides three of four channels.

    Raises:
        ValueError: ``channels`` outside 1..C.
    """
    if channels is not None and not 1 <= channels <= cond.shape[1]:
        raise ValueError(f"guidance channels are {channels}; they may be 1..{cond.shape[1]}, or None for all")
    guided = torch.lerp(null, cond, guidance)
    if channels is None:
        return guided
    return torch.cat((guided[:, :channels], cond[:, channels:]), dim=1)


def guided_model(model: nn.Module, y: Tensor | None, guidance: float, channels: int | None) -> Model:
    """``model`` with classifier-free guidance: one call on the batch doubled to (conditional | null class).

    A learned variance, the second half of ``2 C`` channels, is the conditional one's.

    Raises:
        ValueError: guidance for a model without classes, or without labels.
    """
    if guidance == 1:
        return model
    null_class = getattr(model, "null_class", None)
    if null_class is None or y is None:
        raise ValueError(f"guidance is {guidance}; without classes it must be 1")
    labels = torch.cat((y, torch.full_like(y, null_class)))

    def guided(x: Tensor, t: Tensor, _: Tensor | None) -> Tensor:
        cond, null = model(torch.cat((x, x)), torch.cat((t, t)), labels).to(x.dtype).chunk(2)
        c = x.shape[1]
        return torch.cat((guide(cond[:, :c], null[:, :c], guidance, channels), cond[:, c:]), dim=1)

    return guided


@torch.no_grad()
def sample(
    model: nn.Module,
    objective: Objective,
    noise: Tensor,
    y: Tensor | None,
    *,
    solver: str,
    steps: int,
    guidance: float = 1.0,
    guidance_channels: int | None = None,
    generator: torch.Generator | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Samples from ``noise``; the model is in eval mode meanwhile.

    Args:
        model: a DiT, or any module with its call; with guidance it has ``null_class``.
        objective: what the model was trained with.
        noise: ``[B, C, ...]``, standard normal.
        y: classes ``[B]``, or None for an unconditional model.
        solver: ``"euler"`` or ``"heun"`` (two calls a step, second order) for flow matching; ``"ddpm"`` (ancestral) or
            ``"ddim"`` (deterministic, eta = 0; Song et al. 2020, arXiv 2010.02502) for DDPM.
        steps: of the solver; DDPM and DDIM use that many evenly spaced ones of the 1000.
        guidance: classifier-free guidance scale; 1 is none and costs half.
        guidance_channels: guide the first so many channels only; None guides all.
        generator: of the noise that ``"ddpm"`` adds at each step.
        progress: wraps the iterable of steps, as tqdm does.

    Returns:
        ``[B, C, ...]`` in noise's dtype.

    Raises:
        ValueError: a solver that is not the objective's, steps or guidance that do not fit.
    """
    allowed = SOLVERS[objective.name]
    if solver not in allowed:
        raise ValueError(f"solver is {solver!r}; objective {objective.name!r} has {' and '.join(map(repr, allowed))}")
    if steps < 1:
        raise ValueError(f"steps is {steps}; it must be at least 1")
    guided = guided_model(model, y, guidance, guidance_channels)
    progress = progress or iter
    was_training = model.training
    model.eval()
    try:
        if isinstance(objective, FlowMatching):
            return _flow(guided, objective, noise, y, solver, steps, progress)
        return _diffusion(guided, noise, y, solver, steps, generator, progress)
    finally:
        model.train(was_training)


def _flow(
    model: Model, objective: FlowMatching, x: Tensor, y: Tensor | None, solver: str, steps: int, progress: Progress
) -> Tensor:
    def velocity(x: Tensor, t: float) -> Tensor:
        return objective.velocity(model, x, x.new_full((x.shape[0],), t), y)

    for i in progress(range(steps)):
        start, end = i / steps, (i + 1) / steps
        v = velocity(x, start)
        if solver == "heun":
            v = (v + velocity(x + v / steps, end)) / 2
        x = x + v / steps
    return x


def _diffusion(
    model: Model,
    x: Tensor,
    y: Tensor | None,
    solver: str,
    steps: int,
    generator: torch.Generator | None,
    progress: Progress,
) -> Tensor:
    tables = schedule(steps, x.device, x.dtype)
    for i in progress(range(steps - 1, -1, -1)):
        step = tables.timesteps.new_full((x.shape[0],), i)
        epsilon, fraction = DDPM.split(model(x, tables.timesteps[step], y).to(x.dtype), x)
        mean, log_variance, x_0 = DDPM.step(tables, x, step, epsilon, fraction)
        if solver == "ddim":
            previous = tables.previous[i]
            x = previous.sqrt() * x_0 + (1 - previous).sqrt() * epsilon
        else:
            x = mean
            if i > 0:
                draw = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
                x = x + (0.5 * log_variance).exp() * draw
    return x
