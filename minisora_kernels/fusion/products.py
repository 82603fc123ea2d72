"""What is made of matrix products: the MLP, and the convolution that embeds patches."""

from __future__ import annotations

from typing import Any

from torch import fx

from ..ops.gelu_mlp import EXACT_BACKENDS
from . import calls
from .graph import VIEWS, Nodes, argument, beneath, dtype, equal, kind, pair, shape, storage, value
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


def _activation(node: fx.Node, trail: Nodes) -> tuple[Any, str]:
    """What a Linear reads, beneath dropouts, and why not if one drops."""
    before = inner = argument(node, 0, "input")
    while kind(inner) == "dropout":
        trail.append(inner)
        inner = argument(inner, 0, "input")
    return inner, through_dropout(before, [])[1]


def _weights(*linears: Any) -> list[Any] | None:
    """Weight and bias of each Linear; None if one is to a number."""
    found = [argument(linear, index, name) for linear in linears for name, index in LINEAR]
    return found if all(len(shape(weight) or ()) == 2 for weight in found[::2]) else None


def _read_elsewhere(trail: Nodes, node: fx.Node) -> str:
    """A reason, if anything else than ``node`` and the trail itself reads the trail."""
    inside = {*trail, node}
    return "" if all(inside.issuperset(each.users) for each in trail) else "something else reads the activation"


def match_mlp(node: fx.Node) -> Match | None:
    """Linear, GELU, Linear."""
    if kind(node) != "linear":
        return None
    trail: Nodes = []
    gelu, left = _activation(node, trail)
    first: Any = argument(gelu, 0, "input") if kind(gelu) == "gelu" else None
    parameters = _weights(first, node) if kind(first) == "linear" else None
    if parameters is None:
        return None
    trail += [gelu, first]
    left = left or _read_elsewhere(trail, node)
    if dtype(first) != dtype(gelu) or dtype(first) != dtype(node):
        left = left or "dtypes change between"
    w1, b1, w2, b2 = parameters
    x, approximate = argument(first, 0, "input"), argument(gelu, 1, "approximate", "none")
    return Match(
        "gelu_mlp",
        node,
        trail,
        calls.gelu_mlp,
        (x, w1, b1, w2, b2),
        {},
        dict(x=first, w1=w1, b1=b1, w2=w2, b2=b2),  # the first Linear has the dtype that autocast gives x
        table=EXACT_BACKENDS if approximate == "none" else None,
        left=left,
        options=dict(approximate=approximate),
    )


def match_glu(node: fx.Node) -> Match | None:
    """Linear, the activation of one half times the other half, Linear; each half may have a Linear of its own."""
    if kind(node) != "linear":
        return None
    outer: Nodes = []
    inner, left = _activation(node, outer)
    product = beneath(inner, outer)
    factors = pair(product, "mul")
    for one, other in (factors, factors[::-1]) if factors else ():
        trail = [*outer, product]
        activated = _activated(one, trail)
        halves = None if activated is None else _halves(activated[0], beneath(other, trail), trail)
        if activated is None or halves is None:
            continue
        first, second, gate_first = halves
        parameters = _weights(first, node, *([] if second is None else [second]))
        if parameters is None:
            return None
        w1, b1, w2, b2, w3, b3 = [*parameters, None, None] if second is None else parameters
        left = left or _read_elsewhere(trail, node) or _narrowed(trail, node)
        if any(dtype(each) != dtype(node) for each in (first, second or first)):
            left = left or "dtypes change between"
        return Match(
            "glu_mlp",
            node,
            trail,
            calls.glu_mlp,
            (argument(first, 0, "input"), w1, b1, w3, b3, w2, b2),
            {},
            dict(x=first, w1=w1, b1=b1, w3=w3, b3=b3, w2=w2, b2=b2),  # x as in match_mlp
            left=left,
            options=dict(activation=activated[1], gate_first=gate_first),
        )
    return None


def _activated(node: Any, trail: Nodes) -> tuple[Any, str] | None:
    """What a node is the activation of, and which; ``g * sigmoid(g)`` too."""
    passed = [*trail]
    node = beneath(node, passed)
    name, gate = "", None
    if kind(node) == "silu" and not argument(node, 1, "inplace", False):
        name, gate = "silu", argument(node, 0, "input")
    elif kind(node) == "gelu":
        name = "gelu_tanh" if argument(node, 1, "approximate", "none") == "tanh" else "gelu"
        gate = argument(node, 0, "input")
    factors = pair(node, "mul")
    for one, other in (factors, factors[::-1]) if factors else ():
        sigmoid = beneath(other, mine := [*passed])
        if kind(sigmoid) == "sigmoid" and beneath(one, mine) is beneath(sigmoid.args[0], mine):
            name, gate, passed = "silu", one, [*mine, sigmoid]
            break
    if not name:
        return None
    trail[:] = [*passed, node]
    return beneath(gate, trail), name


def _halves(gate: Any, other: Any, trail: Nodes) -> tuple[fx.Node, fx.Node | None, bool] | None:
    """The Linear that made both halves; or the gate's and the other's. Then, whether the gate is the first half."""
    if kind(gate) == kind(other) == "linear":
        if gate is other or argument(gate, 0, "input") is not argument(other, 0, "input"):
            return None
        trail += [gate, other]
        return (gate, other, True) if equal(shape(gate), shape(other)) else None
    linear, places = None, []
    for half in (gate, other):
        node = half
        while kind(node) in (*VIEWS, "narrow"):
            trail.append(node)
            node = node.args[0]
        if kind(node) != "linear" or (linear is not None and node is not linear):
            return None
        linear = node
        places.append(_place(half, linear))
    if linear is None or sorted(places) != [0, 1]:
        return None
    trail.append(linear)
    return linear, None, places[0] == 0


def _place(half: Any, linear: fx.Node) -> int:
    """Which half of the last axis of what a Linear made a node shows, whichever way it comes to it; -1 for neither."""
    mine, whole = value(half), value(linear)
    if mine is None or whole is None or storage(half) is None or storage(half) != storage(linear):
        return -1
    width = whole.shape[-1] // 2
    if 2 * width != whole.shape[-1] or not equal(tuple(mine.shape), (*whole.shape[:-1], width)):
        return -1
    start = mine.storage_offset() - whole.storage_offset()
    if not equal(tuple(mine.stride()), tuple(whole.stride())):
        return -1
    return 0 if equal(start, 0) else 1 if equal(start, width) else -1


def _narrowed(trail: Nodes, node: fx.Node) -> str:
    """A reason, if the model rounds between to a narrower dtype than that of the result."""
    for each in trail:
        mine, last = dtype(each), dtype(node)
        if mine is not None and last is not None and mine.itemsize < last.itemsize:
            return f"the model rounds to {mine} between"
    return ""


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
