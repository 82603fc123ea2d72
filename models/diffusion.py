"""DDPM: the noise in a sample of a discrete diffusion, with a learned variance if the model has the channels for it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from .objectives import TIMESTEPS, Model, at_least_float32, expand, gaussian


class Schedule(NamedTuple):
    """A discrete diffusion's tables, ``[steps]`` each, indexed by step; step 0 is the least noisy.

    ``alpha_bar`` is the product of ``1 - beta`` up to and including a step, ``previous`` the one of the step before, 1
    at step 0. ``posterior_*`` describe q(x_{i-1} | x_i, x_0) = N(x0_weight x_0 + x_weight x_i, variance). At step 0
    that variance is 0, so its logarithm is step 1's there.
    """

    timesteps: Tensor
    beta: Tensor
    alpha_bar: Tensor
    previous: Tensor
    posterior_x0_weight: Tensor
    posterior_x_weight: Tensor
    posterior_log_variance: Tensor


@lru_cache(maxsize=32)
def schedule(steps: int, device: torch.device, dtype: torch.dtype) -> Schedule:
    """The linear schedule of 1000 betas from 1e-4 to 0.02, thinned to ``steps`` evenly spaced steps that end at 999.

    A thinned chain has the same alpha_bar at the kept timesteps, hence ``beta_i = 1 - alpha_bar_i / alpha_bar_{i-1}``
    (Nichol & Dhariwal 2021, arXiv 2102.09672). Computed in float64 and kept on the device.

    Raises:
        ValueError: ``steps`` outside 1..1000.
    """
    if not 1 <= steps <= TIMESTEPS:
        raise ValueError(f"steps is {steps}; it must be in 1..{TIMESTEPS}")
    last = TIMESTEPS - 1
    kept = [last] if steps == 1 else [round(i * last / (steps - 1)) for i in range(steps)]
    full = (1 - torch.linspace(1e-4, 0.02, TIMESTEPS, dtype=torch.float64)).cumprod(0)
    alpha_bar = full[kept]
    previous = torch.cat((torch.ones(1, dtype=torch.float64), alpha_bar[:-1]))
    beta = 1 - alpha_bar / previous
    variance = beta * (1 - previous) / (1 - alpha_bar)
    # A chain of one step has no later variance to borrow; its only step adds no noise.
    variance[0] = variance[1] if steps > 1 else beta[0]
    tables = (
        alpha_bar,
        previous,
        beta * previous.sqrt() / (1 - alpha_bar),
        (1 - previous) * (1 - beta).sqrt() / (1 - alpha_bar),
        variance.log(),
    )
    timesteps = torch.tensor(kept, device=device)
    return Schedule(timesteps, *(table.to(device, dtype) for table in (beta, *tables)))


@dataclass(frozen=True)
class DDPM:
    """Noise prediction over 1000 steps with linear betas, with a learned variance if the model has the channels for it.

        x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) e          loss = mean (model(x_t, t, y) - e)^2 [+ L_vlb]

    L_vlb teaches the variance only (the mean is detached): KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), and at t = 0
    the negative log-likelihood of x_0 in bins of 2/255 on [-1, 1]; in bits per dimension.

    Source: Ho et al. 2020 (arXiv 2006.11239); learned variance: Nichol & Dhariwal 2021 (arXiv 2102.09672).
    """

    name: ClassVar[str] = "ddpm"

    def loss(self, model: Model, x: Tensor, y: Tensor | None, generator: torch.Generator | None = None) -> Tensor:
        """Mean squared error of the noise, plus L_vlb if the model returns ``2 C`` channels: a scalar.

        Arguments as for :meth:`FlowMatching.loss`.
        """
        x = at_least_float32(x)
        tables = schedule(TIMESTEPS, x.device, x.dtype)
        t = torch.randint(TIMESTEPS, (x.shape[0],), generator=generator, device=x.device)
        noise = gaussian(x, generator)
        alpha_bar = expand(tables.alpha_bar[t], x)
        x_t = alpha_bar.sqrt() * x + (1 - alpha_bar).sqrt() * noise
        given: dict[str, Tensor] = {}
        if hasattr(model, "training_conditions"):

            def estimate(**given: Tensor) -> Tensor:
                return self.estimate(model(x_t, t, y, **given), x_t, t)

            given = model.training_conditions(x, estimate, generator)
        epsilon, fraction = self.split(model(x_t, t, y, **given).to(x.dtype), x)
        loss = (epsilon - noise).square().mean()
        if fraction is None:
            return loss
        return loss + self.variational_bound(tables, x, x_t, t, epsilon.detach(), fraction).mean()

    @classmethod
    def estimate(cls, prediction: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The data that a prediction at ``x`` and timesteps ``t [B]``, int64, points at, for self-conditioning.

        Bounded by 4, for data of about unit scale: at timestep 999 an error of the noise counts 157-fold.
        """
        epsilon, _ = cls.split(prediction.to(x.dtype), x)
        alpha_bar = expand(schedule(TIMESTEPS, x.device, x.dtype).alpha_bar[t], x)
        return ((x - (1 - alpha_bar).sqrt() * epsilon) / alpha_bar.sqrt()).clamp(-4, 4)

    @staticmethod
    def check(prediction: Tensor, x: Tensor) -> None:
        """Raises ValueError for a prediction that has neither C nor 2 C channels."""
        channels = x.shape[1]
        if prediction.shape[1] not in (channels, 2 * channels):
            raise ValueError(
                f"the model returned {prediction.shape[1]} channels; it must return {channels}, or {2 * channels} with "
                "a learned variance"
            )

    @classmethod
    def split(cls, prediction: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The predicted noise and, for a model with learned variance, where between its bounds the variance lies.

        Raises:
            ValueError: a prediction that has neither C nor 2 C channels.
        """
        cls.check(prediction, x)
        channels = x.shape[1]
        if prediction.shape[1] == channels:
            return prediction, None
        return prediction[:, :channels], (prediction[:, channels:] + 1) / 2

    @staticmethod
    def step(
        tables: Schedule, x: Tensor, i: Tensor, epsilon: Tensor, fraction: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and log-variance of p(x_{i-1} | x_i), and the x_0 they point at, for steps ``i [B]``.

        The variance is ``beta^f * posterior_variance^(1 - f)`` with the learned fraction f. Without one it is beta, but
        at step 0 the posterior variance of step 1.
        """
        alpha_bar = expand(tables.alpha_bar[i], x)
        x_0 = (x - (1 - alpha_bar).sqrt() * epsilon) / alpha_bar.sqrt()
        mean = expand(tables.posterior_x0_weight[i], x) * x_0 + expand(tables.posterior_x_weight[i], x) * x
        smallest, largest = expand(tables.posterior_log_variance[i], x), expand(tables.beta[i].log(), x)
        if fraction is None:
            log_variance = torch.where(expand(i, x) == 0, smallest, largest).expand_as(x)
        else:
            log_variance = fraction * largest + (1 - fraction) * smallest
        return mean, log_variance, x_0

    @classmethod
    def variational_bound(
        cls, tables: Schedule, x_0: Tensor, x_t: Tensor, t: Tensor, epsilon: Tensor, fraction: Tensor
    ) -> Tensor:
        """L_vlb's term of step ``t``, in bits per dimension: ``[B]``."""
        true_mean = expand(tables.posterior_x0_weight[t], x_t) * x_0 + expand(tables.posterior_x_weight[t], x_t) * x_t
        true_log_variance = expand(tables.posterior_log_variance[t], x_t)
        mean, log_variance, _ = cls.step(tables, x_t, t, epsilon, fraction)
        divergence = 0.5 * (
            log_variance
            - true_log_variance
            - 1
            + (true_log_variance - log_variance).exp()
            + (true_mean - mean).square() * (-log_variance).exp()
        )
        decoder = -discretized_log_likelihood(x_0, mean, 0.5 * log_variance)
        nats = torch.where(expand(t, x_t) == 0, decoder, divergence)
        return nats.flatten(1).mean(1) / math.log(2)


def discretized_log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log of the mass, in nats, of ``N(mean, exp(log_std)^2)`` on x's bin: width 2/255, open-ended at -1 and 1."""
    inverse = (-log_std).exp()
    upper = torch.where(x > 0.999, 1.0, torch.special.ndtr((x - mean + 1 / 255) * inverse))
    lower = torch.where(x < -0.999, 0.0, torch.special.ndtr((x - mean - 1 / 255) * inverse))
    # The floor bounds the loss and its gradient where the mass underflows.
    return (upper - lower).clamp_min(1e-12).log()
