"""Solvers of the flow's ODE and SDE, and the likelihood that the ODE gives.

    ODE    dx = v dt                     SDE    dx = (v + w s) dt + sqrt(2 w) dW

v is the velocity, s the score, and w(t) >= 0 any function of time: all have the same distribution of x_t at each t
(SiT, Ma et al. 2024, arXiv 2401.08740, section 2.4; Song et al. 2021, arXiv 2011.13456).

v, s and their sums are linear in x and the model's prediction p, f = f_x x + f_p p with f_x and f_p known ahead
(``FlowMatching.weights``). So what a fixed-step solver makes of one call of the model, with step h,

    x' = c_x x + c_f h f(x, t) + c_z z = (c_x + c_f h f_x) x + c_f h f_p p + c_z z

is one row of coefficients of :func:`minisora_kernels.guided_step`, which guides p on the way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ..objectives.common import at_least_float32, gaussian
from ..objectives.flow import FlowMatching, path_at

Diffusion = Literal["constant", "sbdm", "sigma", "linear", "decreasing", "increasing-decreasing"]
LastStep = Literal["skip", "mean", "tweedie", "euler"]
Update = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], Tensor]
Conditions = Callable[[Tensor], Iterator[Tensor]]
Progress = Callable[[Iterable[int]], Iterable[int]]


# By call of a step: its time as a share of the step, and c_x, c_f, c_z. z is where the step began, but see `EARLIER`.
# "rk4" is the classic tableau, "rk4_38" the 3/8 rule, which torchdiffeq and so SiT's script call "rk4".
TABLEAUX = {
    "euler": ((0.0, 1.0, 1.0, 0.0),),
    "heun": ((0.0, 1.0, 1.0, 0.0), (1.0, 0.5, 0.5, 0.5)),
    "midpoint": ((0.0, 1.0, 0.5, 0.0), (0.5, 0.0, 1.0, 1.0)),
    "rk4": ((0.0, 1.0, 0.5, 0.0), (0.5, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0), (1.0, 1 / 3, 1 / 6, 1.0)),
    "rk4_38": ((0.0, 1.0, 1 / 3, 0.0), (1 / 3, -1.0, 1.0, 2.0), (2 / 3, -1.0, 1.0, 2.0), (1.0, 3 / 8, 1 / 8, 5 / 8)),
}
# By number of states so far, the first that of the step: z of the next call. It brings in the earlier slopes.
EARLIER: dict[str, dict[int, Callable[[list[Tensor]], Tensor]]] = {
    "rk4": {4: lambda x: (x[1] + 2 * x[2] - x[0]) / 3},
    "rk4_38": {3: lambda x: x[1], 4: lambda x: (6 * x[2] - x[0]) / 5},
}


TABLEAUX |= {"euler_maruyama": TABLEAUX["euler"], "heun_sde": TABLEAUX["heun"]}


SDE_SOLVERS = ("euler_maruyama", "heun_sde")
FLOW_SOLVERS = ("euler", "heun", "midpoint", "rk4", "rk4_38", "dopri5", *SDE_SOLVERS)


DEFAULTS = {
    **{"diffusion": "sigma", "diffusion_norm": 1.0, "last_step": "mean", "last_step_size": 0.04},
    **{"rtol": 1e-3, "atol": 1e-6, "eta": 0.0, "clip_denoised": False},
}
# Which solvers have an option; the others are the SDE's.
OWNERS = {"rtol": ("dopri5",), "atol": ("dopri5",), "eta": ("ddim",), "clip_denoised": ("ddpm", "ddim")}


# Far beyond any pixel or latent.
LARGEST = 1e6


class NotFinite(ValueError):
    """Samples that are not finite or larger than ``LARGEST``, or that no solver reaches."""


@dataclass(frozen=True, kw_only=True)
class SolverOptions:
    """What some solvers may be told. None is the default, and the only value for the other solvers.

    Raises:
        ValueError: an option that does not fit.
    """

    diffusion: Diffusion | None = None
    """SDE: form of w(t), the strength of the noise; by default 'sigma'."""
    diffusion_norm: float | None = None
    """SDE: factor of w; by default 1."""
    last_step: LastStep | None = None
    """SDE: last step to t = 1, which adds no noise. It follows the drift ('mean', the default) or the velocity
    ('euler'), or goes to the predicted data ('tweedie'); 'skip' leaves it out. It is an extra call of the model."""
    last_step_size: float | None = None
    """SDE: length of the last step; by default 0.04."""
    rtol: float | None = None
    """dopri5: relative tolerance; by default 1e-3."""
    atol: float | None = None
    """dopri5: absolute tolerance; by default 1e-6."""
    eta: float | None = None
    """ddim: noise that a step adds, as a share of ddpm's with the posterior variance; by default 0, which is none."""
    clip_denoised: bool = False
    """ddpm and ddim: bound the data that each step predicts to [-1, 1], the range of pixels."""

    def __post_init__(self) -> None:
        for name, allowed in (("diffusion", get_args(Diffusion)), ("last_step", get_args(LastStep))):
            value = getattr(self, name)
            if value is not None and value not in allowed:
                raise ValueError(f"{name} is {value!r}; it may be one of {', '.join(allowed)}")
        for name in ("diffusion_norm", "rtol", "atol"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} is {value}; it must be positive")
        if self.eta is not None and not 0 <= self.eta <= 1:
            raise ValueError(f"eta is {self.eta}; it must be in [0, 1]")
        size = self.last_step_size
        if size is not None and not 0 < size <= 0.5:
            raise ValueError(f"last_step_size is {size}; it must be in (0, 0.5]")
        if size is not None and self.last_step == "skip":
            raise ValueError(f"last_step_size is {size}, but last_step is 'skip'")

    def check(self, solver: str) -> None:
        """Raises ValueError for an option that ``solver`` does not have."""
        for name in DEFAULTS:
            owners = OWNERS.get(name, SDE_SOLVERS)
            value = getattr(self, name)
            if value is not None and value is not False and solver not in owners:
                raise ValueError(
                    f"{name} is {value!r}, but solver is {solver!r}; only {' and '.join(map(repr, owners))} "
                    f"{'has' if len(owners) == 1 else 'have'} it"
                )

    def value(self, name: str) -> Any:
        """The option, or its default."""
        given = getattr(self, name)
        return DEFAULTS[name] if given is None else given


def diffusion_strength(objective: FlowMatching, options: SolverOptions, t: Tensor) -> Tensor:
    """w at times ``t``, in float64, with n the norm; 'sbdm' is the w of the diffusion whose marginals the path has.

    constant  n    sbdm  n sigma (alpha' sigma - alpha sigma') / alpha    sigma  n sigma    linear  n (1 - t)
    decreasing  (n cos(pi t) + 1)^2 / 4                      increasing-decreasing  n sin(pi t)^2
    """
    kind, norm = options.value("diffusion"), options.value("diffusion_norm")
    path, t = path_at(objective.path, t), t.double()
    if kind == "constant":
        return torch.full_like(t, norm)
    if kind == "sbdm":
        return norm * path.score_diffusion
    if kind == "sigma":
        return norm * path.sigma
    if kind == "linear":
        return norm * (1 - t)
    if kind == "decreasing":
        return (norm * (math.pi * t).cos() + 1).square() / 4
    return norm * (math.pi * t).sin().square()


def span(objective: FlowMatching, options: SolverOptions) -> tuple[float, float]:
    """The times between which the SDE is solved.

    The score divides by sigma and 'sbdm' by alpha: the SDE ends before the last step, or at 1 - eps if there is none,
    and with 'sbdm' starts at eps (but for 'vp', whose alpha is never 0); eps is 1e-3 where the objective's is 0.
    """
    first, last = objective.interval()
    eps = objective.sample_eps or 1e-3
    if options.value("diffusion") == "sbdm" and objective.path != "vp":
        first = max(first, eps)
    if options.value("last_step") == "skip":
        return first, min(last, 1 - eps)
    return first, 1 - options.value("last_step_size")


class Plan(NamedTuple):
    """What a fixed-step solver asks of the model, and what it makes of the answers.

    ``times [steps, calls]`` are the model's timesteps and ``coefficients [steps, calls, 5]`` the rows of
    :func:`minisora_kernels.guided_step`. Two numbers may follow in a row: the weights of x and of the prediction in the
    data, which are then bounded to [-1, 1]. z is an earlier state, or fresh noise if ``noisy`` (Euler-Maruyama; DDPM,
    whose last step has none: ``noisy_end`` is False). ``kicks [steps]`` is how much noise is added before a step's
    first call (Heun's SDE), and ``last`` the timestep and the row of one more call, after the steps. ``earlier`` is the
    solver's entry of ``EARLIER``.
    """

    times: Tensor
    coefficients: Tensor
    noisy: bool = False
    noisy_end: bool = True
    kicks: Tensor | None = None
    last: tuple[Tensor, Tensor] | None = None
    earlier: Mapping[int, Callable[[list[Tensor]], Tensor]] = MappingProxyType({})


def flow_plan(
    objective: FlowMatching,
    solver: str,
    steps: int,
    guidance: float | Tensor,
    options: SolverOptions | None = None,
    *,
    reverse: bool = False,
) -> Plan:
    """The plan of every solver in ``TABLEAUX``, on the CPU, in float64; ``reverse``: from data to noise.

    ``guidance`` may be ``[steps, 1]``.
    """
    options, stochastic = options or SolverOptions(), solver in SDE_SOLVERS
    first, end = span(objective, options) if stochastic else objective.interval()
    if reverse:
        first, end = end, first
    node, of_state, of_slope, of_z = torch.tensor(TABLEAUX[solver], dtype=torch.float64).unbind(1)
    length = end - first
    times = first + length * ((torch.arange(steps)[:, None] + node) / steps)
    slope_x, slope_p = _drift(objective, options, times) if stochastic else objective.weights(times)
    noisy, kicks = solver == "euler_maruyama", None
    if stochastic:
        noise = (2 * diffusion_strength(objective, options, times) * length / steps).sqrt()
        of_z, kicks = (noise, None) if noisy else (of_z, noise[:, 0])
    of_x, of_prediction = of_state + of_slope * (slope_x * length / steps), of_slope * (slope_p * length / steps)
    last = _last_step(objective, options, end, guidance) if stochastic else None
    rows = step_rows(guidance, of_x, of_prediction, of_z)
    earlier = EARLIER.get(solver, {})
    return Plan(times * objective.time_scale, rows, noisy, kicks=kicks, last=last, earlier=earlier)


def _drift(objective: FlowMatching, options: SolverOptions, t: Tensor) -> tuple[Tensor, Tensor]:
    """The weights of x and of the prediction in v + w s."""
    w = diffusion_strength(objective, options, t)
    (v_x, v_p), (s_x, s_p) = objective.weights(t), objective.weights(t, "score")
    return v_x + w * s_x, v_p + w * s_p


def _last_step(
    objective: FlowMatching, options: SolverOptions, end: float, guidance: float | Tensor
) -> tuple[Tensor, Tensor] | None:
    """The timestep and the row of the step from ``end`` to t = 1."""
    kind = options.value("last_step")
    if kind == "skip":
        return None
    t = torch.tensor(end, dtype=torch.float64)
    if kind == "tweedie":
        of_x, of_prediction = objective.weights(t, "data")
    else:
        slope_x, slope_p = _drift(objective, options, t) if kind == "mean" else objective.weights(t)
        of_x, of_prediction = 1 + (1 - end) * slope_x, (1 - end) * slope_p
    scale = guidance[-1, 0] if isinstance(guidance, Tensor) else guidance
    return t * objective.time_scale, step_rows(scale, of_x, of_prediction)


def step_rows(
    guidance: float | Tensor,
    of_x: Tensor,
    of_prediction: Tensor,
    of_z: Tensor | float = 0.0,
    slope: Tensor | float = 0.0,
    data: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Coefficients of :func:`minisora_kernels.guided_step`, ``[..., 5]`` for of_x ``[...]``.

    With ``data``, the weights of x and of the prediction in it, ``[..., 7]``.
    """
    columns = (guidance, of_x, of_prediction, of_z, slope, *(data or ()))
    tensors = (torch.as_tensor(column, dtype=of_x.dtype, device=of_x.device) for column in columns)
    return torch.stack([tensor.expand_as(of_x) for tensor in tensors], dim=-1)


def _earlier(plan: Plan, states: list[Tensor]) -> Tensor | None:
    """z of a step's next call: where the step began, but for some calls of RK4."""
    if len(states) in plan.earlier:
        return plan.earlier[len(states)](states)
    return states[0] if len(states) > 1 else None


def follow(
    plan: Plan,
    update: Update,
    conditions: Conditions,
    x: Tensor,
    generator: torch.Generator | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """x at the end of the plan.

    Args:
        update: ``(x, condition, row, z)`` to the x that the row of coefficients makes of the model's prediction.
        conditions: the condition for each of the model's timesteps, in turn.

    Raises:
        NotFinite: by step.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    times, coefficients = plan.times.flatten(), plan.coefficients.to(x.device, dtype)
    if plan.last is not None:
        times = torch.cat((times, plan.last[0][None]))
    condition = conditions(times.to(x.device, dtype if times.is_floating_point() else None))
    kicks = None if plan.kicks is None else plan.kicks.to(x.device, x.dtype)
    finite = [(x.abs() < LARGEST).all()]
    for i in (progress or iter)(range(len(coefficients))):
        if kicks is not None:
            x = x + kicks[i] * gaussian(x, generator)
        states = [x]
        for row in coefficients[i]:
            draw = plan.noisy and (plan.noisy_end or i < len(coefficients) - 1)
            z = gaussian(x, generator) if draw else _earlier(plan, states)
            states.append(update(states[-1], next(condition), row, z))
        x = states[-1]
        finite.append((x.abs() < LARGEST).all())
    if plan.last is not None:
        x = update(x, next(condition), plan.last[1].to(x.device, dtype), None)
        finite.append((x.abs() < LARGEST).all())
    # Only now are they read from the device.
    if not all(found := torch.stack(finite).tolist()):
        step = found.index(False)
        size = x.abs().max().item()
        what = f"are {size:g} in size" if math.isfinite(size) else "are not finite"
        raise NotFinite(f"the samples {what}, and wrong since step {step} of {len(found) - 1}")
    return x


def velocity_of(
    objective: FlowMatching, update: Update, conditions: Conditions, guidance: float
) -> Callable[[Tensor, Tensor], Tensor]:
    """The guided velocity as a function of t ``[]`` and x, for solvers that choose their times."""
    first, last = objective.interval()

    def velocity(t: Tensor, x: Tensor) -> Tensor:
        # The guess of a first step may lie beyond the ends, where VP has no sigma.
        t = t.double().clamp(first, last)
        with torch.no_grad():
            condition = next(conditions((t * objective.time_scale).to(x.dtype)[None]))
        of_x, of_prediction = objective.weights(t)
        return update(x, condition, step_rows(guidance, of_x, of_prediction).to(x.dtype), None)

    return velocity


def dopri5(function: Callable[[Tensor, Any], Any], state: Any, start: float, end: float, options: SolverOptions) -> Any:
    """The tensor ``state``, or tuple of tensors, at time ``end`` by Dormand-Prince 5(4) of torchdiffeq.

    The error is bounded in the mean over the batch, so the samples of a batch share their steps and depend, within the
    tolerance, on each other.

    Raises:
        NotFinite: no step is small enough, which is so where the state is not finite.
    """
    from torchdiffeq import odeint

    device = (state[0] if isinstance(state, tuple) else state).device
    times = torch.tensor([start, end], dtype=torch.float64, device=device)
    rtol, atol = options.value("rtol"), options.value("atol")
    try:
        # Without step_t it would step over the end and interpolate.
        found = odeint(function, state, times, rtol=rtol, atol=atol, method="dopri5", options={"step_t": times[1:]})
    except AssertionError as error:
        raise NotFinite(f"solver 'dopri5' gave up with rtol {rtol} and atol {atol}: {error}") from error
    return tuple(part[-1] for part in found) if isinstance(state, tuple) else found[-1]


def log_likelihood(
    velocity: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    start: float,
    end: float,
    options: SolverOptions,
    *,
    exact: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The log-density of ``x [B, C, ...]`` in nats, ``[B]``, under the flow from N(0, I) at ``start`` to ``end``.

        log p(x) = log N(x_start; 0, I) - integral of div v(x_t, t) dt

    Hutchinson's estimate of the divergence is r^T J r with r of independent signs, drawn once per solve, so that the
    solver meets a smooth function; its mean over r is log p(x). ``exact`` takes the trace of J: a derivative for every
    element of a sample. Source: Grathwohl et al. 2019 (arXiv 1810.01367); Song et al. 2021 (arXiv 2011.13456).
    """
    x = at_least_float32(x)
    count = x[0].numel()
    if exact:
        probes = list(
            torch.eye(count, dtype=x.dtype, device=x.device).reshape(count, 1, *x.shape[1:]).expand(-1, *x.shape)
        )
    else:
        probes = [torch.randint(2, x.shape, generator=generator, device=x.device).to(x.dtype) * 2 - 1]

    def function(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            place = state[0].detach().requires_grad_()
            v = velocity(t, place)
        divergence = torch.zeros_like(state[1])
        for probe in probes:
            (product,) = torch.autograd.grad(v, place, probe, retain_graph=probe is not probes[-1])
            divergence += (product * probe).flatten(1).sum(1)
        return v.detach(), divergence

    noise, change = dopri5(function, (x, x.new_zeros(len(x))), end, start, options)
    prior = -0.5 * (noise.square().flatten(1).sum(1) + count * math.log(2 * math.pi))
    return prior + change
