"""DDPM: discrete diffusion over 1000 timesteps; the model predicts noise or velocity, and the variance if it can.

    x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) e          e ~ N(0, 1), t in 0..999, 999 the noisiest
    v_t = sqrt(alpha_bar_t) e - sqrt(1 - alpha_bar_t) x_0

At zero terminal SNR, alpha_bar_999 = 0, the noise says nothing about x_0, but v_999 = -x_0 does.

Source: Ho et al. 2020 (arXiv 2006.11239); learned variance, squared cosine, respacing, loss-aware timesteps: Nichol &
Dhariwal 2021 (arXiv 2102.09672); velocity: Salimans & Ho 2022 (arXiv 2202.00512); zero terminal SNR: Lin et al. 2023
(arXiv 2305.08891). W.A.L.T (Gupta et al. 2023, arXiv 2312.06662) prints v with its two roots swapped, which at zero SNR
would ask the model for its own input.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, repeat
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from ..parallel import draws
from ..parallel.draws import of_all
from .common import TIMESTEPS, Model, alpha_bars, at, at_least_float32, conditions_of, expand, gaussian

# Of the loss-aware timesteps: losses remembered of each, and the share of the draws that stays even.
HISTORY = 10
EVEN_SHARE = 0.001
ALL = tuple(range(TIMESTEPS))


def space_timesteps(steps: int | str) -> tuple[int, ...]:
    """The timesteps of the 1000 that a sampler keeps, rising.

    ``50``, or ``"50"``: that many, evenly spaced from 0 to 999, both kept; 1 keeps 999 only.

    ``"10,15,20"``: the 1000 in sections, here 0..333, 334..666 and 667..999 (where they do not divide evenly, the first
    are longer by one), of which the first keeps 10, evenly spaced from its first to its last, and so on. A section that
    keeps 1 keeps its first.

    ``"ddim50"``: 0, s, 2 s, ... with the smallest whole stride s that gives 50, here 20: the last is 980, not 999. Not
    every number has such a stride: 60, 75 and 80 have none.

    Source: Meta's ``space_timesteps`` (guided-diffusion, DiT), from Nichol & Dhariwal 2021 and, for the stride, DDIM
    (Song et al. 2020, arXiv 2010.02502).

    Raises:
        ValueError: none of these, or more than there are.
    """
    if not isinstance(steps, (int, str)):
        raise TypeError(f"steps is {steps!r}; it may be a number or a string")
    if isinstance(steps, int) or steps.isdecimal():
        count = int(steps)
        if not 1 <= count <= TIMESTEPS:
            raise ValueError(f"steps is {steps}; it must be in 1..{TIMESTEPS}")
        return (TIMESTEPS - 1,) if count == 1 else _section(0, TIMESTEPS, count)
    if steps.startswith("ddim") and steps[4:].isdecimal():
        for stride in range(1, TIMESTEPS):
            kept = tuple(range(0, TIMESTEPS, stride))
            if len(kept) == int(steps[4:]):
                return kept
        raise ValueError(f"steps is {steps!r}; no whole stride keeps {steps[4:]} of {TIMESTEPS} timesteps")
    counts = steps.split(",")
    if not all(count.isdecimal() for count in counts):
        raise ValueError(f"steps is {steps!r}; it may be a number, 'ddimN', or sections as in '10,15,20'")
    length, longer = divmod(TIMESTEPS, len(counts))
    result: list[int] = []
    start = 0
    for i, count in enumerate(map(int, counts)):
        size = length + (i < longer)
        if not 1 <= count <= size:
            raise ValueError(f"steps is {steps!r}; of section {i} it may keep 1..{size} timesteps, not {count}")
        result += _section(start, size, count)
        start += size
    return tuple(result)


def _section(start: int, size: int, count: int) -> tuple[int, ...]:
    stride = (size - 1) / max(count - 1, 1)
    # A running sum, as Meta's: where a product would end in a half, the rounding of the sum decides.
    return tuple(start + round(place) for place in accumulate(repeat(stride, count - 1), initial=0.0))


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
def schedule(
    kept: tuple[int, ...], device: torch.device, dtype: torch.dtype, betas: str = "linear", zero_snr: bool = False
) -> Schedule:
    """The tables of the chain of the ``kept`` timesteps (:func:`space_timesteps`) of :func:`alpha_bars`.

    A thinned chain has the same alpha_bar at the kept timesteps, hence ``beta_i = 1 - alpha_bar_i / alpha_bar_{i-1}``
    (Nichol & Dhariwal 2021, arXiv 2102.09672). Computed in float64 and kept on the device.

    Raises:
        ValueError: ``kept`` is empty, does not rise, or leaves 0..999.
    """
    if not kept or list(kept) != sorted({*kept} & {*ALL}):
        raise ValueError(f"kept is {kept}; it must be timesteps in 0..{TIMESTEPS - 1}, rising")
    alpha_bar = alpha_bars(betas, zero_snr)[list(kept)]
    previous = torch.cat((torch.ones(1, dtype=torch.float64), alpha_bar[:-1]))
    beta = 1 - alpha_bar / previous
    variance = beta * (1 - previous) / (1 - alpha_bar)
    # A chain of one step has no later variance to borrow; its only step adds no noise.
    variance[0] = variance[1] if len(kept) > 1 else beta[0]
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
    """Noise or velocity prediction over 1000 timesteps, with a learned variance if the model has the channels for it.

        loss = mean (model(x_t, t, y) - e)^2 [+ L_vlb]          or v_t in place of e

    L_vlb teaches the variance only (the mean is detached): KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), and at t = 0
    the negative log-likelihood of x_0 in bins of 2/255 on [-1, 1]; in bits per dimension.

    The defaults are Meta's DiT. Source: the module's docstring.

    Raises:
        ValueError: an option that does not fit.
    """

    name: ClassVar[str] = "ddpm"

    schedule: Literal["linear", "squared_cosine"] = "linear"
    """Fall of the signal from timestep 0 to 999: 'linear' betas, or the square of a cosine."""
    zero_snr: bool = False
    """Leave no signal at timestep 999, where sampling starts. Needs prediction 'velocity'."""
    prediction: Literal["noise", "velocity"] = "noise"
    """Output of the model."""
    timesteps: Literal["uniform", "loss_aware"] = "uniform"
    """Distribution of t in training: uniform, or 'loss_aware': in proportion to the root mean square of the last 10
    losses of a timestep, once all have 10. The weight 1 / (1000 p(t)) then keeps the expected loss."""

    def __post_init__(self) -> None:
        for name, allowed in (
            ("schedule", ("linear", "squared_cosine")),
            ("prediction", ("noise", "velocity")),
            ("timesteps", ("uniform", "loss_aware")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it may be {allowed[0]!r} or {allowed[1]!r}")
        if self.zero_snr and self.prediction == "noise":
            raise ValueError(
                "zero_snr needs prediction 'velocity'; it is 'noise', which says nothing about the data where there is "
                "no signal"
            )

    def memory(self, device: torch.device) -> dict[str, Tensor]:
        """What ``loss`` remembers from call to call, as it is at the start; empty for uniform timesteps.

        ``losses [1000, 10]`` are the last of each timestep, of which the oldest is overwritten, ``counts [1000]`` how
        many there have been.
        """
        if self.timesteps == "uniform":
            return {}
        return {
            "losses": torch.zeros(TIMESTEPS, HISTORY, device=device),
            "counts": torch.zeros(TIMESTEPS, dtype=torch.int64, device=device),
        }

    def loss(
        self,
        model: Model,
        x: Tensor,
        y: Any,
        generator: torch.Generator | None = None,
        memory: dict[str, Tensor] | None = None,
        low: Tensor | None = None,
    ) -> Tensor:
        """Mean squared error of the noise or velocity, plus L_vlb if the model returns ``2 C`` channels: a scalar.

        Arguments as for :meth:`FlowMatching.loss`; ``memory`` is updated in place.

        Raises:
            ValueError: a wrong number of channels, a learned variance with ``zero_snr``, loss-aware timesteps without
                ``memory``.
        """
        x = at_least_float32(x)
        tables = self.tables(ALL, x.device, torch.float64)
        if self.timesteps == "loss_aware":
            if not memory:
                raise ValueError(f"memory is {memory}; with timesteps 'loss_aware' it must be what memory() returned")
            p = probabilities(memory)
            t = draws.multinomial(p, x.shape[0], generator=generator)
        else:
            t = draws.randint(0, TIMESTEPS, x.shape[0], generator=generator, device=x.device)
        noise = gaussian(x, generator)
        signal, sigma = at(tables.alpha_bar.sqrt(), t, x), at((1 - tables.alpha_bar).sqrt(), t, x)
        x_t = signal * x + sigma * noise

        def estimate(**conditions: Tensor) -> Tensor:
            return self.estimate(model(x_t, t, y, **conditions), x_t, t)

        conditions = conditions_of(model, x, estimate, generator, low)
        prediction, fraction = self.split(model(x_t, t, y, **conditions).to(x.dtype), x)
        target = noise if self.prediction == "noise" else signal * noise - sigma * x
        losses = (prediction - target).square().flatten(1).mean(1)
        if fraction is not None:
            of_x, of_prediction = (at(weight, t, x) for weight in self.weights(tables)[0])
            denoised = of_x * x_t + of_prediction * prediction.detach()
            losses = losses + self.variational_bound(tables, x, x_t, t, denoised, fraction)
        if self.timesteps == "loss_aware" and memory:
            remember(memory, of_all(t), of_all(losses.detach()))
            losses = losses / (TIMESTEPS * p[t])
        return losses.mean()

    def estimate(self, prediction: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The data that a prediction at ``x`` and timesteps ``t [B]``, int64, points at, for self-conditioning.

        From the noise it is bounded by 4, for data of about unit scale: at timestep 999 an error counts 157-fold.
        """
        prediction, _ = self.split(prediction.to(x.dtype), x)
        tables = self.tables(ALL, x.device, torch.float64)
        of_x, of_prediction = (at(weight, t, x) for weight in self.weights(tables)[0])
        x_0 = of_x * x + of_prediction * prediction
        return x_0 if self.prediction == "velocity" else x_0.clamp(-4, 4)

    def tables(self, kept: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Schedule:
        """:func:`schedule` of the ``kept`` timesteps."""
        return schedule(kept, device, dtype, self.schedule, self.zero_snr)

    def weights(self, tables: Schedule) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Of x and of the prediction in x_0, and in the noise, at each step; either is a sum of the two."""
        signal, sigma = tables.alpha_bar.sqrt(), (1 - tables.alpha_bar).sqrt()
        if self.prediction == "velocity":
            return (signal, -sigma), (sigma, signal)
        of_noise = -(1 / tables.alpha_bar - 1).sqrt()
        return (tables.alpha_bar.rsqrt(), of_noise), (torch.zeros_like(signal), torch.ones_like(signal))

    def check(self, prediction: Tensor, x: Tensor) -> None:
        """Raises ValueError for a prediction that has neither C nor 2 C channels, or 2 C with ``zero_snr``."""
        channels = x.shape[1]
        if prediction.shape[1] not in (channels, 2 * channels):
            raise ValueError(
                f"the model returned {prediction.shape[1]} channels; it must return {channels}, or {2 * channels} with "
                "a learned variance"
            )
        if self.zero_snr and prediction.shape[1] != channels:
            raise ValueError(
                f"the model returned {prediction.shape[1]} channels; with zero_snr it must return {channels}: a "
                "learned variance is known only for chains that keep some signal at timestep 999; build the model with "
                "learn_sigma=False"
            )

    def split(self, prediction: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The predicted noise or velocity and, for a model with learned variance, where between its bounds that lies.

        Raises:
            ValueError: as :meth:`check`.
        """
        self.check(prediction, x)
        channels = x.shape[1]
        if prediction.shape[1] == channels:
            return prediction, None
        return prediction[:, :channels], (prediction[:, channels:] + 1) / 2

    @staticmethod
    def variational_bound(
        tables: Schedule, x_0: Tensor, x_t: Tensor, t: Tensor, denoised: Tensor, fraction: Tensor
    ) -> Tensor:
        """L_vlb's term of step ``t``, in bits per dimension: ``[B]``; ``denoised`` is the x_0 that the model predicts.

        The variance is ``beta^f * posterior_variance^(1 - f)`` with the learned fraction f.
        """
        of_x0, of_x = at(tables.posterior_x0_weight, t, x_t), at(tables.posterior_x_weight, t, x_t)
        true_mean, mean = of_x0 * x_0 + of_x * x_t, of_x0 * denoised + of_x * x_t
        true_log_variance = at(tables.posterior_log_variance, t, x_t)
        log_variance = fraction * at(tables.beta.log(), t, x_t) + (1 - fraction) * true_log_variance
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


def probabilities(memory: dict[str, Tensor]) -> Tensor:
    """p ``[1000]`` of the loss-aware timesteps: ``0.999 r_t / sum r + 0.001 / 1000``, even until all have 10 losses.

    r_t is the root mean square of the last 10 losses of timestep t (Nichol & Dhariwal 2021, section 3.3).
    """
    root = memory["losses"].square().mean(1).sqrt()
    even = torch.full_like(root, 1 / TIMESTEPS)
    # On the device, without waiting for it.
    return torch.where(memory["counts"].min() >= HISTORY, torch.lerp(root / root.sum(), even, EVEN_SHARE), even)


def remember(memory: dict[str, Tensor], t: Tensor, losses: Tensor) -> None:
    """Enters the ``losses [B]`` of the timesteps ``t [B]``, in order, each in place of its timestep's oldest."""
    place = torch.arange(len(t), device=t.device)
    earlier = ((t[:, None] == t) & (place[:, None] > place)).sum(1)
    cell = t * HISTORY + (memory["counts"][t] + earlier) % HISTORY
    # More than 10 of one timestep meet in a cell: the last one's loss is written, whichever write comes last.
    last = ((cell[:, None] == cell) * place).amax(1)
    memory["losses"].view(-1)[cell] = losses[last].to(memory["losses"].dtype)
    memory["counts"].index_add_(0, t, torch.ones_like(t))


def discretized_log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log of the mass, in nats, of ``N(mean, exp(log_std)^2)`` on x's bin: width 2/255, open-ended at -1 and 1."""
    inverse = (-log_std).exp()
    upper = torch.where(x > 0.999, 1.0, torch.special.ndtr((x - mean + 1 / 255) * inverse))
    lower = torch.where(x < -0.999, 0.0, torch.special.ndtr((x - mean - 1 / 255) * inverse))
    # The floor bounds the loss and its gradient where the mass underflows.
    return (upper - lower).clamp_min(1e-12).log()
