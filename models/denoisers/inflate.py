"""Image weights in a video model, which then makes of every frame what the image model makes of it.

    patch embedding   [D, C, p, p] to [D, C, pt, p, p]: on the first frame of a token and 0 on the others, or 1 / pt of
                      it on each (Carreira & Zisserman 2017, arXiv 1705.07750)
    last Linear       once for each frame of a token
    positions         those of the image on every frame; with frame positions their differences to the first frame too
    what has no counterpart in an image (temporal blocks, V, temporal convolution) adds 0 until it is trained

Equal but for the rounding of products, which depends on their shapes.

A DiT with "factorized" attention has two blocks for each of the image's: the first, over space, takes its weights, the
second, over time, has adaLN gates of 0. One with "joint" attention has the image's blocks, and makes the image model's
frames of a clip that stands still: a query sees its key T times, which the softmax shares out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from .cascade import Cascade
from .dit import DiT
from .layers import sincos


@torch.no_grad()
def load_image_weights(
    model: nn.Module,
    image_state: Mapping[str, Tensor],
    *,
    patch: Literal["first", "mean"] = "first",
    frame_positions: bool = False,
) -> None:
    """Fill a video model with the weights of an image model, in place.

    Args:
        model: a DiT or a Cascade for video.
        image_state: the image model's ``state_dict()``: of the same widths, heads, patch in space, channels, classes,
            and, for a DiT, of the same height and width.
        patch: where in the frames of a token the patch embedding goes.
        frame_positions: add to a DiT's positions how those of the later frames differ from those of the first. Then
            only the first frame's tokens are what they were, but the model can tell the order of its frames, which
            attention over time needs: choose it to train on. A Cascade can tell them by its rotary embedding, and
            refuses it. (With ``any_size`` a DiT makes positions for other sizes itself, frames' included.)

    Raises:
        TypeError: another kind of model.
        ValueError: an image model, an option that does not fit, or weights that do not belong to the model, by name.
    """
    if not isinstance(model, (DiT, Cascade)):
        raise TypeError(f"model is a {type(model).__name__}; it may be a DiT or a Cascade")
    if len(model.config.patch) == 2:
        raise ValueError("model is for images; it must be for video: a patch of three numbers")
    if patch not in ("first", "mean"):
        raise ValueError(f"patch is {patch!r}; it may be 'first' or 'mean'")
    if frame_positions and isinstance(model, Cascade):
        raise ValueError("frame_positions is True; a Cascade has no positions to add to")
    state = dict(model.state_dict())
    factorized = isinstance(model, DiT) and model.config.attention == "factorized"
    taken = set()
    for name, value in image_state.items():
        target = name
        if factorized:
            target = re.sub(r"^blocks\.(\d+)\.", lambda match: f"blocks.{2 * int(match[1])}.", name)
        if target not in state:
            raise ValueError(f"image_state has {name!r}, for which the model has no place")
        if target == "pos_embed":
            value = _positions(value, model.config.grid, frame_positions)
        elif target in ("x_embedder.proj.weight", "embedding.weight"):
            value = _patches(value, model.config.patch[0], patch)
        elif target.startswith("final_layer.linear."):
            value = value.repeat(model.config.patch[0], *(1,) * (value.dim() - 1))
        if value.shape != state[target].shape:
            raise ValueError(
                f"image_state's {name!r} makes shape {tuple(value.shape)}; the model has {tuple(state[target].shape)}"
            )
        state[target] = value
        taken.add(target)
    for name in [name for name in state if name not in taken]:
        if not _temporal(name, factorized):
            raise ValueError(f"image_state is without {name!r}")
        if re.search(r"adaLN_modulation|\.V\.proj\.|\.temporal$", name):
            state[name] = torch.zeros_like(state[name])
    model.load_state_dict(state)


def _temporal(name: str, factorized: bool) -> bool:
    """Whether the parameter is one that no image model has."""
    block = re.match(r"blocks\.(\d+)\.", name)
    if block is not None:
        return factorized and int(block[1]) % 2 == 1
    return ".V." in name or name.endswith(".temporal")


def _patches(weight: Tensor, frames: int, kind: str) -> Tensor:
    """``[D, C, p, p]`` to ``[D, C, frames, p, p]``."""
    if kind == "mean":
        return (weight / frames).unsqueeze(2).repeat(1, 1, frames, 1, 1)
    result = weight.new_zeros(*weight.shape[:2], frames, *weight.shape[2:])
    result[:, :, 0] = weight
    return result


def _positions(image: Tensor, grid: tuple[int, int, int], frame_positions: bool) -> Tensor:
    """``[1, H' W', D]`` to ``[1, T' H' W', D]``."""
    frames = image.expand(grid[0], -1, -1)
    if frame_positions:
        frame = sincos(torch.arange(grid[0]), image.shape[-1]).to(image)
        frames = frames + (frame - frame[:1])[:, None]
    return frames.reshape(1, -1, image.shape[-1])
