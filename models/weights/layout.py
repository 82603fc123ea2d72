"""What a layout of published weights is: which model a file holds, and its tensors under the names of this project."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checkpoint import Checkpoint
from ..registry import Config, Objective, build


class Hints(NamedTuple):
    """What a file of weights does not say of its model; None: as published."""

    heads: int | None = None
    size: tuple[int, int] | None = None


class Converted(NamedTuple):
    """A model from a file: what it is built from, its objective, its tensors, and what the user should know."""

    config: Config
    objective: Objective
    weights: dict[str, Tensor]
    notes: tuple[str, ...] = ()


def _as_they_are(adapters: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    return adapters


class Layout(NamedTuple):
    """Published weights to a model of this project, and weights and adapters of a run to published ones."""

    read: Callable[[dict[str, Tensor], Hints], Converted]
    write: Callable[[Checkpoint], dict[str, Tensor]]
    adapters: Callable[[dict[str, Tensor], Config], dict[str, Tensor]] = _as_they_are


def shape_of(weights: Mapping[str, Tensor], name: str, dims: int) -> tuple[int, ...]:
    """The shape of a tensor that a layout needs.

    Raises:
        ValueError: there is none of that name, or it has another number of axes.
    """
    if name not in weights:
        others = ", ".join(sorted(weights)[:5])
        raise ValueError(f"the file has no tensor {name!r}; it has {len(weights)} others, such as {others}")
    shape = tuple(weights[name].shape)
    if len(shape) != dims:
        raise ValueError(f"{name} has shape {list(shape)}; it must have {dims} axes")
    return shape


def check_fit(config: Config, weights: Mapping[str, Tensor]) -> None:
    """Raise ValueError with every tensor that is missing, unknown or of another shape than the model's."""
    with torch.device("meta"):
        own: dict[str, Any] = build(config).state_dict()
    wrong = [f"missing: {name} {list(own[name].shape)}" for name in sorted(own.keys() - weights.keys())]
    wrong += [f"unknown: {name} {list(weights[name].shape)}" for name in sorted(weights.keys() - own.keys())]
    wrong += [
        f"misshapen: {name} {list(weights[name].shape)}, the model has {list(own[name].shape)}"
        for name in sorted(own.keys() & weights.keys())
        if own[name].shape != weights[name].shape
    ]
    if wrong:
        more = f"\n  and {len(wrong) - 20} more" if len(wrong) > 20 else ""
        raise ValueError("nothing is converted, for the tensors do not fit:\n  " + "\n  ".join(wrong[:20]) + more)
