"""Meta's DiT, SiT and Latte, which follow it: latents of Stable Diffusion's autoencoder.

Their files have the names of ``models/denoisers/dit.py``. A file does not say how many heads there are. SiT's were
built with ``learn_sigma=True`` and train the first half of the channels alone: the second half is dropped. SiT tells
its model t in [0, 1], DiT its timestep in 0..999.

Latte has the positions of a frame ``[1, S, D]`` and, added after the first block, those of the frames ``[1, T, D]``.
Its patch embedding is that of a frame.

Source: Peebles & Xie 2022 (arXiv 2212.09748); Ma et al. 2024 (arXiv 2401.08740 and 2401.03048).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ..checkpoint import Checkpoint
from ..denoisers.dit import DiTConfig
from ..denoisers.lora import TABLE, UP
from ..objectives.ddpm import DDPM
from ..objectives.flow import FlowMatching
from ..registry import Config, config_from
from .diffusers_dit import from_diffusers, hints_of, is_diffusers
from .layout import Converted, Hints, depth_of, heads_of, learns_sigma, shape_of, size_of

PATCHES, FRAMES = "x_embedder.proj.weight", "temp_embed"
HEAD = ("final_layer.linear.weight", "final_layer.linear.bias")


def _config(weights: Mapping[str, Tensor], hints: Hints) -> DiTConfig:
    width, channels, *patch = shape_of(weights, PATCHES, 4)
    _, tokens, _ = shape_of(weights, "pos_embed", 3)
    classes = shape_of(weights, TABLE, 2)[0] - 1 if TABLE in weights else 0
    hidden, _ = shape_of(weights, "blocks.0.mlp.fc1.weight", 2)
    outputs, _ = shape_of(weights, HEAD[0], 2)
    depth, (rows, columns) = depth_of(weights), patch
    return DiTConfig(
        input_size=size_of(tokens, (rows, columns), hints),
        channels=channels,
        num_classes=classes,
        width=width,
        depth=depth,
        heads=heads_of(width, depth, hints),
        patch=(rows, columns),
        mlp_ratio=hidden / width,
        learn_sigma=learns_sigma(HEAD[0], outputs, (rows, columns), channels),
    )


def dit(weights: dict[str, Tensor], hints: Hints) -> Converted:
    """DiT, under Meta's names or those of diffusers: noise and variance of DDPM's linear schedule."""
    if is_diffusers(weights):
        hints = hints_of(hints)
        weights = from_diffusers(weights, hints)
    return Converted(_config(weights, hints), DDPM(), weights)


def sit(weights: dict[str, Tensor], hints: Hints) -> Converted:
    """SiT: the velocity on a line."""
    config = _config(weights, hints)
    objective = FlowMatching(time_scale=1.0)
    if not config.learn_sigma:
        return Converted(config, objective, weights)
    config = dataclasses.replace(config, learn_sigma=False)
    weights = weights | {name: _first_half(weights[name], config) for name in HEAD}
    note = f"dropped {config.channels} of {2 * config.channels} output channels, which SiT does not train"
    return Converted(config, objective, weights, (note,))


def latte(weights: dict[str, Tensor], hints: Hints) -> Converted:
    """Latte: as DiT, over space and time in turns."""
    _, frames, _ = shape_of(weights, FRAMES, 3)
    image = _config(weights, hints)
    config = dataclasses.replace(
        image,
        input_size=(frames, *image.input_size),
        patch=(1, *image.patch),
        attention="factorized",
        late_frames=True,
    )
    positions = weights["pos_embed"].expand(frames, -1, -1).flatten(0, 1)[None]
    patches = weights[PATCHES].unsqueeze(2)
    return Converted(config, DDPM(), weights | {"pos_embed": positions, PATCHES: patches})


def to_latte(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The averaged weights as Latte has them.

    Raises:
        ValueError: a model that Latte's code does not build.
    """
    config, weights = config_from(checkpoint.config), checkpoint.ema
    if not isinstance(config, DiTConfig) or not config.late_frames or config.qk_norm or config.patch[0] != 1:
        raise ValueError("only a DiT with late_frames, patches of one frame and without qk_norm is Latte's")
    positions = weights["pos_embed"].unflatten(1, (config.grid[0], -1))[:, 0]
    return {**weights, "pos_embed": positions, PATCHES: weights[PATCHES].squeeze(2)}


def to_dit(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The averaged weights as Meta's DiT has them.

    Raises:
        ValueError: a model that Meta's code does not build.
    """
    config = config_from(checkpoint.config)
    if not isinstance(config, DiTConfig) or not config.is_image or config.qk_norm or not config.num_classes:
        raise ValueError("only an image DiT with classes and without qk_norm has published names")
    return dict(checkpoint.ema)


def to_sit(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """As :func:`to_dit`, with zeros for the channels that SiT does not train.

    Raises:
        ValueError: as :func:`to_dit`; a learned variance, or a scale of t that SiT does not have.
    """
    weights, config = to_dit(checkpoint), config_from(checkpoint.config)
    objective = checkpoint.train["objective"]
    if objective.get("name") != FlowMatching.name or objective.get("time_scale") != 1:
        raise ValueError("SiT's code tells a model t in [0, 1]: the run must have objective 'flow' and time_scale 1")
    return weights | {name: _with_zeros(weights[name], config) for name in HEAD}


def to_sit_adapters(adapters: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    """Adapters for SiT's code: with zeros for the channels that it does not train."""
    name = f"{HEAD[0].removesuffix('.weight')}{UP}"
    return adapters | ({name: _with_zeros(adapters[name], config)} if name in adapters else {})


def _with_zeros(head: Tensor, config: Config) -> Tensor:
    """The rows ``(patch, C)`` as the first half of the channels of ``(patch, 2 C)``."""
    assert isinstance(config, DiTConfig)
    half = head.unflatten(0, (math.prod(config.patch), config.channels))
    return torch.cat((half, torch.zeros_like(half)), 1).flatten(0, 1)


def _first_half(head: Tensor, config: DiTConfig) -> Tensor:
    """Of the rows ``(patch, 2 C)`` those of the first C channels."""
    return head.unflatten(0, (math.prod(config.patch), 2 * config.channels))[:, : config.channels].flatten(0, 1)
