"""Diffusion over the logarithm of the signal-to-noise ratio, as StableCascade trains its stages.

    alpha(r)  = cos^2((s + r) / (1 + s) pi / 2) / cos^2(s / (1 + s) pi / 2), in [1e-4, 0.9999],   s = 0.008
    lambda(r) = log(alpha / (1 - alpha)) - 2 log(shift), within the bounds of alpha               logSNR; r = 1 is noise
    x_r       = a x + b e,     a^2 = sigmoid(lambda),     b^2 = sigmoid(-lambda)                  "VP"

``shift`` moves the whole path towards noise, which larger pictures need: their neighbouring cells repeat each other.
The model is told the noise that there is: 1000 times the r at which the schedule without shift has that lambda.

Source: the schedule, Nichol & Dhariwal 2021 (arXiv 2102.09672); the stages, Pernias et al. 2023 (arXiv 2306.00637); the
shift, Hoogeboom et al. 2023 (arXiv 2301.11093).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..parallel import draws
from ..parallel.draws import of_all
from .common import TIMESTEPS, Model, at_least_float32, check_shape, conditions_of, expand, gaussian

OFFSET = 0.008
SMALLEST = 1e-4
LARGEST_LOGSNR = math.log((1 - SMALLEST) / SMALLEST)
FIRST = math.cos(OFFSET / (1 + OFFSET) * math.pi / 2) ** 2
BUCKETS = 300
BUCKET_RANGE = 10.0
BUCKET_DECAY = 0.99
MIN_SNR = 5.0
PYRAMID_LEVELS = 10
PYRAMID_CELLS = 16
PYRAMID_DECAY = 0.75


def logsnr(r: Tensor, shift: float = 1.0) -> Tensor:
    """lambda at noise levels ``r`` in [0, 1]."""
    alpha = ((OFFSET + r) / (1 + OFFSET) * (math.pi / 2)).cos().square() / FIRST
    value = alpha.clamp(SMALLEST, 1 - SMALLEST).logit() - 2 * math.log(shift)
    return value.clamp(-LARGEST_LOGSNR, LARGEST_LOGSNR)


def noise_level(value: Tensor) -> Tensor:
    """The r in [0, 1] at which the schedule without shift has this lambda."""
    angle = (value.sigmoid() * FIRST).sqrt().acos()
    return (angle / (math.pi / 2) * (1 + OFFSET) - OFFSET).clamp(0, 1)


def scales(value: Tensor) -> tuple[Tensor, Tensor]:
    """a and b at lambda."""
    return value.sigmoid().sqrt(), (-value).sigmoid().sqrt()


def pyramid(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Noise of x's shape ``[B, C, ..., H, W]``, dtype and device, in cells of several sizes; each frame has its own.

        e = sum of m_i enlarged(e_i) / sqrt(sum of m_i^2)       m_i = 0.75^i, e_i ~ N(0, 1) of H / 2^i x W / 2^i cells

    i is 0 and every later number up to 9 with 1 to 16 cells along both axes. Cells are repeated, so that each element
    is a standard normal.
    """
    noise, squares = gaussian(x, generator), 1.0
    for i in range(1, PYRAMID_LEVELS):
        size = tuple(n // 2**i for n in x.shape[-2:])
        if min(size) < 1:
            break
        if max(size) <= PYRAMID_CELLS:
            coarse = gaussian(x.new_empty(x.shape[:-2].numel(), 1, *size), generator)
            enlarged = torch.nn.functional.interpolate(coarse, x.shape[-2:], mode="nearest").view(x.shape)
            noise, squares = noise + PYRAMID_DECAY**i * enlarged, squares + PYRAMID_DECAY ** (2 * i)
    return noise / math.sqrt(squares)


@dataclass(frozen=True)
class LogSNR:
    """The noise, or the velocity ``v = a e - b x``, in a sample of the cosine schedule, weighted by the logSNR.

        loss = mean over samples of w(lambda) * mean (model(x_r, 1000 r, y) - target)^2

    r is drawn evenly from [0.001, 1]. The weights, with SNR = exp(lambda):

        p2        1 / (1 + SNR), whatever is predicted                             Choi et al. 2022 (arXiv 2204.00227)
        min_snr   min(SNR, 5) / SNR for noise, / (SNR + 1) for velocity            Hang et al. 2023 (arXiv 2303.09556)
        adaptive  1 / the running mean of the losses of the samples whose lambda is in the same one of 300 buckets over
                  [-10, 10], from 1 on, with 0.99 of the old; it is kept in the ``memory``
        none      1

    Raises:
        ValueError: an option that does not fit.
    """

    name: ClassVar[str] = "logsnr"

    prediction: Literal["noise", "velocity"] = "noise"
    """Output of the model; v = a e - b x."""
    weight: Literal["p2", "adaptive", "min_snr", "none"] = "p2"
    """Weight of a sample's loss, as a function of its logSNR."""
    shift: float = 1.0
    """Shift of the logSNR in training: it is lower by 2 log(shift)."""
    sample_shift: float = 1.0
    """Shift of the logSNR in sampling. StableCascade samples stage C with 2 and stage B with 1."""
    noise: Literal["white", "pyramid"] = "white"
    """Noise in training: as that of sampling, or with coarser noise added, as StableCascade trains stage B."""

    def __post_init__(self) -> None:
        if self.prediction not in ("noise", "velocity"):
            raise ValueError(f"prediction is {self.prediction!r}; it may be 'noise' or 'velocity'")
        if self.weight not in ("p2", "adaptive", "min_snr", "none"):
            raise ValueError(f"weight is {self.weight!r}; it may be 'p2', 'adaptive', 'min_snr' or 'none'")
        if self.noise not in ("white", "pyramid"):
            raise ValueError(f"noise is {self.noise!r}; it may be 'white' or 'pyramid'")
        for name in ("shift", "sample_shift"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive")

    def memory(self, device: torch.device) -> dict[str, Tensor]:
        """What training remembers from step to step: the buckets' losses ``[300]``; empty but for "adaptive"."""
        return {"losses": torch.ones(BUCKETS, device=device)} if self.weight == "adaptive" else {}

    def loss(
        self,
        model: Model,
        x: Tensor,
        y: Any,
        generator: torch.Generator | None = None,
        memory: dict[str, Tensor] | None = None,
        low: Tensor | None = None,
    ) -> Tensor:
        """Weighted mean squared error: a scalar.

        Args:
            model, x, y, generator, low: as for :meth:`FlowMatching.loss`.
            memory: of :meth:`memory`, changed in place; needed by "adaptive" only.

        Raises:
            ValueError: a prediction that has not x's shape, or "adaptive" without its memory.
        """
        if self.weight == "adaptive" and (memory is None or "losses" not in memory):
            raise ValueError("memory is without 'losses'; weight 'adaptive' needs what memory(device) returned")
        x = at_least_float32(x)
        u = draws.rand(x.shape[0], generator=generator, device=x.device, dtype=x.dtype)
        value = logsnr(1 - 0.999 * u, self.shift)
        noise = gaussian(x, generator) if self.noise == "white" else pyramid(x, generator)
        a, b = (expand(scale, x) for scale in scales(value))
        conditions = conditions_of(model, x, None, generator, low)
        prediction = model(a * x + b * noise, noise_level(value) * TIMESTEPS, y, **conditions).to(x.dtype)
        self.check(prediction, x)
        target = noise if self.prediction == "noise" else a * noise - b * x
        losses = (prediction - target).square().flatten(1).mean(1)
        if self.weight != "adaptive" or memory is None:
            return (self.weights(value) * losses).mean()
        bucket = self.bucket(value)
        kept = memory["losses"]
        weights = (1 / kept[bucket]).clamp(1e-7, 1e7)
        with torch.no_grad():
            # A product with the buckets' indicator adds in a fixed order on every device.
            inside = torch.nn.functional.one_hot(of_all(bucket), BUCKETS).to(kept.dtype)
            count = inside.sum(0)
            with torch.autocast(x.device.type, enabled=False):
                mean = of_all(losses.detach()).to(kept.dtype) @ inside / count.clamp_min(1)
            kept.copy_(torch.where(count > 0, BUCKET_DECAY * kept + (1 - BUCKET_DECAY) * mean, kept))
        return (weights * losses).mean()

    def weights(self, value: Tensor) -> Tensor:
        """w at lambda ``[B]``, of all weights but "adaptive"."""
        snr = value.exp()
        if self.weight == "p2":
            return 1 / (1 + snr)
        if self.weight == "min_snr":
            return snr.clamp_max(MIN_SNR) / (snr if self.prediction == "noise" else snr + 1)
        return torch.ones_like(value)

    @staticmethod
    def bucket(value: Tensor) -> Tensor:
        """Of 0..299 at lambda: 298 equal ones over [-10, 10], and what is below and above."""
        edges = torch.linspace(-BUCKET_RANGE, BUCKET_RANGE, BUCKETS - 1, device=value.device, dtype=value.dtype)
        return torch.bucketize(value, edges)

    @staticmethod
    def check(prediction: Tensor, x: Tensor) -> None:
        """Raises ValueError for a prediction that has not x's shape."""
        check_shape(prediction, x, "objective 'logsnr'")
