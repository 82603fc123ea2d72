"""Flow matching and SiT: paths from noise to data, what a model predicts on them, and its loss.

A path mixes noise x_0 ~ N(0, I) at t = 0 with data x_1 at t = 1:

    x_t = alpha_t x_1 + sigma_t x_0

    path        alpha_t                                       sigma_t
    linear      t                                             1 - t
    gvp         sin(pi t / 2)                                 cos(pi t / 2)
    vp          exp(-19.9 (1 - t)^2 / 4 - 0.1 (1 - t) / 2)    sqrt(1 - alpha_t^2)

With D = E[x_1 | x_t] and E = E[x_0 | x_t], everything that a model may predict is a sum a D + b E:

    velocity    alpha_t' D + sigma_t' E         data      D
    score       -E / sigma_t                    noise     E

and so is x_t, so a prediction p = a D + b E becomes any other, q = c D + d E, by solving two linear equations:

    q = ((c b - d a) x_t + (d alpha_t - c sigma_t) p) / (b alpha_t - a sigma_t)

Source: Lipman et al. 2022 (arXiv 2210.02747); SiT, Ma et al. 2024 (arXiv 2401.08740). Logit-normal timesteps: Esser et
al. 2024 (arXiv 2403.03206). Prediction of the data: Li & He 2025 (arXiv 2511.13720).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ..parallel import draws
from .common import TIMESTEPS, Model, at_least_float32, check_shape, conditions_of, expand, gaussian

Prediction = Literal["velocity", "data", "score", "noise"]
PathName = Literal["linear", "gvp", "vp"]


# The least sigma that a prediction of the data is divided by (Li & He 2025).
LEAST_SIGMA = 0.05


class Path(NamedTuple):
    """A path at times t, in float64; ``divisor`` is sigma, or the least value that may be divided by."""

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor
    divisor: Tensor

    def mix(self, kind: Prediction) -> tuple[Tensor, Tensor]:
        """The weights (a, b) of D and E in what is predicted."""
        zero, one = torch.zeros_like(self.alpha), torch.ones_like(self.alpha)
        return {
            "velocity": (self.d_alpha, self.d_sigma),
            "data": (one, zero),
            "score": (zero, -1 / self.divisor),
            "noise": (zero, one),
        }[kind]

    @property
    def score_diffusion(self) -> Tensor:
        """w with velocity = (alpha' / alpha) x + w score: ``sigma (alpha' sigma - alpha sigma') / alpha``."""
        return self.sigma * (self.d_alpha * self.sigma - self.alpha * self.d_sigma) / self.alpha


def path_at(path: PathName, t: Tensor, least_sigma: float = 0.0) -> Path:
    """alpha, sigma and their derivatives at times ``t`` in [0, 1], in float64; nothing cancels near either end."""
    t = t.double()
    left = 1 - t
    if path == "linear":
        alpha, sigma, d_alpha, d_sigma = t, left, torch.ones_like(t), -torch.ones_like(t)
    elif path == "gvp":
        alpha, sigma = (math.pi / 2 * t).sin(), (math.pi / 2 * left).sin()
        d_alpha, d_sigma = math.pi / 2 * sigma, -math.pi / 2 * alpha
    else:
        log_alpha = -19.9 / 4 * left.square() - 0.1 / 2 * left
        alpha, sigma = log_alpha.exp(), (-(2 * log_alpha).expm1()).sqrt()
        d_alpha = alpha * (19.9 * left + 0.1) / 2
        d_sigma = -alpha * d_alpha / sigma.clamp_min(least_sigma)
    return Path(alpha, sigma, d_alpha, d_sigma, sigma.clamp_min(least_sigma))


@dataclass(frozen=True)
class FlowMatching:
    """A path, what the model predicts on it, and the loss.

        velocity      mean (model(x_t, t) - alpha' x_1 - sigma' x_0)^2
        data          the same, of the velocity that the prediction stands for; it is divided by max(sigma, 0.05)
        noise         mean w(t) (model(x_t, t) - x_0)^2
        score         mean w(t) (sigma model(x_t, t) + x_0)^2

    The model is called with ``time_scale * t``: 1000 t, the range that a sinusoid of 256 channels resolves. SiT's
    published weights were trained with t itself.
    A narrow model learns faster to predict the data: it need not carry the noise of every pixel through its width.

    Times stay away from the ends where a division by alpha or sigma fails: they lie in [start, 1 - eps], with

        path          prediction        eps in training    eps in sampling    start
        linear, gvp   velocity, data    0                  0                  0
        linear, gvp   score, noise      1e-3               1e-3               eps
        vp            any               1e-5               1e-3               0

    These are SiT's; ``train_eps`` and ``sample_eps`` replace them, each on its own. Samplers of the SDE have further
    needs (``models.sampling.solvers.span``).

    Raises:
        ValueError: an option that does not fit.
    """

    name: ClassVar[str] = "flow"

    prediction: Prediction = "velocity"
    """Output of the model."""
    timesteps: Literal["uniform", "logit_normal"] = "uniform"
    """Distribution of t in training: uniform on [0, 1], or the sigmoid of a normal, which favours the middle of the
    path."""
    logit_mean: float = 0.0
    """Mean of the normal behind 'logit_normal'; negative values favour noise."""
    logit_std: float = 1.0
    """Standard deviation of the normal behind 'logit_normal'."""
    path: PathName = "linear"
    """Mix of noise and data: on a line, on a circle ('gvp'), or as in the variance-preserving diffusion ('vp')."""
    weight: Literal["none", "velocity", "likelihood"] = "none"
    """Weight over t of the loss of score and noise: that of the velocity's error, or of a bound of the likelihood."""
    train_eps: float | None = None
    """Distance of training's times from the ends of [0, 1]; the default depends on path and prediction."""
    sample_eps: float | None = None
    """Distance of sampling's times from the ends of [0, 1]; the default depends on path and prediction."""
    time_scale: float = float(TIMESTEPS)
    """Timestep that the model is told at t = 1; 1 for SiT's published weights."""

    def __post_init__(self) -> None:
        for name, allowed in (
            ("prediction", get_args(Prediction)),
            ("timesteps", ("uniform", "logit_normal")),
            ("path", get_args(PathName)),
            ("weight", ("none", "velocity", "likelihood")),
        ):
            value = getattr(self, name)
            if value not in allowed:
                choices = f"{', '.join(map(repr, allowed[:-1]))} or {allowed[-1]!r}"
                raise ValueError(f"{name} is {value!r}; it may be {choices}")
        if (self.logit_mean, self.logit_std) != (0.0, 1.0) and self.timesteps != "logit_normal":
            raise ValueError(f"logit_mean and logit_std need timesteps 'logit_normal'; it is {self.timesteps!r}")
        if not 0 < self.time_scale < math.inf:
            raise ValueError(f"time_scale is {self.time_scale}; it must be positive")
        if self.logit_std <= 0:
            raise ValueError(f"logit_std is {self.logit_std}; it must be positive")
        if self.weight != "none" and self.prediction not in ("score", "noise"):
            raise ValueError(f"weight is {self.weight!r}; with prediction {self.prediction!r} it must be 'none'")
        for name in ("train_eps", "sample_eps"):
            eps = getattr(self, name)
            if eps is not None and not 0 <= eps < 0.5:
                raise ValueError(f"{name} is {eps}; it must be in [0, 0.5)")
            if eps == 0 and (self.path == "vp" or self.prediction in ("score", "noise")):
                raise ValueError(
                    f"{name} is 0; with path {self.path!r} and prediction {self.prediction!r} it must be positive, for "
                    "they divide by 0 at an end"
                )

    def interval(self, *, training: bool = False) -> tuple[float, float]:
        """The first and the last time, as the table says."""
        eps = self.train_eps if training else self.sample_eps
        divides = self.prediction in ("score", "noise")
        if eps is None and self.path == "vp":
            eps = 1e-5 if training else 1e-3
        elif eps is None:
            eps = 1e-3 if divides else 0.0
        return (eps if divides and self.path != "vp" else 0.0), 1 - eps

    def memory(self, device: torch.device) -> dict[str, Tensor]:
        """What ``loss`` remembers from call to call: nothing."""
        return {}

    def loss(
        self,
        model: Model,
        x: Tensor,
        y: Any,
        generator: torch.Generator | None = None,
        memory: dict[str, Tensor] | None = None,
        low: Tensor | None = None,
    ) -> Tensor:
        """The mean of the squared error: a scalar.

        Args:
            model: takes ``(x_t, timesteps [B], y)``.
            x: data ``[B, C, ...]``, about unit scale.
            y: classes ``[B]`` or None.
            generator: on x's device; the only source of t and of the noise.
            memory: of :meth:`memory`, the same in all calls of a training.
            low: small clips of the data, for a second stage.

        Raises:
            ValueError: a model with a learned variance, or with options that only 'ddpm' teaches.
        """
        x = at_least_float32(x)
        if self.timesteps == "uniform":
            t = draws.rand(x.shape[0], generator=generator, device=x.device, dtype=x.dtype)
        else:
            normal = draws.randn(x.shape[0], generator=generator, device=x.device, dtype=x.dtype)
            t = (self.logit_mean + self.logit_std * normal).sigmoid()
        first, last = self.interval(training=True)
        t = first + (last - first) * t
        noise = gaussian(x, generator)
        path = path_at(self.path, t)
        alpha, sigma, d_alpha, d_sigma = (expand(part.to(x.dtype), x) for part in path[:4])
        x_t = alpha * x + sigma * noise
        prediction = self.predict(model, x_t, t, y, **conditions_of(model, x, None, generator, low))
        if self.prediction == "velocity":
            error = prediction - (d_alpha * x + d_sigma * noise)
        elif self.prediction == "data":
            # The bound of sigma applies to the target too: a perfect prediction of the data has no loss at any t.
            error = self.convert(prediction, x_t, t, "velocity") - self.convert(x, x_t, t, "velocity")
        else:
            error = (sigma * prediction + noise) if self.prediction == "score" else (prediction - noise)
        if self.weight != "none":
            diffusion = path.score_diffusion
            scale = (diffusion / path.sigma).square() if self.weight == "velocity" else diffusion / path.sigma.square()
            return (expand(scale.to(x.dtype), x) * error.square()).mean()
        return error.square().mean()

    def predict(self, model: Model, x: Tensor, t: Tensor, y: Tensor | None, **conditions: Tensor) -> Tensor:
        """The model's prediction at ``x`` and times ``t [B]`` in [0, 1], in x's dtype."""
        prediction = model(x, t * self.time_scale, y, **conditions).to(x.dtype)
        self.check(prediction, x)
        return prediction

    def velocity(self, model: Model, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        """The velocity at ``x`` and times ``t [B]`` in [0, 1], in x's dtype."""
        return self.convert(self.predict(model, x, t, y), x, t, "velocity")

    def convert(self, prediction: Tensor, x: Tensor, t: Tensor, target: Prediction) -> Tensor:
        """What is predicted at ``x [B, C, ...]`` and times ``t [B]``, as another prediction, of x's shape and dtype."""
        if target == self.prediction:
            return prediction
        of_x, of_prediction, divisor = (expand(term.to(x.dtype), x) for term in self._terms(t, target))
        return (of_x * x + of_prediction * prediction) / divisor

    def weights(self, t: Tensor, target: Prediction = "velocity") -> tuple[Tensor, Tensor]:
        """Of x and of the prediction at times ``t`` in [0, 1] in ``target``, which is a sum of the two; in float64."""
        if target == self.prediction:
            return torch.zeros_like(t, dtype=torch.float64), torch.ones_like(t, dtype=torch.float64)
        of_x, of_prediction, divisor = self._terms(t, target)
        return of_x / divisor, of_prediction / divisor

    def _terms(self, t: Tensor, target: Prediction) -> tuple[Tensor, Tensor, Tensor]:
        """Of the last equation of the module: the weights of x and of p, and the divisor."""
        path = path_at(self.path, t, LEAST_SIGMA if self.prediction == "data" else 0.0)
        (a, b), (c, d) = path.mix(self.prediction), path.mix(target)
        return c * b - d * a, d * path.alpha - c * path.sigma, b * path.alpha - a * path.divisor

    @staticmethod
    def check(prediction: Tensor, x: Tensor) -> None:
        """Raises ValueError for a prediction that has not x's shape."""
        check_shape(prediction, x, "flow matching")
