"""From noise to samples: solvers of the flow's ODE and of the reversed diffusion, with classifier-free guidance."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from minisora_kernels import guided_step

from ..denoisers.text import Text
from ..objectives.common import at_least_float32
from ..objectives.ddpm import DDPM
from ..objectives.flow import FlowMatching
from ..objectives.logsnr import LogSNR
from ..registry import Objective
from . import solvers
from .plans import count_steps, diffusion_plan, logsnr_plan
from .predictor import Graphed, Predictor, rescaled
from .solvers import FLOW_SOLVERS, Progress, SolverOptions

SOLVERS = {"flow": FLOW_SOLVERS, "ddpm": ("ddpm", "ddim"), "logsnr": ("ddpm", "ddim")}


def _check_guidance_channels(guidance: float, channels: int | None, of: int) -> None:
    if channels is not None and guidance == 1:
        raise ValueError(f"guidance_channels is {channels}, but guidance is 1, which is none")
    if channels is not None and not 1 <= channels <= of:
        raise ValueError(f"guidance_channels is {channels}; it must be in 1..{of}")


@torch.no_grad()
def sample(
    model: nn.Module,
    objective: Objective,
    noise: Tensor,
    y: Tensor | Text | None,
    *,
    solver: str,
    steps: int | str | None = None,
    guidance: float = 1.0,
    guidance_channels: int | None = None,
    guidance_rescale: float = 0.0,
    options: SolverOptions | None = None,
    reverse: bool = False,
    generator: torch.Generator | None = None,
    progress: Progress | None = None,
    cuda_graphs: bool = False,
    past: Tensor | None = None,
    low: Tensor | None = None,
    low_t: Tensor | None = None,
) -> Tensor:
    """Samples from ``noise``; the model is in eval mode meanwhile.

    Args:
        model: a DiT, or any module with its call; with classes and guidance it has ``null_class``.
        objective: what the model was trained with.
        noise: ``[B, C, ...]``, standard normal.
        y: classes ``[B]``, captions, or None for an unconditional model.
        solver: for flow matching, of the ODE: ``"euler"``, ``"heun"`` and ``"midpoint"`` (two calls a step, second
            order), ``"rk4"`` (four, fourth) or ``"dopri5"`` (adaptive; the samples of a batch share its steps); of the
            SDE: ``"euler_maruyama"`` or ``"heun_sde"`` (two calls a step). For DDPM and LogSNR ``"ddpm"``
            (ancestral) or ``"ddim"`` (deterministic, eta = 0; Song et al. 2020, arXiv 2010.02502).
        steps: how many; for DDPM that many evenly spaced ones of the 1000 timesteps, or those of ``"ddimN"`` or of
            sections such as ``"10,15,20"`` (:func:`models.diffusion.space_timesteps`). None for ``"dopri5"`` alone.
        guidance: classifier-free guidance scale; 1 is none and costs half.
        guidance_channels: guide the first so many channels only; None guides all.
        guidance_rescale: share of the guided prediction that :func:`rescaled` gives the spread of the one with classes;
            it is computed in PyTorch, not by the op.
        options: of the SDE solvers and of ``"dopri5"``.
        reverse: solve the ODE from data, given as ``noise``, to noise.
        generator: of the noise that ``"ddpm"`` and the SDE solvers add at each step.
        progress: wraps the iterable of steps, as tqdm does.
        cuda_graphs: replay the steps as CUDA graphs; the capture takes four calls. Not run on a GPU.
        past: for frame prediction, the known first frames ``[B, C, k, ...]``; the result begins with them.
        low, low_t: for super-resolution, the small clip and the level of its noise, as the model takes them.

    Returns:
        ``[B, C, ...]`` in noise's dtype.

    Raises:
        ValueError: a solver that is not the objective's, steps, guidance or options that do not fit, CUDA graphs on a
            CPU or with self-conditioning.
    """
    options = options or SolverOptions()
    allowed = SOLVERS[objective.name]
    if solver not in allowed:
        raise ValueError(f"solver is {solver!r}; objective {objective.name!r} has {' and '.join(map(repr, allowed))}")
    options.check(solver)
    if reverse and (solver in solvers.SDE_SOLVERS or not isinstance(objective, FlowMatching)):
        raise ValueError(f"reverse needs a solver of the flow's ODE; solver is {solver!r}")
    if solver == "dopri5" and steps is not None:
        raise ValueError(f"steps is {steps}, but solver 'dopri5' takes what its tolerances need")
    if solver != "dopri5" and steps is None:
        raise ValueError(f"steps is None; with solver {solver!r} it must be at least 1")
    count = 1 if steps is None else count_steps(objective, steps)
    _check_guidance_channels(guidance, guidance_channels, noise.shape[1])
    if not 0 <= guidance_rescale <= 1:
        raise ValueError(f"guidance_rescale is {guidance_rescale}; it must be in [0, 1]")
    if guidance_rescale > 0 and guidance == 1:
        raise ValueError(f"guidance_rescale is {guidance_rescale}, but guidance is 1, which is none")
    if past is not None and not isinstance(objective, DDPM):
        raise ValueError(f"past was given, but objective {objective.name!r} teaches no model to go on from it")
    given = {name: value for name, value in (("past", past), ("low", low), ("low_t", low_t)) if value is not None}
    predict = Predictor(model, y, guidance, getattr(objective, "estimate", None), given)
    if cuda_graphs and predict.estimate is not None:
        raise ValueError("cuda_graphs is True; a model with self-conditioning keeps an estimate between its calls")

    def update(x: Tensor, condition: Tensor, row: Tensor, z: Tensor | None) -> Tensor:
        cond, null = predict(x, condition)
        objective.check(cond, x)
        if null is not None and guidance_rescale > 0:
            channels = x.shape[1]
            cond = rescaled(cond, null, guidance, guidance_rescale, channels, guidance_channels or channels)
            return guided_step(x, cond, row, z=z)
        return guided_step(x, cond, row, null=null, z=z, channels=guidance_channels)

    if cuda_graphs:
        update = Graphed(update, noise.device)
    x = noise
    was_training = model.training
    model.eval()
    try:
        if solver == "dopri5":
            start, end = reversed(objective.interval()) if reverse else objective.interval()
            velocity = solvers.velocity_of(objective, update, predict.conditions, guidance)
            for _ in (progress or iter)(range(1)):
                x = solvers.dopri5(velocity, at_least_float32(x), start, end, options)
            return x.to(noise.dtype)
        if isinstance(objective, FlowMatching):
            plan = solvers.flow_plan(objective, solver, steps, guidance, options, reverse=reverse)
        elif isinstance(objective, LogSNR):
            plan = logsnr_plan(objective, solver, count, guidance)
        else:
            plan = diffusion_plan(objective, solver, steps, guidance)
        x = solvers.follow(plan, update, predict.conditions, x, generator, progress)
        return x if past is None else torch.cat((past.to(x.dtype), x[:, :, past.shape[2] :]), dim=2)
    finally:
        model.train(was_training)


@torch.no_grad()
def log_likelihood(
    model: nn.Module,
    objective: Objective,
    x: Tensor,
    y: Tensor | None,
    *,
    guidance: float = 1.0,
    guidance_channels: int | None = None,
    exact: bool = False,
    options: SolverOptions | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The log-density of ``x [B, C, ...]`` in nats, ``[B]``, under the flow's ODE; the model is in eval mode meanwhile.

    For bits per dimension of 8-bit data on [-1, 1]: ``log2(127.5) - log_likelihood / (D log 2)``, for x with uniform
    noise of a level's width added. See :func:`solvers.log_likelihood`.

    Args:
        model, objective, y, guidance, guidance_channels: as for :func:`sample`; flow matching only.
        exact: the divergence itself, a derivative for every element of a sample; else an unbiased estimate.
        options: the tolerances of dopri5.
        generator: of the estimate's signs, on x's device.

    Raises:
        ValueError: another objective, guidance or options that do not fit.
    """
    if not isinstance(objective, FlowMatching):
        raise ValueError(f"objective is {objective.name!r}; only 'flow' has the ODE of this likelihood")
    options = options or SolverOptions()
    options.check("dopri5")
    _check_guidance_channels(guidance, guidance_channels, x.shape[1])
    predict = Predictor(model, y, guidance)

    def update(x: Tensor, condition: Tensor, row: Tensor, z: Tensor | None) -> Tensor:
        cond, null = predict(x, condition)
        objective.check(cond, x)
        # The kernels have no backward, and this one is differentiated.
        return guided_step(x, cond, row, null=null, z=z, channels=guidance_channels, backend="reference")

    was_training = model.training
    model.eval()
    try:
        velocity = solvers.velocity_of(objective, update, predict.conditions, guidance)
        return solvers.log_likelihood(velocity, x, *objective.interval(), options, exact=exact, generator=generator)
    finally:
        model.train(was_training)
