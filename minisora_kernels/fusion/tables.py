"""Tables: which of their numbers are the same, as far as the graph says how they are made, and which rows."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from torch import fx

from .graph import CASTS, argument, dtype, equal, kind, shape, storage, written

RESHAPES = ("view", "reshape", "flatten", "unflatten")

# A number of a table by where it comes from, or None for 1. Two with one key are the same number.
Key = Any


class Unknown(Exception):
    """A node that is not understood."""


def numbers_of(node: fx.Node, axes: int) -> np.ndarray:
    """The numbers in the last ``axes`` of a node, at any row: factors and keys. Two with the same of both are equal."""
    sizes = (shape(node) or ())[len(shape(node) or ()) - axes :]
    if not all(isinstance(size, int) for size in sizes):
        raise Unknown
    try:
        found = _known(node, axes)
    except Unknown:
        found = None
    if found is None or found.shape != sizes:
        found = array_of([(1.0, (node, i)) for i in range(math.prod(sizes))], sizes)
    return found


def _changes(node: fx.Node) -> bool:
    """Whether a node or what it is made of may be written to: what was read before is not what is read later."""
    return not {storage(each) for each in (node, *node.all_input_nodes)}.isdisjoint({None, *_stores(node.graph)})


def _known(node: fx.Node, axes: int) -> np.ndarray | None:
    if _changes(node):
        return None
    name = kind(node)
    source = node.args[0] if node.args else None
    if name in ("cat", "stack"):
        parts, axis = argument(node, 0, "tensors"), argument(node, 1, "dim", 0)
        rank = len(shape(node) or ())
        if not isinstance(parts, (tuple, list)) or axis % rank < rank - axes:
            return None
        tables = [numbers_of(part, axes - (name == "stack")) for part in parts]
        return (np.concatenate if name == "cat" else np.stack)(tables, axis % rank - (rank - axes))
    if not isinstance(source, fx.Node):
        return None
    before, after = shape(source) or (), shape(node) or ()
    if name in CASTS:
        if before != after:
            return None
        return mapped(numbers_of(source, axes), lambda entry: (entry[0], _cast(entry[1], source, node)))
    number = dtype(node)
    if number is None or not number.is_floating_point or number != dtype(source):
        return None
    if name == "neg":
        return mapped(numbers_of(source, axes), lambda entry: (-entry[0], entry[1]))
    if name in ("cos", "sin"):
        return mapped(numbers_of(source, axes), lambda entry: (1.0, (name, number, entry)))
    if name in ("repeat", "expand") and len(before) == len(after):
        rows = zip(before[: len(after) - axes], after, strict=False)
        same = equal(before[-axes:], after[-axes:]) and all(equal(a, b) or equal(a, 1) for a, b in rows)
        return numbers_of(source, axes) if same else None
    if name == "unsqueeze":
        axis = argument(node, 1, "dim") % len(after) - (len(after) - axes)
        return numbers_of(source, axes) if axis < 0 else np.expand_dims(numbers_of(source, axes - 1), axis)
    if name == "repeat_interleave" and argument(node, 2, "dim") in (-1, len(before) - 1):
        times = argument(node, 1, "repeats")
        return np.repeat(numbers_of(source, axes), times, -1) if isinstance(times, int) and axes == 1 else None
    if name in RESHAPES:
        inner = next((i for i in range(1, len(before) + 1) if _count(before[-i:]) == _count(after[-axes:])), 0)
        return numbers_of(source, inner).reshape(after[-axes:]) if inner else None
    if name == "getitem":
        return _item(source, node.args[1], before, axes)
    return None


def _cast(key: Key, source: fx.Node, node: fx.Node) -> Key:
    return key if dtype(source) == dtype(node) else (dtype(node), key)


def _item(source: fx.Node, index: Any, sizes: tuple[Any, ...], axes: int) -> np.ndarray | None:
    """An index of a table: that of the first axes chooses rows, the rest chooses entries."""
    rows = per_axis(index, len(sizes))
    inner: list[Any] = []
    while rows and sum(item is None or isinstance(item, slice) for item in inner) < axes:
        inner.insert(0, rows.pop())
    found = numbers_of(source, sum(item is not None for item in inner))[tuple(inner)]
    if all(item is None or item == slice(None) for item in rows):
        return found
    chosen = f"{rows} of {sizes}"
    return mapped(found, lambda entry: (entry[0], (chosen, entry[1])))


def repeats(node: Any) -> bool:
    """Whether the rows of the first axis are known to be equal."""
    sizes, name = shape(node), kind(node)
    if not sizes or node.op not in ("call_function", "call_method") or _changes(node):
        return False
    if equal(sizes[0], 1):
        return True
    parts = argument(node, 0, "tensors")
    if name in ("cat", "stack") and isinstance(parts, (tuple, list)):
        return argument(node, 1, "dim", 0) % len(sizes) > 0 and all(map(repeats, parts))
    source = node.args[0]
    before = shape(source)
    if not before:
        return False
    if name in ("repeat", "expand"):
        return len(before) == len(sizes) and equal(before[0], 1)
    if name == "getitem":
        index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        return index[0] == slice(None) and repeats(source)
    one = name in ("cos", "sin", "neg", *CASTS, *RESHAPES) or (name == "unsqueeze" and argument(node, 1, "dim") != 0)
    return one and equal(before[0], sizes[0]) and repeats(source)


_GRAPHS: weakref.WeakKeyDictionary[fx.Graph, set[int | None]] = weakref.WeakKeyDictionary()


def _stores(graph: fx.Graph) -> set[int | None]:
    """The storages that any node of a graph may write to, of those that it is given."""
    if graph not in _GRAPHS:
        targets = [(node, written(node)) for node in graph.nodes]
        every = [each for node, some in targets for each in (node.all_input_nodes if some is None else some)]
        _GRAPHS[graph] = {storage(each) for each in every} - {None}
    return _GRAPHS[graph]


def _count(sizes: Iterable[Any]) -> int | None:
    sizes = tuple(sizes)
    return math.prod(sizes) if all(isinstance(size, int) for size in sizes) else None


def per_axis(index: Any, rank: int) -> list[Any]:
    """An index, with an item for each axis, and None where it adds one."""
    items = list(index) if isinstance(index, tuple) else [index]
    taken = sum(item is not None and item is not Ellipsis for item in items)
    place = items.index(Ellipsis) if Ellipsis in items else len(items)
    items[place : place + 1] = [slice(None)] * (rank - taken)
    if not all(item is None or isinstance(item, int) or is_plain(item) for item in items):
        raise Unknown
    return items


def is_plain(item: Any) -> bool:
    if not isinstance(item, slice):
        return False
    return all(each is None or isinstance(each, int) for each in (item.start, item.stop, item.step))


def array_of(cells: list[Any], sizes: tuple[int, ...]) -> np.ndarray:
    found = np.empty(len(cells), object)
    for i, cell in enumerate(cells):  # one by one: numpy would look into them
        found[i] = cell
    return found.reshape(sizes)


def mapped(cells: np.ndarray, function: Callable[[Any], Any]) -> np.ndarray:
    return array_of([function(cell) for cell in cells.flat], cells.shape)
