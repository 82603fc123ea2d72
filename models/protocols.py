"""What the trainer and the sampler may ask of a model.

A family of models is one file with a subclass of :class:`BaseSettings`, a configuration and a subclass of
:class:`Denoiser` or :class:`Autoencoder`, and one line in ``registry.py``. What a family does not override means "no".
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from .runtime.recompute import Checkpointing


class SmallClips(NamedTuple):
    """The small clips that a second stage makes large."""

    shape: tuple[int | None, ...]
    """``(C, T, h, w)``; None where any size is taken."""
    of_input: bool
    """The 2 x 2 means of the model's own input, which training makes from it; else clips of their own, which training
    reads from the data."""
    required: bool
    """Whether the model needs them."""
    option: str
    """The setting that the clips follow, for messages."""
    most_noise: int = 0
    """The highest level of noise in them that the model was trained with."""


class BaseSettings:
    """What a family says of its options, before a model is built."""

    name: ClassVar[str]
    autoencoder: ClassVar[bool] = False
    """Whether the model is an autoencoder, which does not sample clips from noise."""
    needs_ddpm: ClassVar[tuple[str, ...]] = ()
    """Options that only the objective 'ddpm' teaches."""
    pooled_text: ClassVar[bool] = False
    """Whether the model takes one vector of a caption only."""
    class_dropout: float = 1.0
    """Share of labels that training leaves out; guidance needs one above 0."""
    discriminator: int = 0
    """Width of the discriminator that an autoencoder has for an adversarial objective; 0 for none."""
    patch: tuple[int, ...] = ()
    """Cells of a token along each axis of the input, for models with tokens."""

    @property
    def is_image(self) -> bool:
        """Whether the input is ``(H, W)``, without an axis of time."""
        return False

    def check_images(self, images: int, *, text: bool) -> None:
        """Raises ValueError for settings that do not train on so many images after each clip, or not with captions."""
        if images:
            raise ValueError(f"data.images is {images}; with model {self.name!r} it must be 0")

    def only_ddpm(self) -> list[str]:
        """The options of ``needs_ddpm`` that are on."""
        return [name for name in self.needs_ddpm if getattr(self, name)]


class System(NamedTuple):
    """A named model with the objective that it was published with."""

    settings: Any
    objective: Any


class Model(nn.Module):
    """What the trainer may ask of every model.

    Attributes:
        config: what it was built from, with ``input_size`` and ``channels``.
        out_channels: channels of the output.
        null_class: the label of "no class"; None for a model without classes.
        checkpointing: recompute in the backward instead of keeping activations; "attention" or "products" names what
            is kept all the same (:mod:`models.runtime.recompute`).
        any_size: take inputs of other sizes too, where ``takes_any_size``.
        takes_any_size: whether ``any_size`` may be set.
    """

    config: Any
    out_channels: int
    null_class: int | None = None
    checkpointing: Checkpointing = False
    any_size: bool = False
    takes_any_size: ClassVar[bool] = False

    @property
    def tokens_per_sample(self) -> int:
        """Tokens of a sample of ``config.input_size``."""
        return math.prod(self.config.grid)

    def units(self) -> list[list[nn.Module]]:
        """What a sharded training gathers and frees together, in the order of forward; the rest is one unit more.

        Forward calls every module of a unit, and reads its parameters inside of these calls only.
        """
        return []

    def divisible(self, images: int = 0, size: tuple[int, ...] | None = None) -> dict[str, int]:
        """What ranks that divide the tokens of a sample get parts of, by name; nothing for a model without tokens.

        Args:
            images: how many follow each clip.
            size: frames, height and width of a sample that ``any_size`` allows, if not those of ``config.input_size``.
        """
        return {}

    @property
    def small_clips(self) -> SmallClips | None:
        """What a second stage is told as ``low``; None for other models."""
        return None


class Autoencoder(Model):
    """A model of clips ``[B, C, T, H, W]`` that returns their reconstruction and a penalty.

    Attributes:
        discriminator: of an adversarial objective, or None.
    """

    discriminator: nn.Module | None

    def noise_shape(self, x: Tensor) -> tuple[int, ...] | None:
        """Of the noise that forward takes with clips ``x``; None for a model that draws none."""
        return None

    def encode(self, x: Tensor) -> Tensor:
        """Latents of clips in [-1, 1]."""
        raise NotImplementedError

    def decode(self, latents: Tensor) -> Tensor:
        """Clips of latents."""
        raise NotImplementedError


class Denoiser(Model):
    """A model of ``(x [B, C, ...], t [B], y)``, which returns what the objective asks for.

    Attributes:
        computes_ahead: whether :meth:`modulations` computes all that forward makes of t and y.
    """

    computes_ahead: ClassVar[bool] = False

    @property
    def known_frames(self) -> int:
        """The most first frames of a clip that it is told as ``past``; 0 for a model that is told none."""
        return 0

    @property
    def self_conditioning(self) -> bool:
        """Whether it is told its last estimate of the data as ``previous``."""
        return False

    def modulations(self, t: Tensor, y: Tensor | None = None) -> Tensor:
        """For a model that ``computes_ahead``: what forward takes as ``modulations`` in place of t and y."""
        raise NotImplementedError(f"{type(self).__name__} does not compute its modulations ahead")

    def small_clip_arguments(
        self, low: Tensor, level: int, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """The arguments of forward for small clips ``[B, C, T, h, w]`` that get noise of a level.

        Raises:
            ValueError: a model that is no second stage.
        """
        raise ValueError(f"low was given, but a {type(self).__name__} is no second stage")

    def training_conditions(
        self,
        x: Tensor,
        estimate: Callable[..., Tensor] | None,
        generator: torch.Generator | None = None,
        low: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """What an objective tells the model in training besides x_t, t and y: arguments of forward by name.

        Args:
            x: data, of the model's input size.
            estimate: the data that the model's prediction points at, as a function of such arguments; None if the
                objective has no such estimate.
            generator: on x's device; of all that is drawn here.
            low: small clips of the data, for a second stage that training reads them for.

        Raises:
            ValueError: a model with options that only the objective 'ddpm' teaches, without ``estimate``.
        """
        return {} if low is None else self.small_clip_arguments(low, 0, generator)
