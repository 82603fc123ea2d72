"""What is made of matrix products: the MLP, and the convolution that embeds patches."""

from __future__ import annotations

from typing import Any

from torch import fx

from . import calls
from .graph import Nodes, argument, dtype, kind, shape
from .match import Match

LINEAR = (("weight", 1), ("bias", 2))


def through_dropout(node: Any, trail: Nodes) -> tuple[Any, str]:
    """What lies beneath dropouts that drop nothing, and why not if one drops."""
    while kind(node) == "dropout":
        if argument(node, 2, "training", True) and argument(node, 1, "p", 0.5) != 0:
            return node, "dropout stands between, in training"
        trail.append(node)
        node = argument(node, 0, "input")
    return node, ""


def match_mlp(node: fx.Node) -> Match | None:
    """Linear, GELU, Linear."""
    if kind(node) != "linear":
        return None
    trail: Nodes = []
    inner: list[Any] = [argument(node, 0, "input")]
    while kind(inner[-1]) == "dropout":
        inner.append(argument(inner[-1], 0, "input"))
    gelu = inner[-1]
    first: Any = argument(gelu, 0, "input") if kind(gelu) == "gelu" else None
    if kind(first) != "linear":
        return None
    _, left = through_dropout(inner[0], trail)
    trail = [*inner, first]
    if any(len(each.users) != 1 for each in trail):
        left = left or "something else reads the activation"
    if dtype(first) != dtype(gelu) or dtype(first) != dtype(node):
        left = left or "dtypes change between"
    parameters = [argument(linear, index, name) for linear in (first, node) for name, index in LINEAR]
    w1, b1, w2, b2 = parameters
    if any(len(shape(weight) or ()) != 2 for weight in (w1, w2)):
        return None  # a Linear to a number
    x = argument(first, 0, "input")
    return Match(
        "gelu_mlp",
        node,
        trail,
        calls.gelu_mlp,
        (x, w1, b1, w2, b2),
        {},
        dict(x=first, w1=w1, b1=b1, w2=w2, b2=b2),  # the first Linear has the dtype that autocast gives x
        left=left,
        options=dict(approximate=argument(gelu, 1, "approximate", "none")),
    )


def match_patches(node: fx.Node) -> Match | None:
    """A convolution with kernel = stride, without padding."""
    if kind(node) not in ("conv2d", "conv3d"):
        return None
    names = (("input", None), ("weight", None), ("bias", None), ("stride", 1), ("padding", 0))
    x, weight, bias, stride, padding = (argument(node, i, *name) for i, name in enumerate(names))
    dilation, groups = argument(node, 5, "dilation", 1), argument(node, 6, "groups", 1)
    axes = 2 if kind(node) == "conv2d" else 3
    patch = (shape(weight) or ())[2:]
    if not all(type(size) is int for size in patch) or max(patch, default=1) == 1:
        return None
    if _each(stride, axes) != patch:
        return None
    left = ""
    if padding != "valid" and _each(padding, axes) != (0,) * axes:
        left = "the convolution has padding"
    elif _each(dilation, axes) != (1,) * axes or groups != 1:
        left = "the convolution has dilation or groups"
    elif len(shape(x) or ()) != axes + 2:
        left = "the convolution has no axis for samples"
    return Match(
        "patch_embed",
        node,
        [],
        calls.patch_embed,
        (x, weight, bias),
        {},
        dict(x=node, weight=weight, bias=bias, pos=None),
        left=left,
    )


def _each(option: Any, axes: int) -> tuple[Any, ...] | None:
    """An option per axis, from one number or some."""
    if isinstance(option, int):
        return (option,) * axes
    return tuple(option) * (axes if len(option) == 1 else 1) if isinstance(option, (tuple, list)) else None
