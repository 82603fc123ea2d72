"""What the objectives share. Each is a frozen dataclass of its options, and has a ``loss``.

A model takes ``(x [B, C, ...], timesteps [B], y)``, with timesteps in [0, 1000], the range that a 256-channel sinusoid
resolves (over [0, 1] it is nearly a straight line). The objectives point in opposite directions: FlowMatching
(``flow.py``) has noise at 0, DDPM (``ddpm.py``) at 999 and LogSNR (``logsnr.py``) at 1000. A denoiser that is told more
gets it by name (:func:`conditions_of`).

What a loss remembers from call to call is a dictionary of tensors: ``objective.memory(device)`` makes it,
``loss(model, x, y, generator, memory, low)`` updates it in place, and a checkpoint holds it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..parallel import draws

TIMESTEPS = 1000
Model = Callable[..., Tensor]


def expand(values: Tensor, like: Tensor) -> Tensor:
    """``values [B]`` as ``[B, 1, ..., 1]``, to broadcast over ``like``."""
    return values.reshape(-1, *(1,) * (like.dim() - 1))


def at(table: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """The entries ``t [B]`` of a float64 table, rounded once to the dtype of ``like``, to broadcast over it."""
    return expand(table[t].to(like.dtype), like)


def conditions_of(
    model: Model,
    x: Tensor,
    estimate: Callable[..., Tensor] | None,
    generator: torch.Generator | None,
    low: Tensor | None,
) -> dict[str, Tensor]:
    """What a model is told in training besides x_t, t and y, as arguments by name; a plain function is told nothing.

    Arguments as for :meth:`models.protocols.Denoiser.training_conditions`.

    Raises:
        ValueError: ``low`` for a model that is no second stage, or what the objective does not teach.
    """
    # Not isinstance: what torch.compile returns is no Denoiser, but hands this method on.
    conditions = getattr(model, "training_conditions", None)
    if conditions is not None:
        return conditions(x, estimate, generator, low)
    if low is not None:
        raise ValueError(f"low was given, but a {type(model).__name__} is no second stage")
    return {}


def check_shape(prediction: Tensor, x: Tensor, objective: str) -> None:
    """Raises ValueError for a prediction that has not x's shape."""
    if prediction.shape != x.shape:
        raise ValueError(
            f"the model returned shape {tuple(prediction.shape)} for x {tuple(x.shape)}; {objective} has no "
            "variance to learn: build the model with learn_sigma=False"
        )


def gaussian(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal noise of x's shape, dtype and device."""
    return draws.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)


def at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def alpha_bars(betas: str, zero_snr: bool) -> Tensor:
    """alpha_bar of all 1000 timesteps, in float64.

    'linear': beta from 1e-4 to 0.02. 'squared_cosine': beta_t = min(1 - f(t + 1) / f(t), 0.999) with
    f(t) = cos((t / 1000 + 0.008) / 1.008 pi / 2)^2. ``zero_snr`` shifts and scales the root of alpha_bar so that it is
    0 at 999 and what it was at 0.
    """
    if betas == "linear":
        beta = torch.linspace(1e-4, 0.02, TIMESTEPS, dtype=torch.float64)
    else:
        t = torch.arange(TIMESTEPS + 1, dtype=torch.float64) / TIMESTEPS
        f = ((t + 0.008) / 1.008 * math.pi / 2).cos().square()
        beta = (1 - f[1:] / f[:-1]).clamp_max(0.999)
    alpha_bar = (1 - beta).cumprod(0)
    if zero_snr:
        root = alpha_bar.sqrt()
        alpha_bar = ((root - root[-1]) * root[0] / (root[0] - root[-1])).square()
    return alpha_bar
