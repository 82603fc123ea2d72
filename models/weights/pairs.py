"""Pairs of names: a tensor of this project's model, and the published one with its values in another shape."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from torch import Tensor


class Pair(NamedTuple):
    """A tensor's name here and there, and its values from there to here and back."""

    ours: str
    theirs: str
    read: Callable[[Tensor], Tensor] = lambda x: x
    write: Callable[[Tensor], Tensor] = lambda x: x


def linear(ours: str, theirs: str) -> list[Pair]:
    """Weight and bias that are alike."""
    return [Pair(f"{ours}.{part}", f"{theirs}.{part}") for part in ("weight", "bias")]


def site(ours: str, theirs: str) -> list[Pair]:
    """A Linear here, a convolution over one site there."""
    weight = Pair(f"{ours}.weight", f"{theirs}.weight", lambda x: x[:, :, 0, 0], lambda x: x[:, :, None, None])
    return [weight, Pair(f"{ours}.bias", f"{theirs}.bias")]


def patches(ours: str, theirs: str, side: int) -> list[Pair]:
    """A convolution over patches here, and there over one site, behind a pixel unshuffle."""
    weight = Pair(
        f"{ours}.weight",
        f"{theirs}.weight",
        lambda x: x[:, :, 0, 0].unflatten(1, (-1, side, side)),
        lambda x: x.flatten(1)[:, :, None, None],
    )
    return [weight, Pair(f"{ours}.bias", f"{theirs}.bias")]


def pixels(ours: str, theirs: str, side: int) -> list[Pair]:
    """A Linear to the cells of a patch, channels last, here; a convolution before a pixel shuffle there."""

    def last(x: Tensor) -> Tensor:
        return x.unflatten(0, (-1, side**2)).transpose(0, 1).flatten(0, 1)

    def first(x: Tensor) -> Tensor:
        return x.unflatten(0, (side**2, -1)).transpose(0, 1).flatten(0, 1)

    weight = Pair(
        f"{ours}.weight", f"{theirs}.weight", lambda x: last(x[:, :, 0, 0]), lambda x: first(x)[:, :, None, None]
    )
    return [weight, Pair(f"{ours}.bias", f"{theirs}.bias", last, first)]


def read(pairs: Iterable[Pair], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Published tensors under the names here; those without a pair, or of a shape that cannot be read, as they are."""
    rest, found = dict(weights), {}
    for ours, theirs, to_ours, _ in pairs:
        if theirs in rest:
            value = rest.pop(theirs)
            try:
                found[ours] = to_ours(value)
            except (IndexError, RuntimeError):  # the check of shapes names it
                found[ours] = value
    return found | rest
