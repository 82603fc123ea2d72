"""From noise to samples: solvers of the flow's ODE and of the reversed diffusion, with classifier-free guidance."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, cast

import torch
from torch import Tensor, nn

from minisora_kernels import guided_step

from ..denoisers.text import Text
from ..objectives.common import at_least_float32
from ..objectives.ddpm import DDPM
from ..objectives.flow import FlowMatching
from ..objectives.logsnr import LogSNR
from ..objectives.reconstruction import Reconstruction
from ..protocols import Denoiser
from ..registry import NoiseObjective, Objective
from . import solvers
from .plans import count_steps, diffusion_plan, logsnr_plan
from .predictor import CudaGraphs, Predictor, bound, guide
from .solvers import FLOW_SOLVERS, NotFinite, Plan, Progress, SolverOptions, Update

SOLVERS = {"flow": FLOW_SOLVERS, "ddpm": ("ddpm", "ddim"), "logsnr": ("ddpm", "ddim")}


@dataclass(frozen=True, kw_only=True)
class Solving:
    """How noise becomes samples.

    Raises:
        ValueError: guidance that does not fit.
    """

    solver: str | None = None
    """For flow matching, of the ODE: "euler", "heun" and "midpoint" (two calls a step, second order), "rk4" and
    "rk4_38" (four, fourth; the classic tableau and the 3/8 rule) or "dopri5" (adaptive; the samples of a batch share
    its steps); of the SDE: "euler_maruyama" or "heun_sde" (two calls a step). For DDPM and LogSNR "ddpm" (ancestral)
    or "ddim" (deterministic with eta = 0; Song et al. 2020, arXiv 2010.02502). By default the objective's first."""
    steps: int | str | None = None
    """Number of steps. DDPM takes so many evenly spaced ones of its 1000 timesteps, or those of "ddimN" or of sections
    such as "10,15,20". None only for "dopri5"."""
    guidance: float = 1.0
    """Scale of classifier-free guidance; 1 is none and costs half."""
    guidance_end: float | None = None
    """Scale that ``guidance`` goes to, in even steps: the last of n steps has 1 / n of ``guidance`` and the rest of
    this, as StableCascade's pair of scales. None keeps ``guidance``."""
    guidance_channels: int | None = None
    """Guide the first so many channels only; None guides all."""
    guidance_rescale: float = 0.0
    """Share of the guided prediction that :func:`models.sampling.predictor.guide` gives the spread of the one with
    classes; it is computed in PyTorch, not by the op."""
    options: SolverOptions = field(default_factory=SolverOptions)
    """Options of the SDE solvers, of "dopri5" and of "ddim"."""
    cuda_graphs: bool = False
    """Replay the steps as CUDA graphs; the capture takes four calls. Not run on a GPU."""

    def __post_init__(self) -> None:
        if not 0 <= self.guidance_rescale <= 1:
            raise ValueError(f"guidance_rescale is {self.guidance_rescale}; it must be in [0, 1]")
        for name in ("guidance_rescale", "guidance_channels", "guidance_end"):
            if getattr(self, name) and self.guidance == 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but guidance is 1, which is none")

    def solver_for(self, objective: Objective) -> str:
        """The solver.

        Raises:
            ValueError: an objective without solvers, a solver that is not its own, or options and steps that do not
                fit the solver.
        """
        if objective.name not in SOLVERS:
            raise ValueError(
                f"objective is {objective.name!r}; it may be one of {', '.join(SOLVERS)} to sample from noise"
            )
        allowed = SOLVERS[objective.name]
        solver = self.solver or allowed[0]
        if solver not in allowed:
            names = " and ".join(map(repr, allowed))
            raise ValueError(f"solver is {solver!r}; objective {objective.name!r} has {names}")
        self.options.check(solver)
        if solver == "dopri5" and self.guidance_end is not None:
            raise ValueError(f"guidance_end is {self.guidance_end}, but solver 'dopri5' has no even steps")
        if solver == "dopri5" and self.steps is not None:
            raise ValueError(f"steps is {self.steps}, but solver 'dopri5' takes what its tolerances need")
        if solver != "dopri5" and self.steps is None:
            raise ValueError(f"steps is None; with solver {solver!r} it must be at least 1")
        return solver

    def check_channels(self, channels: int) -> None:
        """Raises ValueError for more guided channels than there are."""
        if self.guidance_channels is not None and not 1 <= self.guidance_channels <= channels:
            raise ValueError(f"guidance_channels is {self.guidance_channels}; it must be in 1..{channels}")


@dataclass(frozen=True, kw_only=True)
class SampleRequest(Solving):
    """What to sample: the noise, and what the model is told."""

    noise: Tensor
    """``[B, C, ...]``, standard normal; with ``reverse`` data."""
    y: Tensor | Text | None = None
    """Classes ``[B]``, captions, or None for an unconditional model."""
    reverse: bool = False
    """Solve the ODE from data to noise."""
    generator: torch.Generator | None = None
    """Generator of the noise that "ddpm" and the SDE solvers add at each step."""
    progress: Progress | None = None
    """Wraps the iterable of steps, as tqdm does."""
    past: Tensor | None = None
    """For frame prediction, the known first frames ``[B, C, k, ...]``; the result begins with them."""
    conditions: Mapping[str, Tensor] = field(default_factory=dict)
    """Further arguments of the model by name, ``[B, ...]``, as the small clips of a second stage."""


@torch.no_grad()
def sample(model: Denoiser, objective: Objective, request: SampleRequest) -> Tensor:
    """Samples from noise; the model is in eval mode meanwhile.

    Args:
        model: with classes and guidance it has a null class.
        objective: what the model was trained with.
        request: what to sample, and how.

    Returns:
        ``[B, C, ...]`` in noise's dtype.

    Raises:
        ValueError: a request that does not fit the objective or the model, CUDA graphs on a CPU or with
            self-conditioning.
        NotFinite: samples that are not finite; names the step, and what may be the cause.
    """
    noise, past, guidance = request.noise, request.past, request.guidance
    solver = request.solver_for(objective)
    assert not isinstance(objective, Reconstruction)  # it has no solver
    if request.reverse and (solver in solvers.SDE_SOLVERS or not isinstance(objective, FlowMatching)):
        raise ValueError(f"reverse needs a solver of the flow's ODE; solver is {solver!r}")
    if request.steps is not None:
        count_steps(objective, request.steps)
    request.check_channels(noise.shape[1])
    if past is not None and not isinstance(objective, DDPM):
        raise ValueError(f"past was given, but objective {objective.name!r} teaches no model to go on from it")
    conditions = dict(request.conditions) if past is None else {"past": past, **request.conditions}
    estimate = objective.estimate if isinstance(objective, DDPM) else None
    predict = Predictor(model, request.y, guidance, estimate, conditions)
    if request.cuda_graphs and predict.estimate is not None:
        raise ValueError("cuda_graphs is True; a model with self-conditioning keeps an estimate between its calls")
    update = updater(predict, objective, request)
    if request.cuda_graphs:
        update = CudaGraphs(update, noise.device)
    try:
        with evaluating(model):
            x = _solve(objective, solver, request, update, predict)
    except NotFinite as error:
        raise NotFinite(f"{error}; {_cause(model, request)}") from None
    return x if past is None else torch.cat((past.to(x.dtype), x[:, :, past.shape[2] :]), dim=2)


def _solve(
    objective: NoiseObjective, solver: str, request: SampleRequest, update: Update, predict: Predictor
) -> Tensor:
    noise, guidance = request.noise, request.guidance
    if solver == "dopri5" and isinstance(objective, FlowMatching):
        start, end = reversed(objective.interval()) if request.reverse else objective.interval()
        velocity = solvers.velocity_of(objective, update, predict.conditions, guidance)
        x = noise
        for _ in (request.progress or iter)(range(1)):
            x = solvers.dopri5(velocity, at_least_float32(noise), start, end, request.options)
        return x.to(noise.dtype)
    plan = plan_of(objective, solver, request)
    return solvers.follow(plan, update, predict.conditions, noise, request.generator, request.progress)


def _cause(model: nn.Module, request: SampleRequest) -> str:
    """Why samples may not be finite, in words."""
    wrong = [name for name, weight in model.state_dict().items() if not weight.isfinite().all()]
    if wrong:
        return f"weights of the model are not finite: {', '.join(wrong[:3])}{' and others' if len(wrong) > 3 else ''}"
    told = {"past": request.past, **request.conditions}
    for name, value in told.items():
        if value is not None and not value.isfinite().all():
            return f"{name} is not finite"
    if request.guidance != 1:
        return f"guidance is {request.guidance}; try one nearer to 1"
    return "the weights are finite; try more steps, a larger tolerance, or precision 'fp32'"


def updater(
    predict: Predictor, objective: NoiseObjective, request: Solving, backend: Literal["reference"] | None = None
) -> Update:
    """What :func:`models.sampling.solvers.follow` calls: x, a condition, a row of coefficients and z to the next x."""

    def update(x: Tensor, condition: Tensor, row: Tensor, z: Tensor | None) -> Tensor:
        cond, null = predict(x, condition)
        objective.check(cond, x)
        row, data = row[:5], row[5:]
        if null is not None and (request.guidance_rescale > 0 or len(data)):
            channels = x.shape[1]
            guided = request.guidance_channels or channels
            cond, null = guide(cond, null, row[0], request.guidance_rescale, channels, guided), None
        if len(data):
            cond = bound(at_least_float32(cond), x, *data)
        few = None if null is None else request.guidance_channels
        return guided_step(x, cond, row, null=null, z=z, channels=few, backend=backend)

    return update


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, then in the mode that it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def plan_of(objective: NoiseObjective, solver: str, request: SampleRequest) -> Plan:
    """The plan of a fixed-step solver of the objective."""
    steps = cast(int, request.steps)
    guidance: float | Tensor = request.guidance
    if request.guidance_end is not None:
        count = count_steps(objective, steps)
        share = torch.arange(count, dtype=torch.float64)[:, None] / count
        guidance = (1 - share) * request.guidance + share * request.guidance_end
    if isinstance(objective, FlowMatching):
        return solvers.flow_plan(objective, solver, steps, guidance, request.options, reverse=request.reverse)
    if isinstance(objective, LogSNR):
        return logsnr_plan(objective, solver, steps, guidance, request.options)
    return diffusion_plan(objective, solver, steps, guidance, request.options)


@torch.no_grad()
def log_likelihood(
    model: Denoiser,
    objective: Objective,
    x: Tensor,
    y: Tensor | None,
    request: Solving | None = None,
    *,
    exact: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The log-density of ``x [B, C, ...]`` in nats, ``[B]``, under the flow's ODE; the model is in eval mode meanwhile.

    For bits per dimension of 8-bit data on [-1, 1]: ``log2(127.5) - log_likelihood / (D log 2)``, for x with uniform
    noise of a level's width added. See :func:`solvers.log_likelihood`.

    Args:
        model, objective, y: as for :func:`sample`; flow matching only.
        request: guidance, and the tolerances of dopri5 in its ``options``.
        exact: the divergence itself, a derivative for every element of a sample; else an unbiased estimate.
        generator: of the estimate's signs, on x's device.

    Raises:
        ValueError: another objective, guidance or options that do not fit.
    """
    if not isinstance(objective, FlowMatching):
        raise ValueError(f"objective is {objective.name!r}; only 'flow' has the ODE of this likelihood")
    request = request or Solving()
    request.options.check("dopri5")
    request.check_channels(x.shape[1])
    predict = Predictor(model, y, request.guidance)
    # The kernels have no backward, and this one is differentiated.
    update = updater(predict, objective, request, backend="reference")
    with evaluating(model):
        velocity = solvers.velocity_of(objective, update, predict.conditions, request.guidance)
        ends = objective.interval()
        return solvers.log_likelihood(velocity, x, *ends, request.options, exact=exact, generator=generator)
