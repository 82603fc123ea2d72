"""Norms, modulation and gates: what reads one row of parameters per sample, frame or token."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import fx

from . import calls
from .graph import Nodes, Reader, argument, beneath, dtype, equal, is_cast, kind, pair, shape, sums, unrounded, value
from .match import Match, Replayed


class Norm(NamedTuple):
    """A norm over the last axis."""

    x: fx.Node
    kind: str
    eps: float
    weight: Any = None
    bias: Any = None


def _last(node: fx.Node, index: int, name: str) -> bool:
    """Whether an axis argument is the last axis."""
    axis = argument(node, index, name)
    axis = axis[0] if isinstance(axis, (tuple, list)) and len(axis) == 1 else axis
    rank = len(shape(node.args[0]) or ())
    return axis in (-1, rank - 1)


def _mean(node: Any, trail: Nodes) -> Any:
    """What a node is the mean of, over the last axis, which stays."""
    node = beneath(node, trail)
    if kind(node) == "mean" and _last(node, 1, "dim") and argument(node, 2, "keepdim") is True:
        trail.append(node)
        return node.args[0]
    return None


def _square(node: Any, trail: Nodes) -> Any:
    """What a node is the square of."""
    node = beneath(node, trail)
    trail.append(node)
    if (kind(node) == "pow" and len(node.args) == 2 and node.args[1] == 2) or kind(node) == "square":
        return node.args[0]
    factors = pair(node, "mul")
    return factors[0] if factors and factors[0] is factors[1] else None


def _variance(node: Any, trail: Nodes) -> Any:
    """What a node is the biased variance of, over the last axis, which stays."""
    node = beneath(node, trail)
    if kind(node) != "var" or not isinstance(node, fx.Node):
        return None
    unbiased = node.kwargs.get("unbiased", node.args[2] if len(node.args) > 2 else None)
    biased = unbiased is False or node.kwargs.get("correction") == 0
    keeps = node.kwargs.get("keepdim", node.args[3] if len(node.args) > 3 else False)
    if not biased or not keeps or not _last(node, 1, "dim"):
        return None
    trail.append(node)
    return node.args[0]


def _over_root(node: Any, trail: Nodes) -> Iterator[tuple[Any, Any, float, Nodes]]:
    """Ways to read a node as ``numerator / sqrt(moment + eps)``: numerator, moment, eps, the nodes passed."""
    candidates = []
    if quotient := pair(node, "div"):
        candidates = [(*quotient, "sqrt")]
    elif factors := pair(node, "mul"):
        candidates = [(*factors, "rsqrt"), (*factors[::-1], "rsqrt")]
    for numerator, root, name in candidates:
        passed = [*trail, node]
        root = beneath(root, passed)
        terms = pair(root.args[0], "add") if kind(root) == name and len(root.args) == 1 else None
        for moment, eps in (terms, terms[::-1]) if terms else ():
            if isinstance(eps, (int, float)) and isinstance(moment, fx.Node):
                yield numerator, moment, float(eps), [*passed, root, root.args[0]]


def _written_out(node: Any, trail: Nodes) -> tuple[Norm, Nodes] | None:
    """A norm written out: ``x * rsqrt(mean(x^2) + eps)``, or ``(x - mean(x)) / sqrt(var(x) + eps)``."""
    for numerator, moment, eps, passed in _over_root(node, trail):
        mine = [*passed]
        squared = _mean(moment, mine)
        of = _square(squared, mine) if squared is not None else None
        x = beneath(numerator, mine)
        if of is not None and beneath(of, mine) is x and kind(x) != "sub":
            return Norm(unrounded(numerator, []), "rms", eps), mine
        parts = pair(x, "sub")
        if parts is None:
            continue
        mine.append(x)
        center, middle = beneath(parts[0], mine), _mean(parts[1], mine)
        if middle is None or beneath(middle, mine) is not center:
            continue
        spread = x if of is not None and beneath(of, mine) is x else None
        spread = center if spread is None and (found := _variance(moment, mine)) is not None else spread
        if spread is x or (spread is center and beneath(found, mine) is center):
            return Norm(unrounded(parts[0], []), "layer", eps), mine
    return None


def find_norm(node: Any, trail: Nodes, depth: int = 2) -> tuple[Norm, Nodes] | None:
    """The norm that a node is, and the nodes that it is made of; affine weights too where they are written out."""
    trail = [*trail]
    node = beneath(node, trail)
    name, rank = kind(node), len(shape(node) or ())
    if name in ("layer_norm", "rms_norm") and len(node.args) > 1 and len(node.args[1]) == 1:
        eps = argument(node, 4 if name == "layer_norm" else 3, "eps", 1e-5 if name == "layer_norm" else None)
        eps = torch.finfo(dtype(node.args[0])).eps if eps is None else eps  # type: ignore[arg-type]
        weight = argument(node, 2, "weight")
        bias = argument(node, 3, "bias") if name == "layer_norm" else None
        x = unrounded(node.args[0], trail)
        weight, bias = (unrounded(parameter, trail) for parameter in (weight, bias))
        return Norm(x, name.removesuffix("_norm"), eps, weight, bias), [*trail, node]
    if rank < 2:
        return None
    found = _written_out(node, trail)
    if found is not None or not depth:
        return found
    for name, slot in (("mul", "weight"), ("add", "bias")):
        operands = pair(node, name)
        for inner, parameter in (operands, operands[::-1]) if operands else ():
            if len(shape(parameter) or ()) != 1 or not equal(shape(parameter)[-1], shape(node)[-1]):  # type: ignore[index]
                continue
            below = find_norm(inner, [*trail, node], depth - 1)
            if below is not None and getattr(below[0], slot) is None:
                norm, passed = below
                if (slot == "weight" and norm.bias is not None) or (slot == "bias" and norm.kind == "rms"):
                    continue
                return norm._replace(**{slot: unrounded(parameter, passed)}), passed
    return None


def gain(node: Any, trail: Nodes, views: tuple[fx.Node, ...] = ()) -> tuple[Replayed, Nodes] | None:
    """``scale``, if a node is ``1 + scale``, seen through casts and views that add axes."""
    trail = [*trail]
    node = beneath(node, trail)
    adds = kind(node) == "unsqueeze" or (kind(node) == "getitem" and _adds_axes(node.args[1]))
    if adds and isinstance(node.args[0], fx.Node) and value(node.args[0]) is not None:
        return gain(node.args[0], [*trail, node], (*views, node))
    operands = pair(node, "add")
    for one, scale in (operands, operands[::-1]) if operands else ():
        if isinstance(one, (int, float)) and one == 1 and value(scale) is not None:
            trail.append(node)
            return Replayed(unrounded(scale, trail), views), trail
    return None


def _adds_axes(index: Any) -> bool:
    items = index if isinstance(index, tuple) else (index,)
    return all(item is None or item is Ellipsis or item == slice(None) for item in items)


def is_rows(parameter: tuple[Any, ...] | None, x: tuple[Any, ...] | None) -> str:
    """Whether a shape is one of rows for tokens ``[B, ..., D]``: "rows", "tokens" for one per token, "" if not."""
    if parameter is None or x is None or len(x) < 3 or len(parameter) > len(x) or not parameter:
        return ""
    parameter = (*(1,) * (len(x) - len(parameter)), *parameter)
    if not equal(parameter[-1], x[-1]) or not (equal(parameter[0], x[0]) or equal(parameter[0], 1)):
        return ""
    middle = [*zip(parameter[1:-1], x[1:-1], strict=True)]
    while middle and equal(middle[-1][0], 1):
        middle.pop()
    if not all(equal(mine, theirs) for mine, theirs in middle):
        return ""
    return "tokens" if len(middle) == len(x) - 2 else "rows"


def _end(node: fx.Node, x: fx.Node, trail: Nodes) -> tuple[fx.Node, fx.Node]:
    """The result to replace, and the tokens to read.

    Where a wide sum over narrow tokens is rounded to their dtype and read by nothing else, that cast is the result.
    """
    last, passed = node, []
    while dtype(last) != dtype(x):
        user = next(iter(last.users)) if len(last.users) == 1 else None
        if user is None or not is_cast(user):
            return node, x
        passed.append(last)
        last = user
    trail.extend(passed)
    return last, x


def _rounds_between(match: Match, x: fx.Node) -> str:
    """A reason, if the model rounds between to a dtype narrower than what goes in and what comes out."""
    sizes = [each.itemsize for each in (dtype(x), dtype(match.result)) if each is not None]
    for node in match.trail:
        mine = value(node)
        if mine is not None and mine.dtype.itemsize < min(sizes) and equal(shape(node), shape(x)):
            return f"the model rounds to {mine.dtype} between"
    return ""


def match_adaln(node: fx.Node) -> Match | None:
    """``norm(x) * (1 + scale) + shift``."""
    return _modulated(node, sums(node, []))


def match_scaled(node: fx.Node) -> Match | None:
    """``norm(x) * (1 + scale)``."""
    factors = pair(node, "mul")
    return _modulated(node, [(None, *factors, []), (None, *factors[::-1], [])]) if factors else None


def _modulated(node: fx.Node, ways: list[tuple[Any, Any, Any, Nodes]]) -> Match | None:
    """The first of the ways ``shift + h * k`` in which h is a norm and k is ``1 + scale``."""
    for shift, h, k, passed in ways:
        found = find_norm(h, passed)
        scaled = gain(k, []) if found else None
        if found is None or scaled is None:
            continue
        norm, trail = found
        scale, more = scaled
        trail = [*trail, *more]
        if not is_rows(shape(k), shape(norm.x)) or (shift is not None and not is_rows(shape(shift), shape(norm.x))):
            continue
        if not equal(shape(node), shape(norm.x)):
            continue
        shift = shift if shift is None else unrounded(shift, trail)
        result, x = _end(node, norm.x, trail)
        served = dict(x=x, shift=scale.node if shift is None else shift, scale=scale.node)
        match = Match(
            "adaln",
            result,
            trail,
            calls.adaln,
            (x, shift, scale, norm.weight, norm.bias),
            dict(dtype=dtype(result)),
            {**served, "weight": norm.weight, "bias": norm.bias},
            options=dict(norm=norm.kind, eps=norm.eps),
        )
        match.left = _rounds_between(match, x)
        return match
    return None


def match_gate(node: fx.Node) -> Match | None:
    """``x + gate * branch``."""
    for addend, branch, gate, passed in sums(node, []):
        trail = [*passed]
        x, branch = unrounded(addend, trail), unrounded(branch, trail)
        if value(x) is None or not equal(shape(branch), shape(x)) or not equal(shape(node), shape(x)):
            continue
        rows = is_rows(shape(gate), shape(x))
        # Two products of whole tensors say nothing of which is a gate, but that a part of something else is one.
        part = unrounded(gate, trail)
        if not rows or (rows == "tokens" and not _is_part(part)):
            continue
        if kind(x) == "mul" or (gain(gate, []) is not None and find_norm(branch, []) is not None):
            continue  # a rotation; a modulation that was left
        result, x = _end(node, x, trail)
        return Match(
            "gate_residual",
            result,
            trail,
            calls.gate_residual,
            (x, branch, part),
            dict(dtype=dtype(result)),
            dict(x=x, branch=branch, gate=part, branch_bias=None),
        )
    return None


def _is_part(node: Any) -> bool:
    while kind(node) in ("squeeze", "unsqueeze", "flatten", "reshape", "view"):
        node = node.args[0]
    return kind(node) == "getitem"


def join(reader: Reader, gate: Any, norm: Any) -> bool:
    """One call for a gate and the norm that reads it, if nothing reads the sum before the rows are there."""
    x, branch, rows = gate.args
    _, shift, scale, *affine = norm.args
    before = [user for user in gate.users if reader.order[user] < reader.order[norm]]
    options = norm.kwargs["options"]
    same = dtype(branch) == norm.kwargs["dtype"] and dtype(x) == gate.kwargs["dtype"] and value(gate) is not None
    if before or not same or gate.kwargs["options"].get("backend") != options.get("backend"):
        return False
    if reader.obstacle([gate], [x, branch, rows], norm):
        return False
    with reader.graph.inserting_before(norm):
        both = reader.graph.call_function(
            calls.gate_residual_adaln,
            (x, branch, rows, shift, scale, tuple(affine)),
            {"options": options},
        )
        parts = [reader.graph.call_function(operator.getitem, (both, i)) for i in range(2)]
    for old, new in zip((gate, norm), parts, strict=True):
        new.meta.update(old.meta)
        reader.order[new] = reader.order[norm]
        old.replace_all_uses_with(new)
    both.meta["nn_module_stack"] = norm.meta.get("nn_module_stack")
    reader.order[both] = reader.order[norm]
    reader.graph.erase_node(norm)
    reader.graph.erase_node(gate)
    return True
