"""What a layout of published weights is: which model a file holds, and its tensors under the names of this project."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ..checkpoint import Checkpoint, uninitialised
from ..denoisers.dit import SIZES
from ..registry import Config, Objective, build


class Hints(NamedTuple):
    """What a file of weights does not say of its model; None: as published."""

    heads: int | None = None
    size: tuple[int, int] | None = None
    source: Path | None = None
    """Where the weights are from."""
    empty: Callable[..., Tensor] | None = None
    """What the text encoder makes of no words, ``[L, E]``, by its options; None where no encoder is named."""


class Converted(NamedTuple):
    """A model from a file: what it is built from, its objective, its tensors, and what the user should know.

    ``text`` are the options of its text encoder; None for a model without text.
    """

    config: Config
    objective: Objective
    weights: dict[str, Tensor]
    notes: tuple[str, ...] = ()
    text: Mapping[str, Any] | None = None


def _as_they_are(adapters: dict[str, Tensor], config: Config) -> dict[str, Tensor]:
    return adapters


class Layout(NamedTuple):
    """Published weights to a model of this project, and weights and adapters of a run to published ones."""

    read: Callable[[dict[str, Tensor], Hints], Converted]
    write: Callable[[Checkpoint], dict[str, Tensor]]
    adapters: Callable[[dict[str, Tensor], Config], dict[str, Tensor]] = _as_they_are
    to_diffusers: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] | None = None
    """Published names to those of diffusers, where it has the model."""


def settings_beside(source: Path | None, kind: str) -> dict[str, Any]:
    """What the ``config.json`` of diffusers says that lies in the folder of the weights; nothing if there is none.

    Raises:
        ValueError: a file of another class than ``kind``, or no JSON.
    """
    file = None if source is None else (source if source.is_dir() else source.parent) / "config.json"
    if file is None or not file.is_file():
        return {}
    try:
        values = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}") from error
    of = values.get("_class_name") if isinstance(values, dict) else None
    if of != kind:
        raise ValueError(f"{file} is of {of}; it must be of {kind}")
    return values


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


def empty_caption(hints: Hints, width: int, **options: Any) -> Tensor:
    """What the text encoder makes of no words, ``[L, width]``.

    Raises:
        ValueError: no text encoder is named, or it has another width.
    """
    if hints.empty is None:
        raise ValueError("text_encoder must be named: dropped captions are what it makes of no words")
    rows = hints.empty(**options)
    if rows.shape[1] != width:
        raise ValueError(f"text_encoder has width {rows.shape[1]}; the weights are for {width}")
    return rows


def depth_of(weights: Mapping[str, Tensor]) -> int:
    """The number of blocks."""
    return 1 + max((int(name.split(".")[1]) for name in weights if name.startswith("blocks.")), default=0)


def heads_of(width: int, depth: int, hints: Hints) -> int:
    """The number of attention heads.

    Raises:
        ValueError: it is not named, and width and depth are not those of a published DiT.
    """
    if hints.heads is not None:
        return hints.heads
    for size in SIZES.values():
        if (size["width"], size["depth"]) == (width, depth):
            return size["heads"]
    raise ValueError(f"heads must be named: no published DiT has width {width} and depth {depth}")


def size_of(places: int, patch: tuple[int, int], hints: Hints) -> tuple[int, int]:
    """Height and width of the latents with so many tokens in a frame.

    Raises:
        ValueError: it is not named, and a square has another number of tokens.
    """
    if hints.size is not None:
        return hints.size
    side = math.isqrt(places)
    if side * side != places:
        raise ValueError(f"size must be named: {places} tokens are no square")
    return side * patch[0], side * patch[1]


def learns_sigma(head: str, outputs: int, patch: tuple[int, ...], channels: int) -> bool:
    """Whether the last Linear has channels for the variance.

    Raises:
        ValueError: it has neither ``channels`` nor twice that.
    """
    out_channels = outputs // math.prod(patch)
    if out_channels not in (channels, 2 * channels):
        raise ValueError(f"{head} gives {out_channels} channels; it must give {channels} or {2 * channels}")
    return out_channels == 2 * channels


def check_fit(config: Config, weights: Mapping[str, Tensor]) -> None:
    """Raise ValueError with every tensor that is missing, unknown or of another shape than the model's."""
    with uninitialised():
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
