"""OpenDiT's VDiT: DiT for video with attention over all tokens; latents of Stable Diffusion's autoencoder.

Its files have the names of ``models/denoisers/dit.py``, but for the positions. These are ``pos_embed_spatial
[1, S, D]`` and ``pos_embed_temporal [1, T, D]``, which are added, or ``pos_embed [1, N, D]``, a concatenation. Either
is a function of the size; others are refused.

The caption's one vector is the pooled output of a CLIP, which goes through ``y_embedder.output_projection``. OpenDiT
trains captions that are dropped as what that CLIP makes of no words. The CLIP itself, which OpenDiT stores too, is left
out. With classes there is a table in its place.

Source: OpenDiT (https://github.com/NUS-HPC-AI-Lab/VideoSys), version 1.0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..checkpoint import Checkpoint
from ..denoisers.dit import DiTConfig
from ..denoisers.layers import concatenated_positions, frame_positions, grid_positions
from ..denoisers.lora import TABLE
from ..objectives.ddpm import DDPM
from ..registry import config_from
from .layout import Converted, Hints, depth_of, empty_caption, heads_of, learns_sigma, shape_of, size_of

HEAD, PROJECTION, NULL = "final_layer.linear.weight", "y_embedder.output_projection.weight", "y_embedder.null"
SPACE, TIME, TOGETHER = "pos_embed_spatial", "pos_embed_temporal", "pos_embed"
ENCODER = "y_embedder.text_encoder."
TEXT = {"pooled": True, "max_length": 77}


def vdit(weights: dict[str, Tensor], hints: Hints) -> Converted:
    """VDiT: noise and variance of DDPM's linear schedule.

    Raises:
        ValueError: positions that OpenDiT's code does not make, or an encoder of another width.
    """
    notes = []
    encoder = [name for name in weights if name.startswith(ENCODER)]
    if encoder:
        notes.append(f"left out {len(encoder)} tensors of the text encoder")
    weights = {name: value for name, value in weights.items() if not name.startswith(ENCODER)}
    width, channels, frames, rows, columns = shape_of(weights, "x_embedder.proj.weight", 5)
    hidden, _ = shape_of(weights, "blocks.0.mlp.fc1.weight", 2)
    outputs, _ = shape_of(weights, HEAD, 2)
    apart = TOGETHER not in weights
    length, places = _counts(weights, apart)
    depth, patch, text_width = depth_of(weights), (frames, rows, columns), 0
    if PROJECTION in weights:
        _, text_width = shape_of(weights, PROJECTION, 2)
        weights[NULL] = empty_caption(hints, text_width, **TEXT)[0]
    config = DiTConfig(
        input_size=(length * frames, *size_of(places, (rows, columns), hints)),
        channels=channels,
        num_classes=shape_of(weights, TABLE, 2)[0] - 1 if TABLE in weights else 0,
        text_width=text_width,
        fixed_null=bool(text_width),
        width=width,
        depth=depth,
        heads=heads_of(width, depth, hints),
        patch=patch,
        mlp_ratio=hidden / width,
        learn_sigma=learns_sigma(HEAD, outputs, patch, channels),
        positions="sum" if apart else "concatenation",
    )
    for name, value in _positions(config).items():
        if weights[name].shape != value.shape or not torch.allclose(weights[name].float(), value, atol=1e-5):
            raise ValueError(f"{name} is not what OpenDiT's code makes for a grid of {config.grid}")
    if apart:
        del weights[SPACE], weights[TIME]
        weights[TOGETHER] = grid_positions(config.grid, width, video=True)
    return Converted(config, DDPM(), weights, tuple(notes), TEXT if text_width else None)


def _counts(weights: dict[str, Tensor], apart: bool) -> tuple[int, int]:
    """The tokens along time, and those of a frame."""
    if apart:
        return shape_of(weights, TIME, 3)[1], shape_of(weights, SPACE, 3)[1]
    _, tokens, width = shape_of(weights, TOGETHER, 3)
    first = weights[TOGETHER][0, :, : width // 4]
    places = int((first == first[0]).all(1).sum())  # those of the first frame
    return tokens // places, places


def _positions(config: DiTConfig) -> dict[str, Tensor]:
    """The positions that OpenDiT's code makes, by their names in it."""
    if config.positions == "concatenation":
        return {TOGETHER: concatenated_positions(config.grid, config.width)}
    frames, *places = config.grid
    space = grid_positions((1, places[0], places[1]), config.width, video=False)
    return {SPACE: space, TIME: frame_positions(frames, config.width)}


def to_vdit(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The averaged weights as OpenDiT has them, without the text encoder.

    Raises:
        ValueError: a model that OpenDiT's code does not build.
    """
    config = config_from(checkpoint.config)
    if not isinstance(config, DiTConfig) or config.is_image or config.attention != "joint" or config.qk_norm:
        raise ValueError("only a DiT for video with joint attention and without qk_norm is OpenDiT's")
    if config.text_width and not config.fixed_null:
        raise ValueError("the null caption was trained; OpenDiT's code has none: it needs a run with fixed_null")
    weights = {name: value for name, value in checkpoint.ema.items() if name not in (TOGETHER, NULL)}
    return weights | _positions(config)
