"""Attention over time between two rearrangements, as windows of the grid.

    x [B, T, S, D]  ->  [B * S, T, D]  ->  Linear, attention, Linear  ->  [B, S, T, D]  ->  [B, T, S, D]

Both Linears work on single tokens, so neither rearrangement, each a copy, is needed: the op reads windows of T tokens
that are S apart.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import fx

from . import calls
from .graph import Nodes, argument, equal, kind, order_of, shape
from .match import Match
from .products import LINEAR, through_dropout
from .tables import RESHAPES

SWAPPED = (0, 2, 1, 3)


def on_grid(match: Match, linear: fx.Node) -> Match | None:
    """The match of packed attention, with the Linears and rearrangements around it; None if there are none."""
    trail: Nodes = [*match.trail, match.result]
    if kind(linear) != "linear" or any(user not in trail for user in linear.users):
        return None
    first = [argument(linear, index, name) for name, index in LINEAR]
    x = _rearranged(argument(linear, 0, "input"), trail)
    last = _next(match.result, trail)
    while last is not None and (kind(last) in RESHAPES or order_of(last) == SWAPPED):
        last = _next(last, trail)
    if x is None or last is None or kind(last) != "linear" or not _is_of_tokens(last, match.result):
        return None
    second = [argument(last, index, name) for name, index in LINEAR]
    node = _next(last, trail)
    while kind(node) == "dropout" and not through_dropout(node, [])[1]:
        node = _next(node, trail)
    if node is None or kind(node) not in RESHAPES:
        return None
    result = _next(node, trail)
    before, tokens = shape(x), shape(node)
    if result is None or order_of(result) != SWAPPED or before is None or tokens is None or len(tokens) != 4:
        return None
    if not equal((tokens[0], tokens[2], tokens[1]), before[:3]):
        return None
    parameters = match.arguments[1:]  # behind the Linear
    return replace(
        match,
        result=result,
        trail=[each for each in trail if each is not result] + [linear],
        call=calls.grid_attention,
        arguments=(x, *first, *second, *parameters),
        less=match,
    )


def _next(node: fx.Node | None, trail: Nodes) -> fx.Node | None:
    """The only node that reads another, which goes to the trail."""
    if node is None or len(node.users) != 1:
        return None
    (user,) = node.users
    trail.append(user)
    return user


def _swapped(y: Any) -> fx.Node | None:
    """The node of which y is a reshape, if that swaps two axes of another."""
    swapped = y.args[0] if kind(y) in RESHAPES else None
    return swapped if isinstance(swapped, fx.Node) and order_of(swapped) == SWAPPED else None


def _rearranged(y: Any, trail: Nodes) -> fx.Node | None:
    """``x [B, T, S, D]``, if y is it as ``[B * S, T, D]`` and nothing else reads that."""
    swapped = _swapped(y)
    if swapped is None or any(len(node.users) != 1 for node in (y, swapped)):
        return None
    before, after = shape(swapped), shape(y)
    if before is None or after is None or len(after) != 3 or not equal(before[2:], after[1:]):
        return None
    trail += [y, swapped]
    return swapped.args[0]  # type: ignore[return-value]


def _is_of_tokens(last: fx.Node, attention: fx.Node) -> bool:
    """Whether a Linear reads the result ``[B, heads, N, head_dim]`` of attention as ``[B, N, heads * head_dim]``."""
    y = argument(last, 0, "input")
    swapped = _swapped(y)
    if swapped is None or swapped.args[0] is not attention:
        return False
    before, after = shape(swapped), shape(y)
    return before is not None and after is not None and len(after) == 3 and equal(before[:2], after[:2])
