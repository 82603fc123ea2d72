"""Open-Sora 1.0's STDiT: latents of Stable Diffusion's autoencoder, captions of T5.

Its files have the names of ``models/denoisers/stdit.py``. The null caption is ``y_embedder.y_embedding``, as many fixed
rows as a caption may have tokens, behind the mask of the caption that is dropped. Positions in the frame are
``pos_embed [1, S, D]``, for one frame. They may be scaled, so they are those of the file.

Source: Zheng et al., Open-Sora 1.0, March 2024 (arXiv 2412.20404).
"""

from __future__ import annotations

import math

from torch import Tensor

from ..checkpoint import Checkpoint
from ..denoisers.stdit import STDiTConfig
from ..objectives.ddpm import DDPM
from ..registry import config_from
from .layout import Converted, Hints, depth_of, heads_of, learns_sigma, shape_of, size_of

HEAD = "final_layer.linear.weight"


def stdit(weights: dict[str, Tensor], hints: Hints) -> Converted:
    """STDiT: noise and variance of DDPM's linear schedule."""
    width, channels, frames, rows, columns = shape_of(weights, "x_embedder.proj.weight", 5)
    null_tokens, text_width = shape_of(weights, "y_embedder.y_embedding", 2)
    _, places, _ = shape_of(weights, "pos_embed", 3)
    _, length, _ = shape_of(weights, "pos_embed_temporal", 3)
    hidden, _ = shape_of(weights, "blocks.0.mlp.fc1.weight", 2)
    outputs, _ = shape_of(weights, HEAD, 2)
    depth, patch = depth_of(weights), (frames, rows, columns)
    config = STDiTConfig(
        input_size=(length * frames, *size_of(places, (rows, columns), hints)),
        channels=channels,
        text_width=text_width,
        null_tokens=null_tokens,
        width=width,
        depth=depth,
        heads=heads_of(width, depth, hints),
        patch=patch,
        mlp_ratio=hidden / width,
        learn_sigma=learns_sigma(HEAD, outputs, patch, channels),
    )
    weights = weights | {"pos_embed": weights["pos_embed"].repeat(1, length, 1)}
    return Converted(config, DDPM(), weights, text={"max_length": null_tokens})


def to_stdit(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The averaged weights as Open-Sora has them.

    Raises:
        ValueError: a model that Open-Sora's code does not build.
    """
    config, weights = config_from(checkpoint.config), checkpoint.ema
    if not isinstance(config, STDiTConfig) or not config.null_tokens or config.qk_norm:
        raise ValueError("only an STDiT with null_tokens and without qk_norm is Open-Sora's")
    return {**weights, "pos_embed": weights["pos_embed"][:, : math.prod(config.grid[1:])].clone()}
