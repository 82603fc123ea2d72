"""Flow matching: the velocity of straight paths from noise to data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from .objectives import TIMESTEPS, Model, at_least_float32, expand, gaussian


@dataclass(frozen=True)
class FlowMatching:
    """Straight paths from noise at t = 0 to data at t = 1.

        x_t = t x_1 + (1 - t) x_0          v = x_1 - x_0          loss = mean (velocity(x_t, t) - v)^2

    The model predicts the velocity, or the data: then ``velocity = (model - x_t) / (1 - t)``, with 1 - t at least 0.05.
    A narrow model learns faster to predict the data: it need not carry the noise of every pixel through its width.

    Source: Lipman et al. 2022 (arXiv 2210.02747); SiT, Ma et al. 2024 (arXiv 2401.08740). Logit-normal timesteps: Esser
    et al. 2024 (arXiv 2403.03206). Prediction of the data: Li & He 2025 (arXiv 2511.13720).

    Raises:
        ValueError: an option that does not fit.
    """

    name: ClassVar[str] = "flow"

    prediction: Literal["velocity", "data"] = "velocity"
    """What the model predicts."""
    timesteps: Literal["uniform", "logit_normal"] = "uniform"
    """How training draws t: evenly on [0, 1], or as the sigmoid of a normal, with more of the middle of the path."""
    logit_mean: float = 0.0
    """Of the normal behind 'logit_normal'; negative is towards the noise."""
    logit_std: float = 1.0

    def __post_init__(self) -> None:
        if self.timesteps not in ("uniform", "logit_normal"):
            raise ValueError(f"timesteps is {self.timesteps!r}; it may be 'uniform' or 'logit_normal'")
        if self.prediction not in ("velocity", "data"):
            raise ValueError(f"prediction is {self.prediction!r}; it may be 'velocity' or 'data'")
        if (self.logit_mean, self.logit_std) != (0.0, 1.0) and self.timesteps != "logit_normal":
            raise ValueError(f"logit_mean and logit_std need timesteps 'logit_normal'; it is {self.timesteps!r}")
        if self.logit_std <= 0:
            raise ValueError(f"logit_std is {self.logit_std}; it must be positive")

    def memory(self, device: torch.device) -> dict[str, Tensor]:
        """What ``loss`` remembers from call to call: nothing."""
        return {}

    def loss(
        self,
        model: Model,
        x: Tensor,
        y: Tensor | None,
        generator: torch.Generator | None = None,
        memory: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """Mean squared error of the velocity: a scalar.

        Args:
            model: takes ``(x_t, timesteps [B], y)``.
            x: data ``[B, C, ...]``, about unit scale.
            y: classes ``[B]`` or None.
            generator: on x's device; the only source of t and of the noise.
            memory: of :meth:`memory`, the same in all calls of a training.

        Raises:
            ValueError: a model with a learned variance.
        """
        x = at_least_float32(x)
        if self.timesteps == "uniform":
            t = torch.rand(x.shape[0], generator=generator, device=x.device, dtype=x.dtype)
        else:
            normal = torch.randn(x.shape[0], generator=generator, device=x.device, dtype=x.dtype)
            t = (self.logit_mean + self.logit_std * normal).sigmoid()
        noise = gaussian(x, generator)
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
