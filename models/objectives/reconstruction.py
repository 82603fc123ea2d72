"""The objective of autoencoders: reconstruct the clip, look like it, and keep the latents in bounds.

    loss = |x' - x|^p + laplacian_weight * Lap(x' - x) + penalty_weight * penalty + hinge

p is 1 or 2 and every term is a mean. The penalty is the model's: the KL divergence of a variational tokenizer, the
codebook and commitment loss of a VQGAN. Lap sums the mean absolute bands of a Laplacian pyramid, a stand-in for LPIPS,
which the papers use: LPIPS compares features of a pretrained network, whose weights cannot be shipped.

The hinge is that of a patch discriminator D, which is a part of the model so that the trainer's one optimizer has its
weights. Between x' and D lies a layer that reverses the gradient:

    hinge = mean relu(1 - D(x)) + mean relu(1 + D(reverse(x')))        reverse(x') = x', d reverse = -adversarial_weight

D descends the hinge while the autoencoder, through the reversal, ascends its second term: a two-player game in one
backward pass. GANs with a hinge usually have the autoencoder descend -D(x') instead, which differs where
D(x') < -1: there the reversed hinge is flat and its gradient 0, for the discriminator as for the autoencoder.

Source: Laplacian pyramid loss: Bojanowski et al. 2018 (arXiv 1707.05776). Gradient reversal: Ganin & Lempitsky 2015
(arXiv 1409.7495). Hinge: Lim & Ye 2017 (arXiv 1705.02894). Patches: Isola et al. 2017 (arXiv 1611.07004).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..parallel import draws
from ..protocols import Autoencoder
from .common import at_least_float32


class _ReverseGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: float) -> Tensor:
        ctx.weight = weight
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return -ctx.weight * gradients[0], None


def reverse_gradient(x: Tensor, weight: float) -> Tensor:
    """x itself; its gradient is that of the result times ``-weight``."""
    return _ReverseGradient.apply(x, weight)


def laplacian(x: Tensor, levels: int = 4) -> Tensor:
    """Sum of the mean absolute bands of a Laplacian pyramid of the frames of ``x [B, C, T, H, W]``: a scalar.

        g_0 = x      g_{i+1} = mean of 2 x 2 pixels of g_i      band_i = g_i - enlarged g_{i+1}      last band = g_last

    The pyramid is linear: that of a difference compares two clips. Frames of one row or column are not halved further.
    """
    frames = x.transpose(1, 2).flatten(0, 1)
    total = x.new_zeros(())
    for _ in range(levels - 1):
        if min(frames.shape[-2:]) < 2:
            break
        coarse = F.avg_pool2d(frames, 2, ceil_mode=True)
        total = total + (frames - F.interpolate(coarse, frames.shape[-2:])).abs().mean()
        frames = coarse
    return total + frames.abs().mean()


def psnr(x: Tensor, reconstruction: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each clip in [-1, 1], in dB: ``10 log10(4 / mean (x' - x)^2)``, ``[B]``."""
    error = (reconstruction.clamp(-1, 1) - x).square().flatten(1).mean(1)
    return 10 * torch.log10(4 / error)


@dataclass(frozen=True)
class Reconstruction:
    """The loss of an autoencoder; the equations are at the top of this module.

    Raises:
        ValueError: an option that does not fit.
    """

    name: ClassVar[str] = "reconstruction"

    pixels: Literal["l1", "l2"] = "l1"
    """Absolute or squared error per pixel."""
    laplacian_weight: float = 1.0
    penalty_weight: float = 1e-4
    """Weight of the model's penalty: the KL divergence of a tokenizer, or the codebook loss of a VQGAN (published with
    1)."""
    adversarial_weight: float = 0.0
    """Weight of the discriminator's gradient for the autoencoder; positive if and only if the model has a
    discriminator."""
    adversarial_start: int = 0
    """Calls of the loss before the discriminator joins; a training step has as many calls as `accumulation`."""

    def __post_init__(self) -> None:
        if self.pixels not in ("l1", "l2"):
            raise ValueError(f"pixels is {self.pixels!r}; it may be 'l1' or 'l2'")
        for name in ("laplacian_weight", "penalty_weight", "adversarial_weight", "adversarial_start"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative")
        if self.adversarial_start and not self.adversarial_weight:
            raise ValueError(f"adversarial_start is {self.adversarial_start}, but adversarial_weight is 0")

    def memory(self, device: torch.device) -> dict[str, Tensor]:
        """What ``loss`` remembers from call to call: how many there were, if the discriminator joins later."""
        return {"calls": torch.zeros((), dtype=torch.int64, device=device)} if self.adversarial_start else {}

    def loss(
        self,
        model: Autoencoder,
        x: Tensor,
        y: Any,
        generator: torch.Generator | None = None,
        memory: dict[str, Tensor] | None = None,
        low: Tensor | None = None,
    ) -> Tensor:
        """The sum of the weighted terms: a scalar.

        Args:
            model: a CausalTokenizer or a VQGAN. In training mode a variational one samples its latents.
            x: clips ``[B, C, T, H, W]`` in [-1, 1].
            y: not used; an autoencoder knows no classes.
            generator: on x's device; the only source of the latents' noise.
            memory: of :meth:`memory`, the same in all calls of a training; updated in place.
            low: not used; an autoencoder is no second stage.

        Raises:
            ValueError: adversarial_weight without a discriminator, or the reverse; adversarial_start without
                ``memory``.
        """
        x = at_least_float32(x)
        self.check_discriminator(model.discriminator is not None)
        shape = model.noise_shape(x) if model.training else None
        noise = None if shape is None else draws.randn(shape, generator=generator, device=x.device, dtype=x.dtype)
        reconstruction, penalty = model(x) if noise is None else model(x, noise)
        reconstruction = reconstruction.to(x.dtype)
        error = reconstruction - x
        loss = error.abs().mean() if self.pixels == "l1" else error.square().mean()
        loss = loss + self.laplacian_weight * laplacian(error) + self.penalty_weight * penalty
        if model.discriminator is None or not self._joined(memory):
            return loss
        return loss + self.hinge(model.discriminator, x, reconstruction)

    def _joined(self, memory: dict[str, Tensor] | None) -> bool:
        """Whether the discriminator has joined; counts the call."""
        if not self.adversarial_start:
            return True
        if not memory:
            raise ValueError(f"memory is {memory}; with adversarial_start it must be what memory() returned")
        memory["calls"] += 1
        return int(memory["calls"]) > self.adversarial_start

    def hinge(self, discriminator: nn.Module, x: Tensor, reconstruction: Tensor) -> Tensor:
        """The discriminator's loss, reversed for the reconstruction: a scalar."""
        fake = discriminator(reverse_gradient(reconstruction, self.adversarial_weight))
        return F.relu(1 - discriminator(x)).mean() + F.relu(1 + fake).mean()

    def check_discriminator(self, discriminator: bool) -> None:
        """Raises ValueError if the model's discriminator and the weight of its loss are not both there."""
        if discriminator != (self.adversarial_weight > 0):
            raise ValueError(
                f"objective.adversarial_weight is {self.adversarial_weight}, but the model has "
                f"{'a' if discriminator else 'no'} discriminator (model.discriminator); set both or neither"
            )

    @staticmethod
    @torch.no_grad()
    def preview(model: Autoencoder, x: Tensor) -> Tensor:
        """Each of the clips ``x [B, C, T, H, W]`` and, after it, its reconstruction by a model in eval mode."""
        return torch.stack((x, model(x)[0].to(x.dtype)), dim=1).flatten(0, 1)
