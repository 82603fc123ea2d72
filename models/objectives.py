"""What a model is trained to predict, and the loss that says how well it does.

Both objectives give the model timesteps in [0, 1000], the range that its 256-channel sinusoid resolves (over [0, 1] the
sinusoid is nearly a straight line). They point in opposite directions: FlowMatching has noise at 0, DDPM at 999.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

TIMESTEPS = 1000

Model = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]


def expand(values: Tensor, like: Tensor) -> Tensor:
    """``values [B]`` as ``[B, 1, ..., 1]``, to broadcast over ``like``."""
    return values.reshape(-1, *(1,) * (like.dim() - 1))


def _noise(x: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class FlowMatching:
    """Straight paths from noise at t = 0 to data at t = 1.

        x_t = t x_1 + (1 - t) x_0          v = x_1 - x_0          loss = mean (velocity(x_t, t) - v)^2

    The model predicts the velocity, or the data: then ``velocity = (model - x_t) / (1 - t)``, with 1 - t at least 0.05.
    A narrow model learns faster to predict the data: it need not carry the noise of every pixel through its width.

    Source: Lipman et al. 2022 (arXiv 2210.02747); SiT, Ma et al. 2024 (arXiv 2401.08740). Logit-normal timesteps: Esser
    et al. 2024 (arXiv 2403.03206). Prediction of the data: Li & He 2025 (arXiv 2511.13720).

    Args:
        timesteps: how t is drawn in training: ``"uniform"`` on [0, 1], or ``"logit_normal"``, the sigmoid of a normal,
            which spends more of the training on the middle of the path.
        logit_mean, logit_std: of that normal; a negative mean is towards the noise.
        prediction: ``"velocity"`` or ``"data"``.

    Raises:
        ValueError: an option that is none of these.
    """

    name = "flow"

    def __init__(
        self,
        timesteps: str = "uniform",
        logit_mean: float = 0.0,
        logit_std: float = 1.0,
        prediction: str = "velocity",
    ) -> None:
        if timesteps not in ("uniform", "logit_normal"):
            raise ValueError(f"timesteps is {timesteps!r}; it may be 'uniform' or 'logit_normal'")
        if prediction not in ("velocity", "data"):
            raise ValueError(f"prediction is {prediction!r}; it may be 'velocity' or 'data'")
        if logit_std <= 0:
            raise ValueError(f"logit_std is {logit_std}; it must be positive")
        self.timesteps, self.logit_mean, self.logit_std = timesteps, logit_mean, logit_std
        self.prediction = prediction

    def loss(self, model: Model, x: Tensor, y: Tensor | None, generator: torch.Generator | None = None) -> Tensor:
        """Mean squared error of the velocity: a scalar.

        Args:
            model: takes ``(x_t, timesteps [B], y)``.
            x: data ``[B, C, ...]``, about unit scale.
            y: classes ``[B]`` or None.
            generator: on x's device; the only source of t and of the noise.

        Raises:
            ValueError: a model with a learned variance.
        """
        x = _at_least_float32(x)
        if self.timesteps == "uniform":
            t = torch.rand(x.shape[0], generator=generator, device=x.device, dtype=x.dtype)
        else:
            normal = torch.randn(x.shape[0], generator=generator, device=x.device, dtype=x.dtype)
            t = (self.logit_mean + self.logit_std * normal).sigmoid()
        noise = _noise(x, generator)
        share = expand(t, x)
        x_t = share * x + (1 - share) * noise
        prediction = self.velocity(model, x_t, t, y)
        # The bound of 1 - t applies to the target too: a perfect prediction of the data has no loss at any t.
        target = x - noise if self.prediction == "velocity" else (x - x_t) / self._remaining(share)
        return (prediction - target).square().mean()

    def velocity(self, model: Model, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        """The velocity at ``x`` and times ``t [B]`` in [0, 1], in x's dtype."""
        prediction = model(x, t * TIMESTEPS, y).to(x.dtype)
        self.check(prediction, x)
        if self.prediction == "data":
            return (prediction - x) / self._remaining(expand(t, x))
        return prediction

    def weights(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Of x and of the prediction in the velocity at times ``t`` in [0, 1], which is a sum of the two."""
        if self.prediction == "data":
            return -1 / self._remaining(t), 1 / self._remaining(t)
        return torch.zeros_like(t), torch.ones_like(t)

    @staticmethod
    def check(prediction: Tensor, x: Tensor) -> None:
        """Raises ValueError for a prediction that has not x's shape."""
        if prediction.shape != x.shape:
            raise ValueError(
                f"the model returned shape {tuple(prediction.shape)} for x {tuple(x.shape)}; flow matching has no "
                "variance to learn: build the model with learn_sigma=False"
            )

    @staticmethod
    def _remaining(t: Tensor) -> Tensor:
        return (1 - t).clamp_min(0.05)


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


class DDPM:
    """Noise prediction over 1000 steps with linear betas, with a learned variance if the model has the channels for it.

        x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) e          loss = mean (model(x_t, t, y) - e)^2 [+ L_vlb]

    L_vlb teaches the variance only (the mean is detached): KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), and at t = 0
    the negative log-likelihood of x_0 in bins of 2/255 on [-1, 1]; in bits per dimension.

    Source: Ho et al. 2020 (arXiv 2006.11239); learned variance: Nichol & Dhariwal 2021 (arXiv 2102.09672).
    """

    name = "ddpm"

    def loss(self, model: Model, x: Tensor, y: Tensor | None, generator: torch.Generator | None = None) -> Tensor:
        """Mean squared error of the noise, plus L_vlb if the model returns ``2 C`` channels: a scalar.

        Arguments as for :meth:`FlowMatching.loss`.
        """
        x = _at_least_float32(x)
        tables = schedule(TIMESTEPS, x.device, x.dtype)
        t = torch.randint(TIMESTEPS, (x.shape[0],), generator=generator, device=x.device)
        noise = _noise(x, generator)
        alpha_bar = expand(tables.alpha_bar[t], x)
        x_t = alpha_bar.sqrt() * x + (1 - alpha_bar).sqrt() * noise
        epsilon, fraction = self.split(model(x_t, t, y).to(x.dtype), x)
        loss = (epsilon - noise).square().mean()
        if fraction is None:
            return loss
        return loss + self.variational_bound(tables, x, x_t, t, epsilon.detach(), fraction).mean()

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


OBJECTIVES = {"flow": FlowMatching, "ddpm": DDPM}
