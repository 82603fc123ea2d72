"""The plans of the reversed diffusions: timesteps and coefficients of each step."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..objectives.common import TIMESTEPS
from ..objectives.ddpm import DDPM, Schedule, space_timesteps
from ..objectives.logsnr import LogSNR, logsnr, noise_level, scales
from ..registry import Objective
from . import solvers
from .solvers import Plan, SolverOptions


def diffusion_plan(
    objective: DDPM, solver: str, steps: int | str, guidance: float | Tensor, options: SolverOptions | None = None
) -> Plan:
    """DDPM: the mean of p(x_{i-1} | x_i) and noise. DDIM: the predicted x_0, diffused again by the predicted noise.

    With ``eta`` DDIM takes noise of ``sigma = eta sqrt((1 - a') / (1 - a) (1 - a / a'))`` in place of a part of the
    predicted one; a and a' are alpha_bar before and after the step. Source: Song et al. 2020 (arXiv 2010.02502).
    ``guidance`` may be ``[steps, 1]``.

    A learned variance lies between beta and the posterior variance; one that is not is beta. ``steps`` as in
    :func:`space_timesteps`. On the CPU, in float64.

    Raises:
        ValueError: steps that do not fit; those of a schedule with zero terminal SNR start at timestep 999.
    """
    options = options or SolverOptions()
    eta, clip = options.value("eta"), options.value("clip_denoised")
    kept = space_timesteps(steps)
    if objective.zero_snr and kept[-1] != TIMESTEPS - 1:
        raise ValueError(
            f"steps is {steps!r}, which starts at timestep {kept[-1]}; with zero_snr only timestep {TIMESTEPS - 1} is "
            "pure noise: use a number, or sections whose last has more than 1"
        )
    tables = objective.tables(kept, torch.device("cpu"), torch.float64)
    tables = Schedule(*(table.flip(0)[:, None] for table in tables))
    (x0_of_x, x0_of_prediction), (noise_of_x, noise_of_prediction) = objective.weights(tables)
    x: Tensor | float
    noise: Tensor | float
    if solver == "ddim":
        before, after = tables.alpha_bar, tables.previous
        sigma, slope = eta * ((1 - after) / (1 - before) * (1 - before / after)).sqrt(), torch.zeros_like(before)
        x_0, x, noise = after.sqrt(), 0.0, (1 - after - sigma.square()).clamp_min(0).sqrt()
    else:
        sigma, slope = tables.beta.sqrt(), (tables.beta.log() - tables.posterior_log_variance) / 4
        x_0, x, noise = tables.posterior_x0_weight, tables.posterior_x_weight, 0.0
    of_x = x_0 * x0_of_x + x + noise * noise_of_x
    of_prediction = x_0 * x0_of_prediction + noise * noise_of_prediction
    data = (x0_of_x, x0_of_prediction) if clip else None
    coefficients = solvers.step_rows(guidance, of_x, of_prediction, sigma, slope, data)
    return Plan(tables.timesteps, coefficients, noisy=solver == "ddpm" or eta > 0, noisy_end=False)


def logsnr_plan(
    objective: LogSNR, solver: str, steps: int, guidance: float | Tensor, options: SolverOptions | None = None
) -> Plan:
    """DDPM and DDIM over the logSNR of evenly spaced r from 1 to 0, with ``objective.sample_shift``.

        x' = a' x_0 + sqrt(b'^2 - sigma^2) e + sigma z       sigma = eta b' / b sqrt(1 - a^2 / a'^2), eta 1 for DDPM

    The last step returns x_0 itself (a' = 1, b' = 0), not the noisy sample at the schedule's bound. ``guidance`` may be
    ``[steps, 1]``. On the CPU, in float64.
    """
    options = options or SolverOptions()
    value = logsnr(torch.linspace(1, 0, steps + 1, dtype=torch.float64), objective.sample_shift)
    a, b = (scale[:-1, None] for scale in scales(value))
    next_a, next_b = (
        F.pad(scale[1:-1], (0, 1), value=end)[:, None] for scale, end in zip(scales(value), (1, 0), strict=True)
    )
    # x_0 and e as sums of x and of the prediction
    zero, one = torch.zeros_like(a), torch.ones_like(a)
    if objective.prediction == "noise":
        x_0, e = (1 / a, -b / a), (zero, one)
    else:
        x_0, e = (a, -b), (b, a)
    eta = 1.0 if solver == "ddpm" else options.value("eta")
    sigma = eta * next_b / b * (1 - (a / next_a).square()).sqrt() if eta else zero
    of_e = (next_b.square() - sigma.square()).sqrt()
    of_x, of_prediction = (next_a * of_x_0 + of_e * of_noise for of_x_0, of_noise in zip(x_0, e, strict=True))
    data = x_0 if options.value("clip_denoised") else None
    coefficients = solvers.step_rows(guidance, of_x, of_prediction, sigma, data=data)
    times = noise_level(value[:-1])[:, None] * TIMESTEPS
    return Plan(times, coefficients, noisy=eta > 0, noisy_end=False)


def count_steps(objective: Objective, steps: int | str) -> int:
    """How many steps ``steps`` are: a number, or for a diffusion also what :func:`space_timesteps` takes.

    Raises:
        ValueError: steps that are not the objective's.
    """
    if isinstance(objective, DDPM):
        return len(space_timesteps(steps))
    if not isinstance(steps, int):
        raise ValueError(f"steps is {steps!r}; objective {objective.name!r} takes a number, only 'ddpm' has timesteps")
    if steps < 1:
        raise ValueError(f"steps is {steps}; it must be at least 1")
    return steps
