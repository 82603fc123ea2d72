"""W.A.L.T's weights for a grid and windows of other sizes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from .walt import WALT
from .walt_config import WALTConfig


def resize(weights: Mapping[str, Tensor], old: WALTConfig, new: WALTConfig) -> dict[str, Tensor]:
    """A state dict for a grid and windows of other sizes, to go on training with.

    Absolute positions are interpolated between token centres, linearly; the tables of relative positions so that the
    offset 0 stays and the farthest offsets meet. All other weights are as they were.

    Args:
        weights: of ``WALT(old)``.
        old, new: may differ in input_size, windows, and in what is not a weight.

    Raises:
        ValueError: weights that are not of ``old``, or configs that differ in what changes the other weights.
    """
    with torch.device("meta"):
        expected, wanted = WALT(old).state_dict(), WALT(new).state_dict()
    if {name: w.shape for name, w in weights.items()} != {name: w.shape for name, w in expected.items()}:
        raise ValueError("weights are not those of a model with the config old")
    resized = {}
    for name, weight in weights.items():
        if name == "pos_space":
            # [H', W', D] as D channels.
            resized[name] = _interpolate(weight.movedim(-1, 0), new.grid[1:], ends_meet=False).movedim(0, -1)
        elif name == "pos_time":
            resized[name] = _interpolate(weight.t(), new.grid[:1], ends_meet=False).t()
        elif name.endswith(".bias_table"):
            layer = int(name.split(".")[1])
            before, after = ([2 * n - 1 for n in config.window(layer)] for config in (old, new))
            resized[name] = _interpolate(weight.unflatten(1, before), after, ends_meet=True).flatten(1)
        else:
            resized[name] = weight
    changed = sorted(name for name in wanted.keys() | resized.keys() if _shape(wanted, name) != _shape(resized, name))
    if changed:
        raise ValueError(f"new differs from old in more than sizes: {', '.join(changed[:5])} would change")
    return {name: weight.contiguous() for name, weight in resized.items()}


def _shape(weights: Mapping[str, Tensor], name: str) -> torch.Size | None:
    return weights[name].shape if name in weights else None


def _interpolate(x: Tensor, size: list[int] | tuple[int, ...], *, ends_meet: bool) -> Tensor:
    """``[channels, ...]`` with other sizes of the axes behind the channels."""
    if list(x.shape[1:]) == list(size):
        return x
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(size)]
    return F.interpolate(x[None], list(size), mode=mode, align_corners=ends_meet)[0]
